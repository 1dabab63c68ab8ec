"""Rules through `clean`: what is asked of the base, what lies on the disk, and one from outside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import llama_nll_float64
from skimage.filters import threshold_multiotsu
from test_loop import planted_file, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean import cli
from tokenclean.data.cleaned import DATA
from tokenclean.publish import MANIFEST
from tokenclean.scoring.table import ScoreTable

WORDS = ["say", "number"]
#: A random model finds nothing likely, and its attention is even: thresholds that split its tokens.
XTF = {"min_novelty": 0.99, "fence": 0.25, "classes": 4}
ARMS: dict[str, dict[str, Any]] = {
    "xtf": {"schedule": "fixed_model", "rule": "xtf_paper", "options": XTF},
    "pmi": {"schedule": "fixed_model", "rule": "pmi", "keep": 0.5},
    "forgetting": {"schedule": "fixed_model", "rule": "forgetting", "keep": 0.7},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    words = ["--attributes.experts", json.dumps(WORDS), "--attributes.layer", "1"]
    return run(folder, model_folder, planted_file(folder), *words, arms=ARMS)


def rows_of(arm: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(arm / "cleaned" / DATA).to_pylist()
    return rows


def responses(row: dict[str, Any], column: str) -> list[Any]:
    return [v for v, m in zip(row[column], row["response_mask"], strict=True) if m]


def test_the_base_is_asked_for_what_the_arms_read_and_once(finished: Path) -> None:
    table = ScoreTable(finished / "scores" / "base")
    assert table.manifest["columns"] == ["alone", "attention", "relevance"]
    assert "columns" not in ScoreTable(finished / "scores" / "warmup").manifest
    costs = json.loads((finished / "costs.json").read_text())["rows"]
    shared = [r for r in costs if (r["arm"], r["round"], r["stage"]) == ("shared", None, "score")]
    assert [r["samples"] for r in shared] == [86]  # the pool under base and warm-up


def test_xtf_from_full_logits_and_full_attention_maps(finished: Path, model_folder: Path) -> None:
    """Every reason again in float64, from the weights alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    rows = rows_of(finished / "arms" / "xtf")
    embedding = model.get_input_embeddings().weight.detach().double()
    words = [w for word in WORDS for w in (word, f" {word}")]
    ids = [i for w in words for i in tokenizer(w, add_special_tokens=False)["input_ids"]]
    ids = [i for i in ids if tokenizer.decode([i]).strip()]  # a space by itself is no word
    distance = (embedding - embedding[ids].mean(0)).norm(dim=-1)
    nearness = (1 - distance / distance.max()).numpy()

    nll, received, position, relevance = [], [], [], []
    for row in rows:
        found: dict[str, Any] = {}
        losses = llama_nll_float64(model, row["input_ids"], found=found).numpy()
        at = np.flatnonzero(row["response_mask"])
        maps = found["attention"][1]  # (heads, T, T): the layer that was asked for
        maps = maps[:, 1 : at[-1], 1:]  # up to what predicts the last target, without the sink
        maps = torch.nn.functional.pad(maps / maps.sum(-1, keepdim=True), (1, 0, 1, 0)).mean(0)
        own = [float(maps[j + 1 :, j].mean()) if j + 1 < len(maps) else np.nan for j in at]
        nll.append(losses[at - 1])
        received.append(np.array(own))
        position.append(at)
        relevance.append(nearness[np.array(row["input_ids"])[at]])
    bins = [np.floor(2 * np.log2(1 + at)).astype(int) for at in position]
    every, of = np.concatenate(received), np.concatenate(bins)
    for number, own_bins in enumerate(bins):
        for place, b in enumerate(own_bins):
            members = every[(of == b) & ~np.isnan(every)]
            if len(members) and members.std() > 1e-9 * abs(members.mean()):
                gap = received[number][place] - members.mean()
                received[number][place] = gap / members.std()
            elif not np.isnan(received[number][place]):
                received[number][place] = 0.0
    flat = np.concatenate(relevance)
    # middles of bins that belong to the class below
    cuts = threshold_multiotsu(flat, classes=4, nbins=128) + (flat.max() - flat.min()) / 256

    checked: Counter[int] = Counter()
    for number, row in enumerate(rows):
        low, high = np.nanquantile(received[number], [0.25, 0.75])
        fence = low - 0.25 * (high - low)
        p = np.exp(-nll[number])
        for place, code in enumerate(responses(row, "reason")):
            value = received[number][place]
            # what float32 may decide otherwise is left out; it is rare
            if min(abs(value - fence), abs(p[place] - 0.01)) < 1e-5:
                continue
            bits = 1 * (value < fence) + 2 * (1 - p[place] < 0.99)
            near = relevance[number][place]
            bits += 4 * bool(cuts[0] <= near < cuts[1])
            assert code == (4 + bits if bits else 0)
            checked[code] += 1
    assert set(checked) >= {0, 5, 6, 8, 9} and checked.total() > 0.95 * len(flat)


