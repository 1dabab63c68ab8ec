"""Every rule by hand, XTF's parts against plain re-computations, and a rule added from outside."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tokenclean.named import make, names_in
from tokenclean.selection.rule import PACKAGE, Rule, TokenBlock, columns_needed, make_rule
from tokenclean.selection.rules.xtf_paper import XtfPaper
from tokenclean.selection.select import SelectionConfig, select
from tokenclean.selection.xtf import REASONS, Clusters, PositionMeans, below_fence, worst_of
from tokenclean.trust import trusting

#: Three responses of 3, 1 and 4 tokens.
COUNTS = [3, 1, 4]


def pool(columns: dict[str, list[float]], cuts: Iterable[int] = ()) -> Callable[[], Any]:
    """The responses as blocks, cut before the given rows."""
    edges = [0, *cuts, len(COUNTS)]
    starts = np.concatenate([[0], np.cumsum(COUNTS)])

    def blocks() -> Iterable[TokenBlock]:
        for first, last in itertools.pairwise(edges):
            part = slice(starts[first], starts[last])
            yield TokenBlock(
                rows=np.arange(first, last),
                counts=np.array(COUNTS[first:last]),
                seen=np.zeros(last - first, dtype=bool),
                columns={k: np.array(v, dtype=np.float32)[part] for k, v in columns.items()},
            )

    return blocks


def kept(blocks: Any, rule: str, keep: float = 0.5, **options: Any) -> list[int]:
    config = SelectionConfig(rule, keep=keep, options=options)
    return np.flatnonzero(select(blocks, config).keep).tolist()


@pytest.mark.parametrize("cuts", [[], [1], [1, 2]])
class TestByHand:
    def test_stm(self, cuts: list[int]) -> None:
        # ln 2.5 = 0.916...
        nll = [0.0, 0.91, 0.92, 5.0, 0.5, 1.0, 0.9, 0.917]
        assert kept(pool({"base.nll": nll}, cuts), "stm") == [0, 1, 4, 6]
        # ln 2.6 = 0.9555
        assert kept(pool({"base.nll": nll}, cuts), "stm", max_perplexity=2.6) == [0, 1, 2, 4, 6, 7]

    def test_pmi(self, cuts: list[int]) -> None:
        given = [1.0, 1.0, 4.0, 0.0, 2.0, 2.0, 2.0, 9.0]
        alone = [1.5, 4.0, 1.5, 2.0, 2.0, 1.0, 2.1, 8.9]
        # differences 0.5, 3, 2.5, 2, 0, 1, 0.1, 0.1: the sign has no say
        assert kept(pool({"base.nll": given, "base.alone": alone}, cuts), "pmi") == [1, 2, 3, 5]

    def test_forgetting(self, cuts: list[int]) -> None:
        base = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
        blocks = pool({"base.nll": base, "reference.nll": [2.0] * 8}, cuts)
        selected = select(blocks, SelectionConfig("forgetting", keep=0.7))
        assert np.flatnonzero(selected.keep).tolist() == [0, 2, 4, 5, 7]  # int(8 * 0.7) = 5
        assert selected.cut == 1.0
        rule, stop = selected.rule, 0
        weights: list[float] = []
        for block in blocks():
            mask = selected.keep[stop : (stop := stop + block.size)]
            weights += rule.weights(block, mask).tolist()
        assert weights == [1, -1, 1, -1, 1, 1, -1, 1]

    def test_xtf_paper_names_every_failure(self, cuts: list[int]) -> None:
        columns = {
            # p_base > 0.95 is nll < 0.0513: tokens 1 and 7
            "base.nll": [1.0, 0.05, 0.06, 3.0, 0.2, 0.1, 2.0, 0.01],
            # half an interquartile range: quartiles of (1, 2, -9) are -4 and 1.5, fence -6.75; of
            # one token itself; of (0, 1, 1, -5) -1.25 and 1, fence -2.375
            "base.attention": [1.0, 2.0, -9.0, 0.0, 0.0, 1.0, 1.0, -5.0],
            # three levels; the middle one is the second lowest of three clusters
            "base.relevance": [0.9, 0.9, 0.5, 0.1, 0.5, 0.9, 0.1, 0.9],
        }
        options: Any = {"reasoning": "received", "classes": 3, "fence": 0.5}
        config = SelectionConfig("xtf_paper", options=options)
        blocks = pool(columns, cuts)
        selected = select(blocks, config)
        codes = np.concatenate([selected.rule.decide(block) for block in blocks()])
        # 1 reasoning, 2 novelty, 4 relevance, on top of 4
        assert codes.tolist() == [0, 6, 4 + 1 + 4, 0, 8, 0, 0, 4 + 1 + 2]
        assert selected.keep.tolist() == [c == 0 for c in codes]
        assert REASONS[4 + 1 + 4] == "XTF: reasoning importance + task relevance"
        assert selected.cut is None

    def test_xtf_code_has_limits(self, cuts: list[int]) -> None:
        columns = {
            # rows: 90 % quantiles of p; only the likeliest of each row can be above
            "base.nll": [0.01, 0.02, 0.03, 0.01, 3.0, 0.04, 0.001, 2.0],
            "base.relevance_hidden": [0.0, 0.9, 0.9, 0.0, 0.0, 0.1, 0.9, 0.9],
        }
        options = {"classes": 2, "limit": 0.5}
        codes = self._codes(pool(columns, cuts), options)
        # of row 0 int(1.5) = 1 token may fail in relevance, of row 1 none, of row 2 two; row 1's
        # only token is not above its own quantile
        assert codes == [4 + 2 + 4, 0, 0, 0, 8, 8, 6, 0]
        # a token by itself in its row is never above a quantile of it
        codes = self._codes(pool(columns, cuts), {"classes": 2, "limit": 0.0})
        assert codes == [6, 0, 0, 0, 0, 0, 6, 0]

    def _codes(self, blocks: Any, options: dict[str, Any]) -> list[int]:
        rule = select(blocks, SelectionConfig("xtf_code", options=options)).rule
        return np.concatenate([rule.decide(block) for block in blocks()]).tolist()

    def test_the_released_attention_axis_drops_nothing(self, cuts: list[int]) -> None:
        """1/T is the same number for every token of a sample, so nothing is below a fence."""
        columns = {"base.nll": [1.0] * 8, "base.attention_keys": [1 / 3] * 3 + [1.0] + [0.25] * 4}
        options = {"reasoning": "keys", "relevance": False}
        assert self._codes(pool(columns, cuts), options) == [0] * 8

    def test_means_by_position(self, cuts: list[int]) -> None:
        columns = {
            # half octaves: 0 | 1 | 2 | 3-4 | 5-6 | ...: bins of 2 log2(1 + position)
            "pool.position": [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 1.0, 20.0],
            "base.attention": [1.0, 3.0, 5.0, 0.0, 2.0, 4.0, math.nan, 7.0],
        }
        blocks = pool(columns, cuts)
        means = PositionMeans(blocks, "base.attention")
        found = np.concatenate([means.standardised(block) for block in blocks()])
        step = math.sqrt(1.5)  # 2 over the standard deviation of (1, 3, 5), sqrt(8/3)
        want = [-step, 0.0, step, -step, 0.0, step, math.nan, 0.0]
        np.testing.assert_allclose(found, want, atol=1e-12)


def test_fences_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, size=40)
    values = rng.standard_t(2, size=int(counts.sum()))
    values[rng.random(len(values)) < 0.1] = np.nan
    bounds = np.concatenate([[0], np.cumsum(counts)])
    want = []
    for start, stop in itertools.pairwise(bounds):
        known = sorted(v for v in values[start:stop] if v == v)

        def quantile(share: float, known: list[float] = known) -> float:
            place = share * (len(known) - 1)
            low = math.floor(place)
            high = min(low + 1, len(known) - 1)
            return known[low] + (place - low) * (known[high] - known[low])

        for v in values[start:stop]:
            fence = quantile(0.25) - 1.5 * (quantile(0.75) - quantile(0.25)) if known else 0.0
            want.append(v == v and v < fence)
    assert below_fence(values, bounds, 1.5).tolist() == want
    assert 0 < sum(want) < len(want)


def test_at_most_a_share_fails_and_it_is_the_worst() -> None:
    value = np.array([3.0, 1.0, 2.0, 1.0, 5.0, 0.0])
    fails = np.array([True, True, True, True, False, True])
    bounds = np.array([0, 4, 6])
    assert worst_of(fails, value, bounds, 0.5).tolist() == [False, True, False, True, False, True]
    assert worst_of(fails, value, bounds, 0.25).tolist() == [False, True] + [False] * 4
    assert not worst_of(fails, value, bounds, 0.2).any()


def test_clusters_are_the_best_cuts_of_all() -> None:
    """Multi-Otsu is the pair of cuts with the largest variance between the classes."""
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(m, 0.05, size=80) for m in (0.1, 0.4, 0.9)])
    values = values[: len(values) // 8 * 8]
    counts = [len(values) // 8] * 8

    def blocks() -> Iterable[TokenBlock]:
        yield TokenBlock(np.arange(8), np.array(counts), np.zeros(8, bool), {"base.x": values})

    clusters = Clusters(blocks, lambda b: b["base.x"], 3, "relevance")

    def between(cuts: Iterable[float]) -> float:
        classes = np.searchsorted(np.array(list(cuts)), values, side="right")
        return sum(
            (classes == c).mean() * (values[classes == c].mean() - values.mean()) ** 2
            for c in range(3)
            if (classes == c).any()
        )

    grid = np.linspace(values.min(), values.max(), 60)
    best = max(between(pair) for pair in itertools.combinations(grid, 2))
    assert between(clusters.cuts) >= 0.99 * best
    assert 0.2 < clusters.cuts[0] < 0.3 and 0.5 < clusters.cuts[1] < 0.8


def test_five_values_are_five_clusters() -> None:
    """What lies in the bin of a cut is not torn apart."""
    values = np.array([0.0, 0.1, 0.2, 0.55, 1.0])

    def blocks() -> Iterable[TokenBlock]:
        yield TokenBlock(np.arange(5), np.ones(5, dtype=int), np.zeros(5, bool), {"base.x": values})

    clusters = Clusters(blocks, lambda b: b["base.x"], 5, "relevance")
    assert clusters.of(values).tolist() == [0, 1, 2, 3, 4]


def test_too_few_values_to_cluster_are_refused() -> None:
    columns = {"base.nll": [1.0] * 8, "base.relevance": [0.1, 0.2] * 4}
    with pytest.raises(ValueError, match=r"takes 2 distinct values .* relevance: false"):
        select(pool(columns), SelectionConfig("xtf_paper", options={"reasoning": "none"}))


def test_needs_follow_the_options() -> None:
    assert XtfPaper().needs == (
        "base.nll", "base.attention", "pool.position", "base.relevance",
    )  # fmt: skip
    assert XtfPaper(reasoning="none", relevance=False).needs == ("base.nll",)
    released = make_rule("xtf_code", {"reasoning": "keys"}).needs
    assert released == ("base.nll", "base.attention_keys", "base.relevance_hidden")
    assert make_rule("xtf_code").needs == ("base.nll", "base.relevance_hidden")
    assert columns_needed(released, "base") == ["attention_keys", "relevance_hidden"]
    assert columns_needed(("base.nll",), "base") == []
    assert columns_needed(("base.nll",), "reference") is None


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("stm", {"perplexity": 2.0}, "the options of stm have no perplexity; they are max_perp"),
        ("full", {"a": 1}, "have no a; it has none"),
        ("stm", {"max_perplexity": "big"}, "max_perplexity = 'big' is not of type float"),
        ("stm", {"max_perplexity": True}, "max_perplexity = True is not of type float"),
        ("stm", {"max_perplexity": 0.5}, "keeps nothing"),
        ("xtf_paper", {"reasoning": "keys"}, "belongs to xtf_code"),
        ("xtf_paper", {"classes": 2}, "at least 3"),
        ("xtf_code", {"limit": 1.5}, "shares"),
        ("no_such_package.rule", {}, "add --trust_import no_such_package.rule"),
        ("tokenclean.loss", {}, "add --trust_import tokenclean.loss"),
        ("tokenclean.__main__", {}, "add --trust_import tokenclean.__main__"),
        ("tokenclean.selection.rules.no_such", {}, "add --trust_import"),
        ("../stm", {}, "no dotted name"),
    ],
)
def test_bad_options_are_refused(rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionConfig(rule, options=options)


WRONG = {
    "no_priority": ("@dataclass\nclass R(Rule):\n    pass", "has no method `priority`"),
    "misspelt": (
        "@dataclass\nclass R(Rule):\n    needs = ('refrence.nll',)",
        "refrence.nll; there",
    ),
    "plain": ("class R(Rule):\n    pass", "must be a dataclass"),
    "listed": ("@dataclass\nclass R(Rule):\n    a: list[str] = None", "none that a configuration"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_of_ones_own_are_told_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = WRONG[name]
    head = "from dataclasses import dataclass\nfrom tokenclean.selection.rule import Rule\n"
    (tmp_path / f"wrong_{name}").mkdir()
    (tmp_path / f"wrong_{name}" / "x.py").write_text(head + code)
    monkeypatch.syspath_prepend(tmp_path)
    options: Any = {"a": 1} if name == "listed" else {}
    with trusting(["--trust_import", f"wrong_{name}.x"]):  # a module may be trusted alone
        with pytest.raises(ValueError, match="--trust_import"):
            SelectionConfig(f"wrong_{name}.y", options=options)
        with pytest.raises(ValueError, match=message):
            select(pool({}), SelectionConfig(f"wrong_{name}.x", options=options))


def test_a_trusted_module_that_is_no_rule() -> None:
    with trusting(["--trust_import", "tokenclean"]):
        with pytest.raises(ValueError, match="there is no module tokenclean"):
            SelectionConfig("tokenclean.no_such_rule")
        with pytest.raises(ValueError, match="holds 0 classes derived from Rule"):
            SelectionConfig("tokenclean.loss")


def test_every_file_is_a_rule() -> None:
    names = names_in(PACKAGE)
    assert {"token_cleaning", "xtf_paper", "xtf_code", "stm", "pmi", "forgetting"} <= set(names)
    for name in names:
        rule = make(Rule, PACKAGE, name, None, "here")
        assert type(rule).__doc__ and all(code >= 4 for code in rule.reasons)
        assert all(n.split(".")[0] in ("base", "reference", "pool") for n in rule.needs)


def shown_in_the_readme() -> tuple[str, str]:
    """The Python file and the YAML of the README's example, without their indentation."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    start = readme.index("    # ours/middle.py")
    end = readme.index("A rule that decides by itself", start)
    lines = [line[4:] for line in readme[start:end].rstrip().splitlines()]
    assert len(lines) < 30
    text = "\n".join(lines)
    code, _, rest = text.partition("# middle.yaml")
    return code, rest.partition("tokenclean clean")[0]


def test_the_rule_of_the_readme_works_without_touching_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, configuration = shown_in_the_readme()
    arm = yaml.safe_load(configuration)["loop"]["arms"]["middle"]
    assert arm == {"schedule": "fixed_model", "rule": "ours.middle", "options": {"target": 2.0}}
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "middle.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="add --trust_import ours"):
        SelectionConfig("ours.middle")
    blocks = pool({"base.nll": [0.0, 1.0, 2.5, 3.0, 0.5, 9.0, 1.25, 4.0]})
    with trusting(["--trust_import", "ours"]):
        assert kept(blocks, "ours.middle") == [0, 1, 4, 6]
        assert kept(blocks, "ours.middle", **arm["options"]) == [1, 2, 3, 6]
