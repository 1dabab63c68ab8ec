"""Rules side by side: what each reaches, keeps and costs, and which of them agree.

Rules drop different shares of the pool, and a share is an effect of its own. So every arm is
compared twice: with the arm that the study names, and with random tokens at nearly its own share
(near a share of 1 that is ``full``).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tokenclean.cleaning.results import ArmResult
from tokenclean.costs import COSTS, SHARED, Cost
from tokenclean.data.kinds import KIND_ROWS
from tokenclean.data.planted import REGIMES
from tokenclean.evaluation.planted import ALL, MaskQuality
from tokenclean.report.figures import draw_matrix
from tokenclean.selection.rule import make_rule
from tokenclean.selection.xtf import REASONS
from tokenclean.study.cells import (
    Cell,
    Spread,
    Table,
    accuracy,
    arms_of,
    by_variant,
    file_name,
    groups_of,
    headlines_of,
    seeds_note,
    sources_of,
    spread,
)
from tokenclean.study.compare import difference, questions_note
from tokenclean.study.masks import ATTRIBUTES, Masks, measure
from tokenclean.training.weights import Weighting, make_weighting

#: What cannot be compared here, and why: shown in place of numbers.
LEFT_OUT: Final = {
    "xtf_code with its own reasoning importance (reasoning: keys)": (
        "the released code averages attention over the key axis; every softmax row sums to 1, so "
        "that is 1/T for every token of a sample and a fence would drop rounding noise. The arm "
        "runs on its two other attributes."
    ),
    "length, quality": (
        "they rank whole samples and say nothing of a sample's tokens; see "
        "configs/study/samples.yaml"
    ),
    "talr with the normaliser of its paper": (
        "the normaliser is not known to us; the arm scales the weights to mean 1 over the batch"
    ),
}

_MASK: Final[dict[str, Callable[[MaskQuality], float]]] = {
    "AUROC": lambda m: m.auroc,
    "precision": lambda m: m.precision,
    "corrupted kept": lambda m: m.corrupted_kept,
}


def rules_tables(cells: Sequence[Cell], against: str, folder: Path) -> list[Table]:
    """A row per arm: accuracy, mask, marginals, costs; agreement; what XTF dropped and why."""
    tables = []
    for variant, group in by_variant(cells).items():
        tables += _Rules(variant, group, against).tables(folder)
    rows: list[list[Any]] = [[rule, why] for rule, why in LEFT_OUT.items()]
    return [*tables, Table("rules_left_out", "Not compared", ["rule", "why"], rows)]


class _Rules:
    """The arms of one variant over its seeds."""

    def __init__(self, variant: str, cells: Sequence[Cell], against: str):
        self.variant, self.cells, self.against = variant, cells, against
        self.arms = arms_of(cells)
        self.runs = [cell.results() for cell in cells]
        self.masks = [measure(cell) for cell in cells]
        self.settings = {arm: _settings(cells, arm) for arm in self.arms}
        self.shares = {arm: self._trained_share(arm) for arm in self.arms}
        self.headlines = headlines_of(sources_of(cells))

    def tables(self, folder: Path) -> list[Table]:
        return [
            self._overview(),
            self._differences(),
            self._families(),
            self._marginals(),
            self._costs(),
            self._kappa(folder),
            *self._kinds(),
            *(t for arm in self.arms for t in self._xtf(arm)),
        ]

    def _table(
        self, name: str, title: str, columns: list[str], rows: list[list[Any]], notes: list[str]
    ) -> Table:
        setting = "" if self.variant == "main" else f", {self.variant}"
        name = file_name("rules", name, self.variant)
        return Table(name, title + setting, columns, rows, [seeds_note(self.cells), *notes])

    def _results(self, arm: str) -> list[ArmResult | None]:
        return [run.get(arm) for run in self.runs]

    def _trained_share(self, arm: str) -> float | None:
        """Share of the ranked tokens that a step trains on: kept ones, and of them online ones."""
        shares = [r.kept_share for r in self._results(arm) if r and r.kept_share is not None]
        if not shares:
            return None
        online = _weighting(self.settings[arm])
        return statistics.fmean(shares) * getattr(online, "keep", 1.0)

    def _control(self, arm: str) -> str | None:
        """The arm of random tokens whose share is nearest to an arm's; of equals, the first."""
        share = self.shares[arm]
        if share is None or _is_random(self.settings[arm]):
            return None
        random = {a: self.shares[a] for a in self.arms if _is_random(self.settings[a])}
        known = {a: abs(other - share) for a, other in random.items() if other is not None}
        return min(known, key=lambda a: known[a]) if known else None

    def _overview(self) -> Table:
        rows: list[list[Any]] = []
        for arm in self.arms:
            found = self._results(arm)
            apart = None if arm == self.against else self._apart(arm, self.against, (ALL,))
            masks = [None if r is None else r.mask.get(ALL) for r in found]
            rows.append(
                [
                    arm,
                    describe(self.settings[arm]),
                    spread((None if r is None else r.kept_share for r in found), 3),
                    *(spread(accuracy(r, g) for r in found) for g in self.headlines.values()),
                    apart,
                    *(
                        spread((None if m is None else show(m) for m in masks), 3)
                        for show in _MASK.values()
                    ),
                ]
            )
        notes = [
            "Accuracy in percent, differences in percentage points over all questions. A star "
            "marks a resolved one: it exceeds twice its paired standard error over questions and "
            "twice that over seeds.",
            questions_note(self.cells),
            "AUROC of what a rule ranks by, informative tokens against all others; rules that do "
            "not rank have none. Precision is the informative share of the kept tokens.",
        ]
        columns = ["arm", "rule", "kept share", *self.headlines, f"- `{self.against}`", *_MASK]
        return self._table("", "Rules compared", columns, rows, notes)

    def _apart(self, arm: str, other: str, group: tuple[str, ...]) -> Spread | None:
        found = difference(self.cells, arm, other, group)
        return None if found is None else found.marked

    def _differences(self) -> Table:
        rows: list[list[Any]] = []
        for arm in self.arms:
            if (control := self._control(arm)) is not None:
                apart = (self._apart(arm, control, g) for g in self.headlines.values())
                rows.append([arm, self.shares[arm], control, self.shares[control], *apart])
        columns = ["arm", "trained share", "control", "its share", *self.headlines]
        notes = [
            "The control trains on random tokens (or all), at the share nearest to the arm's: what "
            "a rule gains over it is due to which tokens it keeps, not to how many. Online weights "
            "that keep a share of each batch count with it; those that only weigh, and `profit`, "
            "whose share follows from the model, have `full` for control."
        ]
        return self._table(
            "difference", "Accuracy minus that of random tokens at the same share", columns, rows,
            notes,
        )  # fmt: skip

    def _families(self) -> Table:
        groups = groups_of(sources_of(self.cells))
        sources = {s: g for s, g in groups.items() if g == (s,) and s != ALL}
        rows: list[list[Any]] = [
            [arm, *(spread(accuracy(r, g) for r in self._results(arm)) for g in sources.values())]
            for arm in self.arms
        ]
        named = [f"{s} ({REGIMES[s]})" if s in REGIMES else s for s in sources]
        return self._table("families", "Accuracy in percent by family", ["arm", *named], rows, [])

    def _marginals(self) -> Table:
        rows: list[list[Any]] = []
        for arm in self.arms:
            values = [m.marginals.get(arm) for m in self.masks]
            means = [spread((None if v is None else v[i] for v in values), 3) for i in range(4)]
            if arm != "base":
                rows.append([arm, normalisation(self.settings[arm]), *means])
        names = {arm for m in self.masks for arm in m.yardstick if arm}
        notes = [
            "Means in nats over the ranked tokens. All arms by the same losses: the base's, and "
            f"scores (base - reference) by the reference of {', '.join(sorted(names))}."
            if names
            else "No fixed-model arm of these runs was scored: no losses to compare by.",
            "Dividing by the kept tokens scales each token's gradient by 1 / kept share.",
        ]
        columns = [
            "arm", "loss normalisation", "base loss, kept", "base loss, dropped", "score, kept",
            "score, dropped",
        ]  # fmt: skip
        return self._table("marginals", "Kept against dropped tokens", columns, rows, notes)

    def _costs(self) -> Table:
        ledgers = [_ledger(cell) for cell in self.cells]
        rows: list[list[Any]] = []
        for arm in self.arms:
            if arm != "base":
                needs, shared = reads(self.settings[arm])
                rows.append([arm, needs, shared, *_sums(ledgers, arm, None)])
        for name, stage, number in (
            ("the warm-up", "train", 0),
            ("references of the halves", "train", None),
            ("all shared passes", "score", None),
        ):
            sums = _sums(ledgers, SHARED, (stage, number))
            if sums[0] is not None:
                rows.append([f"shared: {name}", None, None, *sums])
        notes = [
            "Wall-clock and model seconds of the arm's own scoring, selection and training, "
            "without its evaluation; what several arms share is stated below them once. Passes "
            "compute every column that some arm asks for. On a CPU the peak is that of the whole "
            "process."
        ]
        columns = ["arm", "reads", "shared stages", "seconds", "model seconds", "peak memory (MB)"]
        return self._table("costs", "What each rule costs", columns, rows, notes)

    def _kappa(self, folder: Path) -> Table:
        arms = [a for a in self.arms if any((a, a) in m.kappa for m in self.masks)]
        means = {
            (one, other): spread((m.kappa.get((one, other)) for m in self.masks), 2)
            for one in arms
            for other in arms
        }
        rows: list[list[Any]] = [[one, *(means[one, other] for other in arms)] for one in arms]
        notes = [
            "Cohen's kappa of two keep masks over the response tokens that both ranked (1: the "
            "same masks, 0: no more than chance). Arms that keep everything are left out. Random "
            "arms of one run share their draws: what a smaller one keeps, a larger one keeps too.",
        ]
        table = self._table("kappa", "Agreement of the masks", ["arm", *arms], rows, notes)
        if len(arms) > 1:
            path = folder / "figures" / f"{table.name}.png"
            values = [[m.mean if (m := means[a, b]) else None for b in arms] for a in arms]
            draw_matrix(path, arms, values, "Cohen's kappa")
            table.figures.append(f"figures/{path.name}")
        if not arms:
            table.notes.append("No arm of these runs cleaned anything.")
        return table

    def _kinds(self) -> list[Table]:
        """What each rule keeps of every kind of token, on planted pools."""
        arms = [a for a in self.arms if any(m.kinds.get(a) for m in self.masks)]
        if not arms:
            return []
        rows: list[list[Any]] = [["tokens", *(self._tokens(arms[0], k) for k in KIND_ROWS)]]
        for arm in arms:
            kept = [self._share_of(arm, kind, 1) for kind in KIND_ROWS]
            if any(share is not None and share.mean < 1 for share in kept):
                rows.append([arm, *kept])
        notes = [
            "Kept share of each kind; arms that keep everything are left out. `value` is the "
            "answer itself, `frame` the rest of its sentence, `end` the end-of-sequence token: all "
            "informative. `corrupted` is a wrong value. The others are sentences that do not "
            "belong there, `fact` another family's. known, weak, blank: what the base could do in "
            "the family before any training."
        ]
        columns = ["arm", *KIND_ROWS]
        return [self._table("kinds", "What each rule keeps", columns, rows, notes)]

    def _tokens(self, arm: str, kind: str) -> Spread | None:
        counts = [m.kinds.get(arm, {}).get(kind) for m in self.masks]
        return spread((None if c is None else float(c[0]) for c in counts), 0)

    def _share_of(self, arm: str, kind: str, place: int) -> Spread | None:
        counts = [m.kinds.get(arm, {}).get(kind) for m in self.masks]
        return spread((c[place] / c[0] if c and c[0] else None for c in counts), 3)

    def _xtf(self, arm: str) -> list[Table]:
        """Of an arm that gives XTF's reasons: which attribute dropped what."""
        found = [m for m in self.masks if arm in m.codes]
        if not found:
            return []
        sources = list(dict.fromkeys(s for m in found for s in m.codes[arm]))
        rows: list[list[Any]] = []
        for source in sources:
            counts = (
                spread((m.codes[arm].get(source, {}).get(code) for m in found), 0)
                for code in REASONS
            )
            failed = (
                spread(_failed(m, arm, source, bit) for m in found) for bit in ATTRIBUTES.values()
            )
            ranked = spread((m.ranked[arm].get(source) for m in found), 0)
            rows.append([source, ranked, *counts, *failed])
        only = [text.removeprefix("XTF: ") for text in REASONS.values()]
        overlaps = self._table(
            f"reasons_{arm}",
            f"Tokens that `{arm}` dropped, by the attributes that they failed in",
            ["source", "ranked", *only, *(f"{name} in all (%)" for name in ATTRIBUTES)],
            rows,
            [
                "A token is in one of the seven columns of counts: it failed in these attributes "
                "and no other. The last three count every failure, in percent of the source's "
                "ranked tokens."
            ],
        )
        if not any(m.kinds.get(arm) for m in found):
            return [overlaps]
        rows = []
        for kind in KIND_ROWS:
            shares = (self._share_of(arm, kind, i) for i in range(1, 2 + len(ATTRIBUTES)))
            rows.append([kind, self._tokens(arm, kind), *shares])
        confusion = self._table(
            f"attributes_{arm}",
            f"What tokens are, against the attribute for which `{arm}` dropped them",
            ["tokens are", "tokens", "kept share", *ATTRIBUTES],
            rows,
            [
                "Shares of the tokens of a row; a token that failed in two attributes counts in "
                "both. The rows are explained at the table of kinds."
            ],
        )
        return [overlaps, confusion]