def test_reasons_are_counted_by_source(finished: Path) -> None:
    arm = finished / "arms" / "xtf"
    want: dict[str, Counter[str]] = {}
    for row in rows_of(arm):
        want.setdefault(row["source"], Counter()).update(
            str(code) for code in responses(row, "reason")
        )
    manifest = json.loads((arm / "cleaned" / MANIFEST).read_text())
    assert manifest["tokens_by_reason"] == want
    assert manifest["reasons"]["9"] == "XTF: reasoning importance + task relevance"
    log = (finished / "log.txt").read_text()
    assert "| source | kept | XTF: reasoning importance |" in log


def test_pmi_from_full_logits_with_and_without_the_prompt(
    finished: Path, model_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    start = AutoTokenizer.from_pretrained(model_folder).bos_token_id
    rows, found = rows_of(finished / "arms" / "pmi"), []
    for row in rows:
        at = np.flatnonzero(row["response_mask"])
        own = np.array(row["input_ids"])[at]
        given = llama_nll_float64(model, row["input_ids"])[torch.from_numpy(at - 1)]
        alone = llama_nll_float64(model, [start, *own])
        want = (given - alone).abs().numpy()
        np.testing.assert_allclose(responses(row, "priority"), want, atol=5e-5)
        found += [(v, r == 0) for v, r in zip(want, responses(row, "reason"), strict=True)]
    kept = sorted((v for v, is_kept in found if is_kept), reverse=True)
    dropped = max(v for v, is_kept in found if not is_kept)
    assert len(kept) == int(len(found) * 0.5) and kept[-1] > dropped - 1e-4


def test_what_is_to_be_forgotten_keeps_its_label(finished: Path) -> None:
    tokens = 0
    for row in rows_of(finished / "arms" / "forgetting"):
        assert responses(row, "labels") == responses(row, "input_ids")
        signs = [1.0 if r == 0 else -1.0 for r in responses(row, "reason")]
        assert responses(row, "weight") == signs
        tokens += len(signs)
    result = json.loads((finished / "arms" / "forgetting" / "result.json").read_text())
    assert result["kept_share"] == int(tokens * 0.7) / tokens
    assert result["mask"]["all"]["kept"] == int(tokens * 0.7)


OURS = '''
"""Keep the first tokens of every response."""

from dataclasses import dataclass

import numpy as np

from tokenclean.selection.rule import BELOW_CUT, KEPT, Rule, TokenBlock


@dataclass
class First(Rule):
    """Keep the first tokens of every response."""

    tokens: int = 2

    ranked = False

    def decide(self, block: TokenBlock) -> np.ndarray:
        place = np.concatenate([np.arange(count) for count in block.counts])
        return np.where(place < self.tokens, KEPT, BELOW_CUT).astype(np.int8)
'''


def test_a_rule_is_one_file_and_one_yaml(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line, from a folder that the package does not know."""
    (tmp_path / "own_rules").mkdir()
    (tmp_path / "own_rules" / "first.py").write_text(OURS)
    monkeypatch.syspath_prepend(tmp_path)
    arm = {"schedule": "fixed_model", "rule": "own_rules.first", "options": {"tokens": 3}}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"loop": {"arms": {"first": arm}}}))
    data = planted_file(tmp_path)
    cli.main(
        [
            *("clean", "-c", str(tmp_path / "first.yaml"), "--model.base.name", str(model_folder)),
            *("--trust_import", "own_rules"),
            *("--data.path", str(data), "--data.cache_dir", str(tmp_path / "cache")),
            *("--outputs", str(tmp_path), "--name", "run"),
            *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        ]
    )
    for row in rows_of(tmp_path / "run" / "arms" / "first"):
        reasons = responses(row, "reason")
        assert reasons == [0, 0, 0] + [2] * (len(reasons) - 3)
    assert not (tmp_path / "run" / "scores").exists()


@pytest.mark.parametrize(
    ("arm", "options", "message"),
    [
        ({"rule": "forgetting"}, ["--data.reduction", "published"], "published does not go"),
        (
            {"rule": "xtf_paper"},
            ["--attributes.layer", "9", "--attributes.experts", "maths"],
            r"attributes\.layer: there is no layer 9",
        ),
        (
            {"rule": "full", "weighting": "sstoken", "weighting_options": {"layer": 9}},
            [],
            r"loop\.arms\.a\.weighting_options: layer: there is no layer 9",
        ),
        ({"rule": "xtf_paper"}, [], r"attributes\.experts: the column relevance"),
        ({"rule": "full"}, ["--data.targets", "prompt"], "is for `score` alone"),
    ],
)
def test_contradictions_are_found_before_anything_is_computed(
    arm: dict[str, Any], options: list[str], message: str, model_folder: Path, tmp_path: Path
) -> None:
    arms = {"a": {"schedule": "fixed_model", **arm}}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model_folder, planted_file(tmp_path), *options, arms=arms)
    assert not (tmp_path / "run" / "base").exists()
    assert not (tmp_path / "run" / "warmup").exists()


def test_a_rule_that_keeps_nothing_says_so_again(model_folder: Path, tmp_path: Path) -> None:
    arms = {"stm": {"schedule": "fixed_model", "rule": "stm", "options": {"max_perplexity": 1.0}}}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the rule stm keeps none of the .*; loosen its opt"):
            run(tmp_path, model_folder, planted_file(tmp_path), arms=arms)
