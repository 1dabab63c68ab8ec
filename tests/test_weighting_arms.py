"""Weightings through `clean` and `fit`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_loop import planted_file, run
from test_training import relative

from tokenclean import commands
from tokenclean.cleaning.arms import Arm
from tokenclean.training.weights import Tokens, make_weighting
from tokenclean.trust import trusting

ONLINE = {
    "full": {"schedule": "fixed_model", "rule": "full"},
    "rho1": {
        "schedule": "fixed_model",
        "rule": "full",
        "weighting": "rho1_online",
        "weighting_options": {"keep": 0.5},
    },
    "masked": {"schedule": "fixed_model", "weighting": "sstoken"},
    "rounds": {"schedule": "self_evolving", "rule": "full", "weighting": "dft"},
    "crossed": {"schedule": "cross_fitted", "rule": "full", "weighting": "rho1_online"},
    "warmup": {"schedule": "warmup"},
}


def known(arm: Path, column: str) -> np.ndarray:
    """Whether each response token of an arm's cleaned pool has a loss there."""
    rows = pq.read_table(arm / "cleaned" / "data.parquet").to_pylist()
    return np.array(
        [
            v is not None
            for r in rows
            for v, m in zip(r[column], r["response_mask"], strict=True)
            if m
        ]
    )


def test_arms_and_fits_take_weightings(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = planted_file(tmp_path)
    with caplog.at_level(logging.INFO, "tokenclean"):
        folder = run(tmp_path, model_folder, pool, "--data.subsets", "2", arms=ONLINE)
    assert "arm rho1: schedule fixed_model, rule full, weighting rho1_online (keep 0.5)" in (
        caplog.messages
    )
    # the columns that the weights need are there, and no others are computed for them
    for arm, base, reference in (("rho1", False, True), ("masked", True, True)):
        assert known(folder / "arms" / arm, "base_nll").all() == base
        assert known(folder / "arms" / arm, "reference_nll").all() == reference
    assert known(folder / "arms" / "crossed", "reference_nll").all()
    assert not known(folder / "arms" / "full", "reference_nll").any()
    weights = {
        arm: load_file(folder / "arms" / arm / "adapter" / "adapter_model.safetensors")
        for arm in ONLINE
    }
    for arm in ("rho1", "crossed", "masked"):
        assert relative(weights[arm], weights["full"]) > 1e-3
    # what arms share is trained without weights
    plain = {name: ONLINE[name] for name in ("full", "warmup")} | {
        "rounds": {"schedule": "self_evolving", "rule": "full"}
    }
    (tmp_path / "plain").mkdir()
    other = run(tmp_path / "plain", model_folder, pool, "--data.subsets", "2", arms=plain) / "arms"
    for arm, equal in (("warmup", True), ("full", True), ("rounds", False)):
        found = load_file(other / arm / "adapter" / "adapter_model.safetensors")
        assert (relative(weights[arm], found) == 0.0) == equal

    def fit_on(path: Path, name: str) -> Path:
        commands.fit(
            [
                *("--model.base.name", str(model_folder), "--data.path", str(path)),
                *("--model.weighting", "rho1_online", "--model.weighting_options", '{"keep": 0.5}'),
                *("--data.cache_dir", str(tmp_path / "cache"), "--outputs", str(tmp_path)),
                *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
                *("--name", name),
            ]
        )
        return tmp_path / name

    summary = json.loads((fit_on(folder / "arms" / "rho1", "fit") / "summary.json").read_text())
    assert summary["train/weight_zero_share"] == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match=r"model\.weighting: .* is no cleaned pool"):
        fit_on(pool, "raw")


def test_arms_with_contradictory_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    for arm, message in (
        ({"schedule": "warmup", "weighting": "dft"}, "all arms share the warm-up"),
        ({"schedule": "fixed_model", "weighting": "dtf"}, "loop.arms: weighting: 'dtf' is not"),
        (
            {"schedule": "fixed_model", "weighting_options": {"keep": 0.5}},
            "loop.arms: weighting_options: there is no weighting",
        ),
        (
            {"schedule": "self_evolving", "weighting": "rho1_online"},
            "a self-evolving round starts from its reference",
        ),
        (
            {"schedule": "fixed_model", "rule": "forgetting", "weighting": "dft"},
            "forgetting has negative weights",
        ),
        (
            {"schedule": "cross_fitted", "rule": "full", "weighting": "sstoken"},
            "asks no reference, so there is nothing to cross-fit",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Arm(**arm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.weighting: `clean` trains warm-up"):
        run(
            tmp_path, model_folder, planted_file(tmp_path), "--model.weighting", "dft",
            arms={"full": ONLINE["full"]},
        )  # fmt: skip
    with pytest.raises(ValueError, match="talr looks at the whole batch"):
        run(
            tmp_path, model_folder, planted_file(tmp_path), "--model.backward", "kept_tokens",
            arms={"talr": {"schedule": "fixed_model", "rule": "full", "weighting": "talr"}},
        )  # fmt: skip


def test_the_estimate_counts_a_whole_step_in_memory(model_folder: Path, tmp_path: Path) -> None:
    """A weighting over the global batch holds eight samples at once, others two or so."""
    arms = {
        name: {"schedule": "fixed_model", "rule": "full", "weighting": name}
        for name in ("dft", "talr")
    }
    words = [
        *("--model.base.name", str(model_folder), "--data.path", str(planted_file(tmp_path))),
        *("--data.batch_size", "8", "--data.token_budget", "60", "--trainer.max_epochs", "1"),
        *("--data.cache_dir", str(tmp_path / "cache"), "--outputs", str(tmp_path)),
        *("--loop.arms", json.dumps(arms), "--trainer.accelerator", "cpu"),
    ]

    def peaks(*options: str) -> dict[str, int]:
        costs = commands.clean_costs([*words, *options])
        return {c.arm: c.peak_memory for c in costs if c.stage == "train" and c.arm in arms}

    found, micro = peaks(), peaks("--model.weighting_scope", "micro")
    own = micro["dft"]
    assert found["talr"] > found["dft"] + 1_000_000  # the process's own memory is in both
    assert abs(micro["talr"] - own) < 1_000_000


def test_the_weighting_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    start = readme.index("    @dataclass(frozen=True)\n    class Sure")
    block = readme[start : readme.index("\n## ", start)]
    code = "\n".join(line[4:] for line in block.splitlines() if line[:1] in ("", " "))
    imports = (
        "from dataclasses import dataclass\nfrom torch import Tensor\n"
        "from tokenclean.training.weights import Tokens, Weighting\n"
    )
    (tmp_path / "of_readme").mkdir()
    (tmp_path / "of_readme" / "sure.py").write_text(imports + code)
    monkeypatch.syspath_prepend(tmp_path)
    with trusting(["--trust_import", "of_readme"]):
        made = make_weighting("of_readme.sure", {"p": 0.25})
    nll = torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64)  # p = 1, 0.37, 0.22
    assert made.weights(Tokens(torch.zeros(3), nll)).tolist() == [1.0, 1.0, 0.0]