def _failed(masks: Masks, arm: str, source: str, bit: int) -> float | None:
    """Percent of a source's ranked tokens that failed in an attribute."""
    codes, ranked = masks.codes[arm].get(source), masks.ranked[arm].get(source)
    if not codes or not ranked:
        return None
    return 100 * sum(n for code, n in codes.items() if (code - 4) & bit) / ranked


# -- what an arm is --------------------------------------------------------------------------------


def _settings(cells: Sequence[Cell], arm: str) -> dict[str, Any]:
    """An arm's part of the first configuration that has it; see `Arm` for its options."""
    for cell in cells:
        config = cell.config()
        found = ((config.get("loop") or {}).get("arms") or {}).get(arm)
        if found:
            run = config.get("selection") or {}
            if found.get("options") is None and run.get("rule") == found.get("rule"):
                return {**found, "options": run.get("options")}
            return dict(found)
    return {}


def _is_random(arm: dict[str, Any]) -> bool:
    """It keeps random tokens of the whole pool, or all, and weights none."""
    return (
        arm.get("rule") in ("random", "full")
        and arm.get("schedule") == "fixed_model"
        and arm.get("scope", "global") == "global"
        and not arm.get("weighting")
    )


def _weighting(arm: dict[str, Any]) -> Weighting | None:
    """An arm's online weights, if it has any."""
    name = arm.get("weighting")
    return make_weighting(name, arm.get("weighting_options")) if name else None


