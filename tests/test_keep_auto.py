"""Probes, `keep: auto` through the verbs, gradient alignment, and the study's report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import conversation, llama_nll_float64, write_jsonl
from test_loop import run
from test_scoring import data_for
from test_study_tables import mask, write_run

from tokenclean import commands
from tokenclean.cleaning.alignment import BLOCKS, DECILES, _gradients, _table
from tokenclean.cleaning.apply import ScoredRows, with_share
from tokenclean.cleaning.arms import halves
from tokenclean.data.batches import collate
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, LoraSettings, Network, load_tokenizer
from tokenclean.noise_verb import loop_of, noise
from tokenclean.publish import MANIFEST, write_json
from tokenclean.scoring.probe import Probe, contrast, sentence_ends, share, write_probe
from tokenclean.selection.noise import MIN_SAMPLES, PARTNERS
from tokenclean.selection.select import SelectionConfig
from tokenclean.study.noise import intervals_of, noise_tables
from tokenclean.study.tables import Cell


def sentences_file(folder: Path, samples: int = 90) -> Path:
    """Two sentences each and, every ninth, a second turn; the second sentence is planted noise."""
    rows = []
    for i in range(samples):
        answer = f"It is {i}. And so on."
        spans = [[1, answer.index("And"), len(answer), 0]]
        row = conversation(f"Say {i}.", answer, id=f"s{i}", source="ab"[i % 2], truth=spans)
        if i % 9 == 0:
            row["messages"] += conversation("Again.", "No.")["messages"]
        rows.append(row)
    return write_jsonl(folder / "sentences.jsonl", rows)


# -- the probe ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> TuluDataModule:
    folder = tmp_path_factory.mktemp("probe")
    return data_for(model_folder, sentences_file(folder, 40), folder / "cache")


@pytest.fixture(scope="module")
def ends(model_folder: Path) -> np.ndarray:
    return sentence_ends(load_tokenizer(BaseConfig(str(model_folder))))


@pytest.fixture(scope="module")
def probe(
    tmp_path_factory: pytest.TempPathFactory,
    data: TuluDataModule,
    model_folder: Path,
    ends: np.ndarray,
) -> Probe:
    network = Network.load(BaseConfig(str(model_folder)))
    folder = tmp_path_factory.mktemp("base") / "probe"
    return write_probe(folder, network, data.pool, np.arange(3, 38), ends, 200, {"s5"}, seed=7)


def first_response(data: TuluDataModule, row: int) -> tuple[np.ndarray, int, int]:
    """Tokens of a row, and where its first response begins and ends, read off the mask."""
    mask = data.pool.response_mask[row].astype(bool).tolist()
    start = mask.index(True)
    stop = mask.index(False, start) if False in mask[start:] else len(mask)
    return data.pool.input_ids[row], start, stop


def test_which_tokens_end_a_sentence(model_folder: Path, ends: np.ndarray) -> None:
    tokenizer = load_tokenizer(BaseConfig(str(model_folder)))
    of = {text: ends[tokenizer.encode(text, add_special_tokens=False)[-1]] for text in ".!?\n,a1"}
    assert of == {".": True, "!": True, "?": True, "\n": True, ",": False, "a": False, "1": False}


def test_losses_are_those_of_the_swapped_text(
    probe: Probe, data: TuluDataModule, model_folder: Path
) -> None:
    """Each against a float64 computation of prompt and response put together here."""
    hf = Network.load(BaseConfig(str(model_folder))).hf
    starts = np.cumsum(probe.counts) - probe.counts
    controls = np.cumsum(probe.controls) - probe.controls
    for number in (0, 6, 17, 34):
        ids, start, stop = first_response(data, int(probe.rows[number]))
        at = slice(starts[number], starts[number] + stop - start)
        assert probe.counts[number] == stop - start
        want = llama_nll_float64(hf, ids[:stop].tolist())
        assert probe.own[at] == pytest.approx(want[start - 1 :].numpy(), abs=1e-4)
        own = probe.control[controls[number] : controls[number] + start - 1]
        assert own == pytest.approx(want[: start - 1].numpy(), abs=1e-4)
        for k in (0, PARTNERS - 1):
            other, length, _ = first_response(data, int(probe.partners[number, k]))
            swapped = np.concatenate([other[:length], ids[start:stop]])
            want = llama_nll_float64(hf, swapped.tolist())[length - 1 :]
            assert probe.others[k, at] == pytest.approx(want.numpy(), abs=1e-4)


def test_partners_are_others_and_serve_equally(probe: Probe) -> None:
    assert probe.rows.tolist() == list(range(3, 38))
    assert not (probe.partners == probe.rows[:, None]).any()
    assert all(len(set(row)) == PARTNERS for row in probe.partners.tolist())
    served = np.bincount(probe.partners.ravel(), minlength=40)
    assert served[3:38].tolist() == [PARTNERS] * 35


def test_the_gap_is_zero_exactly_where_the_token_is_the_most_likely(
    probe: Probe, data: TuluDataModule, model_folder: Path
) -> None:
    hf = Network.load(BaseConfig(str(model_folder))).hf
    ids, start, stop = first_response(data, int(probe.rows[0]))
    with torch.no_grad():
        logits = hf(torch.as_tensor(ids[None, :stop].astype(np.int64))).logits[0].double()
    logs = logits.log_softmax(-1)[start - 1 : stop - 1]
    chosen = torch.as_tensor(ids[start:stop].astype(np.int64))
    want = logs.max(-1).values - logs[torch.arange(stop - start), chosen]
    assert probe.gap[: stop - start] == pytest.approx(want.numpy(), abs=1e-4)


def test_sentences_and_what_the_reference_has_seen(probe: Probe, data: TuluDataModule) -> None:
    """Two sentences each; the mark at the end belongs to the last. s5 and who met its prompt go."""
    clean = Probe(**{**vars(probe), "manifest": {**probe.manifest, "trained_on": []}})
    found, rows = contrast(probe, clean, data.pool)
    assert rows.tolist() == probe.rows.tolist()
    assert found.sentence.max() + 1 == 2 * 35
    assert np.bincount(found.sample).tolist() == probe.counts.tolist()
    many = Probe(**{**vars(probe), "manifest": {**probe.manifest, "trained_on": ["s0", "s39"]}})
    assert len(np.unique(contrast(probe, many, data.pool)[0].sample)) == 35
    with pytest.raises(ValueError, match=r"trained on too many .*\(27 of 35 are left\).*--data"):
        contrast(clean, probe, data.pool)
    other = Probe(**{**vars(probe), "rows": probe.rows + 1})
    with pytest.raises(ValueError, match="probes of the same rows"):
        contrast(probe, other, data.pool)


def test_few_rows_make_an_empty_probe(
    tmp_path: Path, data: TuluDataModule, model_folder: Path, ends: np.ndarray
) -> None:
    network = Network.load(BaseConfig(str(model_folder)))
    rows = np.arange(MIN_SAMPLES - 1)
    empty = write_probe(tmp_path / "probe", network, data.pool, rows, ends, 200, set(), seed=0)
    assert empty.rows.shape == (0,) and empty.others.shape == (PARTNERS, 0)
    found = share([(empty, empty)], data.pool)
    assert (found.keep, found.whole.samples, found.sources) == (1.0, 0, {})


def test_no_signal_keeps_everything_and_says_so(
    probe: Probe, data: TuluDataModule, caplog: pytest.LogCaptureFixture
) -> None:
    """A reference equal to its base has learnt nothing."""
    clean = Probe(**{**vars(probe), "manifest": {**probe.manifest, "trained_on": []}})
    scored = ScoredRows(data.pool, np.arange(40), None, None, 1, (clean, clean))
    with caplog.at_level(logging.WARNING, logger="tokenclean"):
        config, found = with_share(scored, SelectionConfig(keep="auto"))
    assert config.keep == 1.0
    assert found is not None and found["gain"] == 0.0 and not found["signal"]
    assert "no signal, so every token is kept" in caplog.text


# -- verbs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    data = sentences_file(folder)
    arms = {
        "full": {"schedule": "fixed_model", "rule": "full"},
        "fixed": {"schedule": "fixed_model"},
        "cross_fitted": {"schedule": "cross_fitted"},
        "self_evolving": {"schedule": "self_evolving"},
        "half": {"schedule": "cross_fitted", "keep": 0.5},
        # reads no base, so it has no score
        "gap": {
            "schedule": "fixed_model",
            "rule": "contradiction",
            "options": {"max_gap": 3.0},
        },
    }
    options = ["--selection.keep", "auto", "--data.validation_path", str(data)]
    return run(folder, model_folder, data, *options, "--data.subsets", "2", arms=arms)


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cleaned" / MANIFEST).read_text())
    return found


def test_what_was_kept_is_what_was_estimated(finished: Path) -> None:
    arms = finished / "arms"
    steps = {
        "fixed": [arms / "fixed"],
        "cross_fitted": [arms / "cross_fitted" / f"half_{h}" for h in (1, 2)],
        "self_evolving": [arms / "self_evolving" / "round_1"],
    }
    for arm, folders in steps.items():
        for folder in folders:
            manifest = manifest_of(folder)
            found = manifest["share"]
            assert found["keep"] == (found["upper"] if found["signal"] else 1.0)
            assert manifest["selection"]["keep"] == found["keep"]
            assert manifest["kept_tokens"] == int(manifest["ranked_tokens"] * found["keep"])
            assert found["samples"] <= 90 and set(found["sources"]) == {"a", "b"}
        assert manifest_of(arms / arm)["share"]["samples"] == sum(
            manifest_of(f)["share"]["samples"] for f in folders
        )
    assert manifest_of(arms / "full")["share"] is None
    assert manifest_of(arms / "half")["kept_tokens"] == sum(
        int(h["ranked_tokens"] * 0.5) for h in manifest_of(arms / "half")["halves"]
    )


def test_probes_are_of_rows_that_their_reference_has_not_seen(finished: Path) -> None:
    parts = loop_of(finished).data
    parts.prepare_data()
    parts.setup()
    split = halves(parts.subset_rows())
    for number, rows in enumerate(split, start=1):
        probe = Probe.read(finished / "scores" / f"half_{number}_probe" / "reference")
        assert probe.rows.tolist() == rows.tolist()
    fixed = Probe.read(finished / "scores" / "warmup_probe" / "reference")
    seen = parts.pool.ids.among(set(fixed.manifest["trained_on"]))
    assert seen.sum() == 45 and not seen[fixed.rows].any()


def test_noise_prints_every_arm_and_probes_what_was_not_estimated(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise([str(finished), "--alignment"])
    text = capsys.readouterr().out
    for arm in ("fixed", "cross_fitted", "self_evolving", "half", "gap"):
        for source in ("all", "a", "b"):
            assert f"| {arm} | {source} |" in text
    assert "| full |" not in text
    assert text.count("Gradient of 10 parts") == 4
    log = (finished / "log.txt").read_text()
    assert "full: left out: it asks no reference" in log
    assert "gap: no alignment: its rows have no scores" in log
    found = json.loads((finished / "noise.json").read_text())
    assert found["gap"]["share"] == found["fixed"]["share"]
    assert "alignment" not in found["gap"]
    assert all(0.0 < values["keep"] <= 1.0 for values in found.values())
    # the same halves and models, estimated afterwards
    assert found["half"]["share"] == found["cross_fitted"]["share"]
    assert found["half"]["keep"] == pytest.approx(0.5, abs=0.01)
    assert [row["part"] for row in found["half"]["alignment"]] == list(range(1, 11))


def test_select_with_auto(tmp_path: Path, finished: Path, model_folder: Path) -> None:
    data = sentences_file(tmp_path)
    place = ["--outputs", str(tmp_path)]

    def score(name: str, *options: str) -> None:
        commands.score(
            [
                *("--model.base.name", str(model_folder), "--data.path", str(data)),
                *("--data.max_length", "128", "--data.cache_dir", str(tmp_path / "cache")),
                *("--data.subsets", "2", "--data.subset", "1", "--trainer.accelerator", "cpu"),
                *("--trainer.enable_progress_bar", "false", "--name", name, *place, *options),
            ]
        )

    adapter = str(finished / "warmup" / "adapter")
    score("base", "--probe", "true")
    score("plain", "--model.adapters", adapter)
    score("reference", "--model.adapters", adapter, "--probe", "true")
    select = ["--base", str(tmp_path / "base"), "--selection.keep", "auto", *place]
    with pytest.raises(ValueError, match=r"probe of --reference, and .*plain has none.*--probe"):
        commands.select([*select, "--reference", str(tmp_path / "plain"), "--name", "a"])
    reference = ["--reference", str(tmp_path / "reference")]
    commands.select([*select, *reference, "--name", "selected"])
    manifest = manifest_of(tmp_path / "selected")
    assert manifest["share"]["samples"] == 45
    assert manifest["kept_tokens"] == int(manifest["ranked_tokens"] * manifest["share"]["keep"])
    noise([str(tmp_path / "selected")])
    commands.select([*select, *reference, "--selection.keep", "0.5", "--name", "number"])
    with pytest.raises(ValueError, match=r"select with --selection.keep auto"):
        noise([str(tmp_path / "number")])
    with pytest.raises(ValueError, match="is no run"):
        noise([str(tmp_path)])


def test_another_whole_model_as_reference_is_refused(
    tmp_path: Path, model_folder: Path, finished: Path
) -> None:
    data = sentences_file(tmp_path)
    options = ["--selection.keep", "auto", "--loop.reference", str(model_folder)]
    with pytest.raises(
        ValueError, match=r"loop.reference names another model.*give the arm fixed a number"
    ):
        run(tmp_path, model_folder, data, *options, arms={"fixed": {"schedule": "fixed_model"}})


# -- gradient alignment ---------------------------------------------------------------------------


def test_gradients_of_parts_are_those_of_their_tokens(
    model_folder: Path, data: TuluDataModule
) -> None:
    """A step of LoRA's B along a part's gradient changes its tokens' losses as it says."""
    network = Network.load(BaseConfig(str(model_folder)))
    torch.manual_seed(0)
    network.add_adapter(LoraSettings(r=4, alpha=8, dropout=0.0))
    network.eval()
    rows = TokenRows(data.pool, np.arange(6))
    batch = collate([rows[i] for i in range(6)], network.layout)
    part = np.arange(len(batch.targets)) % 3
    found = _gradients(network, batch, part)
    assert found.shape[0] == DECILES and not found[3:].any()
    weights = [p for n, p in network.named_parameters() if p.requires_grad and "lora_B" in n]
    assert found.shape[1] == sum(p.numel() for p in weights)
    direction = found[1] / found[1].norm()
    step = 2e-2
    losses = []
    for sign in (1, -1):
        start = 0
        for weight in weights:
            change = direction[start : start + weight.numel()].view_as(weight)
            weight.data = sign * step * change
            start += weight.numel()
        with torch.no_grad():
            losses.append(network(batch))
    moved = ((losses[0] - losses[1]) / (2 * step)).numpy()
    for k in range(3):
        want = float(found[k] @ direction)
        assert moved[part == k].sum() == pytest.approx(want, rel=0.02, abs=0.02)


