"""The results table of a run: what each arm reached, per source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenclean.evaluation.planted import ALL, Accuracy, MaskQuality
from tokenclean.publish import write_json, write_text

#: What the loop leaves of a run, and of every model that it measured.
RESULTS, RESULT, ANSWERS = "results.json", "result.json", "answers.json"


@dataclass
class ArmResult:
    """What was measured of one arm.

    Attributes:
        name: the arm, or ``base``.
        kept_share: kept share of the tokens it ranked (D_0, which is not cleaned, left out).
        accuracy: source -> test accuracy.
        validation_nll: source -> mean loss per response token of the validation pool, in nats.
        mask: source -> agreement of its mask with the planted truth.
    """

    name: str
    kept_share: float | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    validation_nll: dict[str, float] = field(default_factory=dict)
    mask: dict[str, MaskQuality] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN, which JSON does not know, becomes null."""
        cleaned: dict[str, Any] = _without_nan(asdict(self))
        return cleaned

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ArmResult:
        def number(x: Any) -> Any:
            return math.nan if x is None else x

        return cls(
            name=value["name"],
            kept_share=value["kept_share"],
            accuracy={k: Accuracy(**v) for k, v in value["accuracy"].items()},
            validation_nll=value["validation_nll"],
            mask={
                k: MaskQuality(**{n: number(x) for n, x in v.items()})
                for k, v in value["mask"].items()
            },
        )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def results_markdown(results: list[ArmResult]) -> str:
    """Accuracy, validation loss and mask quality: a row per arm, a column per source."""
    parts = []
    if any(r.accuracy for r in results):
        table = _table(
            results,
            lambda r: r.accuracy,
            lambda a: f"{100 * a.share:.1f} ± {100 * a.standard_error:.1f}",
        )
        parts.append("Test accuracy in percent ± standard error over questions\n\n" + table)
    if any(r.validation_nll for r in results):
        table = _table(results, lambda r: r.validation_nll, lambda v: f"{v:.3f}")
        parts.append("Validation loss, nats per response token\n\n" + table)
    measures: list[tuple[str, Callable[[MaskQuality], float]]] = [
        (
            "AUROC of the score, informative tokens against all others (0.5 = no better than "
            "chance, below = worse). Here and below the rows of D_0, which are not cleaned, are "
            "left out",
            lambda m: m.auroc,
        ),
        ("AUROC of the score, informative against corrupted tokens", lambda m: m.auroc_corrupted),
        ("Precision of the mask: informative share of the kept tokens", lambda m: m.precision),
        ("Recall of the mask: kept share of the informative tokens", lambda m: m.recall),
        ("Kept share of the corrupted tokens", lambda m: m.corrupted_kept),
    ]
    for title, measure in measures:
        shown = [r for r in results if any(not math.isnan(measure(m)) for m in r.mask.values())]
        if shown:
            table = _table(shown, lambda r: r.mask, lambda m, f=measure: _number(f(m)))  # type: ignore[misc]
            parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts) + "\n" if parts else "nothing was measured: give data.test_path\n"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _table(
    results: list[ArmResult],
    values: Callable[[ArmResult], dict[str, Any]],
    show: Callable[[Any], str],
) -> str:
    sources = sorted({s for r in results for s in values(r) if s != ALL})
    columns = [*sources, ALL]
    lines = [
        "| arm | kept | " + " | ".join(columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for result in results:
        kept = "-" if result.kept_share is None else f"{result.kept_share:.3f}"
        found = values(result)
        cells = [show(found[s]) if s in found else "-" for s in columns]
        lines.append(f"| {result.name} | {kept} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(folder: Path, results: list[ArmResult]) -> None:
    """``results.md`` for people, ``results.json`` for programs."""
    write_text(folder / "results.md", results_markdown(results))
    write_json(folder / RESULTS, [r.to_json() for r in results])