def _options(name: str, options: dict[str, Any] | None) -> str:
    given = ", ".join(f"{k}: {v}" for k, v in (options or {}).items())
    return f"{name} ({given})" if given else name


def describe(arm: dict[str, Any]) -> str:
    """Rule, scope, schedule and weights of an arm, in a few words."""
    if not arm:
        return "-"
    if arm.get("schedule") == "warmup":
        return "all tokens of D_0"
    text = _options(arm.get("rule", "token_cleaning"), arm.get("options"))
    if arm.get("scope", "global") != "global":
        text += f" per {arm['scope']}"
    if arm.get("schedule") != "fixed_model":
        text += f", {arm.get('schedule')}"
    if arm.get("weighting"):
        text += f", weights {_options(arm['weighting'], arm.get('weighting_options'))}"
    return text


def normalisation(arm: dict[str, Any]) -> str | None:
    """What the sum of a step's weighted losses is divided by."""
    if not arm:
        return None
    if (weighting := _weighting(arm)) is not None:
        return {
            "tokens": "weighted sum / trained tokens",
            "weights": "weighted sum / sum of weights",
        }[weighting.mean_over]
    if arm.get("rule") == "forgetting":
        return "mean over positives - lambda x mean over negatives"
    if arm.get("rule") == "soft":
        return "weighted sum / kept tokens"
    return "mean over kept tokens"