def test_alignment_table_by_hand() -> None:
    """Two tokens per block and part; part 1 points along the target, part 2 against it."""
    inner = np.zeros((BLOCKS, DECILES))
    inner[:, 0], inner[:, 1] = 4.0, -4.0
    inner[:, 2] = [10.0, -8.0] * 5
    total = torch.zeros(DECILES, 2)
    total[0], total[1] = torch.tensor([20.0, 0.0]), torch.tensor([-20.0, 0.0])
    total[2] = torch.tensor([5.0, 5.0])
    tokens = np.full((BLOCKS, DECILES), 2.0)
    rows = _table(inner, tokens, total, torch.tensor([2.0, 0.0]), np.arange(DECILES + 1.0))
    assert [(r["inner"], r["error"], r["helps"]) for r in rows[:2]] == [
        (2.0, 0.0, True),
        (-2.0, 0.0, False),
    ]
    # mean 10 / 20; blocks lie 9 from their share of it, and sqrt(10 * 81 * 10 / 9) / 20 = 1.5
    assert rows[2]["inner"] == pytest.approx(0.5)
    assert rows[2]["error"] == pytest.approx(1.5)
    assert not rows[2]["helps"]
    assert [r["cosine"] for r in rows[:3]] == pytest.approx([1.0, -1.0, 10 / (50**0.5 * 2)])


