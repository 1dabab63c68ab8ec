"""Tables shared by content, and the noise of a pass."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_scoring import data_for, score

from tokenclean.models import BaseConfig, LoraSettings, Network
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.module import ScoringModule
from tokenclean.scoring.table import ScoreTable

MANIFEST: dict[str, Any] = {
    "pool": "p",
    "pool_folder": "here",
    "model": "m",
    "base": "name",
    "adapters": [],
    "trained_on": [],
    "weights_dtype": "float32",
    "precision": "32-true",
    "token_budget": 200,
    "versions": {"torch": "1"},
    "speed": {"merge": True},
}
ROWS = np.arange(4)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "scores"
    folder.mkdir(parents=True)
    (folder / "part-00000.arrow").write_bytes(b"numbers")
    (folder / "manifest.json").write_text('{"kind": "score table"}', encoding="utf-8")
    return folder


def test_what_was_put_is_taken(
    table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ScoreCache(tmp_path / "cache")
    taken = tmp_path / "other" / "scores"
    taken.parent.mkdir()
    assert not cache.has(MANIFEST, ROWS)
    cache.put(MANIFEST, ROWS, table)
    with caplog.at_level(logging.INFO, "tokenclean"):
        # where the pool lies and what the base is called do not matter
        same = {**MANIFEST, "pool_folder": "there", "base": "alias"}
        assert cache.has(same, ROWS)
        cache.take(same, ROWS, taken)
    assert "model m is not run" in caplog.text
    assert sorted(p.name for p in taken.iterdir()) == ["manifest.json", "part-00000.arrow"]
    # one copy on disk, and each name outlives the others
    assert (taken / "part-00000.arrow").stat().st_nlink == 3
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(table)
    assert (taken / "part-00000.arrow").read_bytes() == b"numbers"


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "q"},
        {"model": "m+adapter"},
        {"trained_on": ["row-1"]},
        {"weights_dtype": "bfloat16"},
        {"precision": "16-mixed"},
        {"token_budget": 201},
        {"versions": {"torch": "2"}},
        {"speed": {"merge": False}},
    ],
)
def test_another_origin_is_another_entry(
    changes: dict[str, Any], table: Path, tmp_path: Path
) -> None:
    cache = ScoreCache(tmp_path / "cache")
    cache.put(MANIFEST, ROWS, table)
    assert not cache.has({**MANIFEST, **changes}, ROWS)
    assert not cache.has(MANIFEST, ROWS[:3])
    assert cache.has(MANIFEST, ROWS)


def test_files_are_copied_where_links_cannot_be(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", no_links)
    cache = ScoreCache(tmp_path / "cache")
    cache.put(MANIFEST, ROWS, table)
    cache.take(MANIFEST, ROWS, tmp_path / "taken")
    assert (tmp_path / "taken" / "part-00000.arrow").read_bytes() == b"numbers"


# -- noise --------------------------------------------------------------------------------------


def adapted(model_folder: Path, folder: Path) -> str:
    network = Network.load(BaseConfig(str(model_folder)))
    network.add_adapter(LoraSettings(r=4))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_last_adapter(folder)
    return str(folder)


def test_noise_is_the_gap_to_a_float32_pass(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    adapter = adapted(model_folder, tmp_path / "adapter")
    exact = ScoringModule(BaseConfig(str(model_folder)), adapter)
    rounded = ScoringModule(BaseConfig(str(model_folder)), adapter)
    want = score(exact, data, tmp_path / "exact")
    got = score(rounded, data, tmp_path / "rounded", precision="bf16-mixed")
    assert exact.noise["samples"] == rounded.noise["samples"] == 4  # of 40: the least there is
    assert 0.0 < exact.noise["max"] < 2e-5
    # what the two tables differ by over all samples is what the probe saw on four of them
    gaps = np.abs(np.concatenate([got.nll[i] - want.nll[i] for i in range(40)]))
    assert gaps.max() > 1e-3
    assert np.quantile(gaps, 0.5) / 3 < rounded.noise["p50"] < 3 * np.quantile(gaps, 0.5)
    assert rounded.noise["p50"] < rounded.noise["p99"] <= rounded.noise["max"]
    stored = ScoreTable(tmp_path / "rounded").manifest["noise"]
    assert stored == rounded.noise


def test_a_noise_that_cannot_be_measured_loses_no_pass(
    model_folder: Path,
    pool_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unable(self: ScoringModule, losses: np.ndarray) -> dict[str, float]:
        raise RuntimeError("mixed dtype")

    monkeypatch.setattr(ScoringModule, "_measure_noise", unable)
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    table = score(ScoringModule(BaseConfig(str(model_folder))), data, tmp_path / "scores")
    assert len(table) == 40 and "noise" not in table.manifest
    assert "could not be measured: mixed dtype" in caplog.text


def test_the_configuration_is_part_of_the_model(model_folder: Path) -> None:
    network = Network.load(BaseConfig(str(model_folder)))
    before = network.config_hash()
    network.hf.config._name_or_path = "elsewhere"
    assert network.config_hash() == before
    network.hf.config.rms_norm_eps = 0.01
    assert network.config_hash() != before


def test_a_taken_table_says_where_its_own_pool_lies(table: Path, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    cache.put(MANIFEST, ROWS, table)
    cache.take({**MANIFEST, "pool_folder": "there"}, ROWS, tmp_path / "taken")
    assert '"pool_folder": "there"' in (tmp_path / "taken" / "manifest.json").read_text()
    assert "pool_folder" not in (table / "manifest.json").read_text()