def reads(arm: dict[str, Any]) -> tuple[str | None, str | None]:
    """Columns that an arm's rule and weights read, and the shared stages that they take."""
    if not arm:
        return None, None
    needs: list[str] = []
    if arm.get("schedule") != "warmup":
        needs += make_rule(arm.get("rule", "token_cleaning"), arm.get("options")).needs
    if (weighting := _weighting(arm)) is not None:
        needs += weighting.needs
    stages = []
    tables = {need.partition(".")[0] for need in needs}
    if "base" in tables:
        stages.append("a pass of the base")
    if arm.get("schedule") in ("warmup", "self_evolving"):
        stages.append("the warm-up")
    elif "reference" in tables:
        stages.append(
            "two references and their passes"
            if arm.get("schedule") == "cross_fitted"
            else "the reference and its pass"
        )
    return ", ".join(dict.fromkeys(needs)) or "nothing", "; ".join(stages) or "none"


def _ledger(cell: Cell) -> list[Cost]:
    path = cell.folder / COSTS
    if not path.is_file():
        return []
    return [Cost(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def _sums(
    ledgers: Sequence[list[Cost]], arm: str, stage: tuple[str, int | None] | None
) -> list[Spread | None]:
    """Seconds, model seconds and peak memory in MB of an arm, or of one of its stages."""
    totals: list[Cost | None] = []
    for ledger in ledgers:
        mine = [c for c in ledger if c.arm == arm and c.stage in ("score", "select", "train")]
        if stage is not None:
            mine = [c for c in mine if (c.stage, c.round) == stage]
        total = Cost(**asdict(mine[0])) if mine else None
        for cost in mine[1:]:
            assert total is not None
            total.add(cost)
        totals.append(total)
    return [
        spread(None if c is None else c.seconds for c in totals),
        spread(None if c is None else c.model_seconds for c in totals),
        spread((None if c is None else c.peak_memory / 1e6 for c in totals), 0),
    ]