# -- the study's report ---------------------------------------------------------------------------


def estimated(lower: float, upper: float, signal: bool = True) -> dict[str, Any]:
    others = {"sign_symmetry": 0.1, "control_tail": 0.2, "positive": 0.5}
    return {"lower": lower, "upper": upper, "signal": signal, **others}


def cell_of(folder: Path, variant: str, whole: dict[str, Any], family: dict[str, Any]) -> Cell:
    """A run of one arm: 60 of 100 tokens informative, 12 of 40 in the family."""
    right = {"capital": [1]}
    masks = {"arm": {"all": mask(100, 80, 60, 50), "capital": mask(40, 30, 12, 10)}}
    write_run(folder, {"base": right, "arm": right}, masks)
    (folder / "arms" / "arm" / "cleaned").mkdir()
    share = {**whole, "sources": {"capital": family}}
    write_json(
        folder / "arms" / "arm" / "cleaned" / MANIFEST, {"kind": "cleaned pool", "share": share}
    )
    return Cell(variant, 0, folder)


def test_report_counts_truths_inside(tmp_path: Path) -> None:
    cells = [
        cell_of(tmp_path / "0", "main", estimated(0.5, 0.7), estimated(0.35, 0.5)),
        cell_of(tmp_path / "1", "edge", estimated(0.603, 0.8), estimated(0.0, 0.3)),
        cell_of(tmp_path / "2", "out", estimated(0.61, 0.9), estimated(0, 1, signal=False)),
    ]
    assert intervals_of(cells[0])["arm"]["capital"].truth == pytest.approx(0.3)
    settings, coverage = noise_tables(cells, "base", tmp_path)
    assert [(row[0], row[3], row[6]) for row in settings.rows] == [
        ("main", "1 of 1", "1 of 1"),
        ("edge", "1 of 1", "1 of 1"),
        ("out", "1 of 1", "0 of 1"),
    ]
    whole, known = coverage.rows
    assert whole[1:] == [3, 3, 2, 66.7, 0.2]
    assert known[0] == "single families, known"
    assert known[1:] == [3, 2, 1, 50.0, 0.225]
    assert noise_tables([], "base", tmp_path)[0].rows == []
