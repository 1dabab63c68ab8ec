"""The TensorBoard files of a run, read back with TensorBoard's own readers."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import yaml
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from tokenclean.data.cleaned import cleaned_schema, write_cleaned_pool
from tokenclean.finished import FinishedRun
from tokenclean.report.board import HPARAMS, METRICS, hparams, write_board

REASONS = {"0": "kept", "1": "prompt", "2": "below the cut"}


def write_pool(folder: Path, rows: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Rows of ``round``, ``base``, ``reference`` and ``kept``; the first token is a prompt."""
    lists: dict[str, list[Any]] = {
        "input_ids": [list(range(5, 5 + len(row["base"]))) for row in rows],
        "labels": [],
        "response_mask": [[False] + [True] * (len(row["base"]) - 1) for row in rows],
        "base_nll": [row["base"] for row in rows],
        "reference_nll": [row["reference"] for row in rows],
        "score": [
            [
                None if b is None or r is None else b - r
                for b, r in zip(row["base"], row["reference"], strict=True)
            ]
            for row in rows
        ],
        "priority": [[None] * len(row["base"]) for row in rows],
        "reason": [[1, *(0 if k else 2 for k in row["kept"])] for row in rows],
        "weight": [[1.0] * len(row["base"]) for row in rows],
    }
    for ids, row in zip(lists["input_ids"], rows, strict=True):
        kept = [False, *row["kept"]]
        lists["labels"].append([i if k else -100 for i, k in zip(ids, kept, strict=True)])
    columns = {
        "id": [f"row-{i}" for i in range(len(rows))],
        "source": ["made"] * len(rows),
        **lists,
        "round": [row["round"] for row in rows],
    }
    schema = cleaned_schema(with_truth=False)
    batch = pa.record_batch(columns, schema=schema)
    write_cleaned_pool(folder, [batch], schema, {"reasons": REASONS, **manifest})


def counts(ranked: int, kept: int, cut: float | None) -> dict[str, Any]:
    return {"ranked_tokens": ranked, "kept_tokens": kept, "cut": cut, "near_cut": None}


ROUNDS = [
    {"round": 0, "base": [None] * 3, "reference": [None] * 3, "kept": [1, 1]},
    {
        "round": 1,
        "base": [None, 2.0, 1.0, 0.0, 0.5],
        "reference": [None, 0.5, 1.25, 0.0, 100.0],
        "kept": [1, 0, 0, 0],
    },
    {"round": 2, "base": [None, 3.0], "reference": [None, 1.0], "kept": [1]},
]
RESULT = {
    "name": "evolving",
    "kept_share": 0.4,
    "accuracy": {"all": {"correct": 3, "questions": 8}, "made": {"correct": 3, "questions": 8}},
    "validation_nll": {"all": 1.5},
    "mask": {
        "all": {
            "tokens": 5, "kept": 2, "informative": 2, "corrupted": 0,
            "auroc": 0.75, "auroc_corrupted": None, "precision": 0.5, "recall": 1.0,
            "corrupted_kept": None,
        }
    },
}  # fmt: skip


def write_run(folder: Path, arms: list[str]) -> FinishedRun:
    """``evolving`` has two rounds of five ranked tokens, ``stm`` decides token by token."""
    selection: dict[str, Any] = {"rule": "token_cleaning", "scope": "global", "keep": 0.4}
    if "evolving" in arms:
        rounds = [counts(2, 2, None), counts(4, 1, 1.5), counts(1, 1, 2.0)]
        how: dict[str, Any] = {"selection": selection, "rounds": rounds}
        write_pool(
            folder / "arms" / "evolving" / "cleaned",
            ROUNDS,
            {**how, "seed": 7, "schedule": "self_evolving"},
        )
        result = folder / "arms" / "evolving" / "result.json"
        result.write_text(json.dumps(RESULT), encoding="utf-8")
    if "stm" in arms:
        row = {"round": 1, "base": [None, 4.0], "reference": [None, None], "kept": [0]}
        how = {"selection": {**selection, "rule": "stm"}, "seed": 7}
        write_pool(folder / "arms" / "stm" / "cleaned", [row], {**how, **counts(1, 0, None)})
    given = {
        "evolving": {"schedule": "self_evolving"},
        "stm": {"schedule": "fixed_model", "weighting": "dft"},
    }
    config = {
        "loop": {"arms": {name: given[name] for name in arms}},
        "model": {"base": {"name": "some/base"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return FinishedRun(folder)


@pytest.fixture
def finished(tmp_path: Path) -> FinishedRun:
    return write_run(tmp_path / "runs" / "mine", ["evolving", "stm"])


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_scalars_by_round(finished: FinishedRun, tmp_path: Path) -> None:
    write_board(finished, tmp_path / "board")
    found = scalars(read(tmp_path / "board" / "evolving"))
    assert found["rounds/cut"] == [(1, 1.5), (2, 2.0)]
    assert found["rounds/kept_share"] == [(1, 0.25), (2, 1.0)]
    assert found["rounds/mean_base_nll"] == [(1, 0.875), (2, 3.0)]
    # D_0 is not cleaned: 2 of 5, not 4 of 7
    ((step, share),) = found["result/kept_share"]
    assert step == 0 and share == pytest.approx(0.4)
    assert found["result/accuracy"] == [(0, 0.375)]
    assert found["result/validation_nll"] == [(0, 1.5)]
    assert found["result/auroc"] == [(0, 0.75)]
    assert "result/auroc_corrupted" not in found
    found = scalars(read(tmp_path / "board" / "stm"))
    assert found["result/kept_share"] == [(0, 0.0)] and "result/accuracy" not in found


def buckets(histogram: Any) -> dict[float, float]:
    """Right end -> how many, without empty ones."""
    pairs = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    return {limit: many for limit, many in pairs if many}


def test_histograms_by_round(finished: FinishedRun, tmp_path: Path) -> None:
    write_board(finished, tmp_path / "board")
    events = read(tmp_path / "board" / "evolving")
    assert sorted(events.Tags()["histograms"]) == [
        "tokens/base_nll", "tokens/reference_nll", "tokens/score",
    ]  # fmt: skip
    base, last = events.Histograms("tokens/base_nll")
    assert (base.step, last.step) == (1, 2)
    found = base.histogram_value
    # of 2, 1, 0 and 0.5
    assert (found.min, found.max, found.num) == (0.0, 2.0, 4)
    assert (found.sum, found.sum_squares) == (3.5, 5.25)
    assert buckets(found) == {0.0: 1, 0.5: 1, 1.0: 1, 2.0: 1}
    assert buckets(last.histogram_value) == {3.0: 1}
    # 100 and -99.5 lie beyond the buckets
    found = events.Histograms("tokens/reference_nll")[0].histogram_value
    assert buckets(found) == {0.0: 1, 0.5: 1, 1.25: 1, 100.0: 1}
    found = events.Histograms("tokens/score")[0].histogram_value
    assert buckets(found) == {-64.0: 1, -0.25: 1, 0.0: 1, 1.5: 1}
    assert (found.min, found.max, found.sum) == (-99.5, 1.5, -98.25)
    # the right end of a bucket is the left end of the next
    limits = found.bucket_limit
    assert limits == sorted(limits) and len(limits) == len(found.bucket)
    assert read(tmp_path / "board" / "stm").Tags()["histograms"] == ["tokens/base_nll"]


def test_neighbouring_values_get_buckets_of_their_own(tmp_path: Path) -> None:
    base = [None, 0.03125, 0.03126, 0.0625, 0.0626]  # 1 / 32 and 2 / 32 end buckets
    row = {"round": 1, "base": base, "reference": [None, *[0.0] * 4], "kept": [1, 1, 1, 1]}
    manifest = {"selection": {"rule": "full"}, **counts(4, 4, None)}
    write_pool(tmp_path / "cleaned", [row], manifest)
    write_board(FinishedRun(tmp_path), tmp_path / "board")
    (found,) = read(tmp_path / "board" / "selected").Histograms("tokens/base_nll")
    assert found.histogram_value.bucket == [1.0, 2.0, 1.0]
    assert found.histogram_value.bucket_limit == [0.03125, 0.0625, found.histogram_value.max]
    assert found.histogram_value.max == pytest.approx(0.0626)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\7" * 3 * width) * height)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_figures_are_shown_as_they_are(finished: FinishedRun, tmp_path: Path) -> None:
    report = tmp_path / "report"
    (report / "figures").mkdir(parents=True)
    (report / "figures" / "evolving_plane.png").write_bytes(png(5, 3))
    (report / "figures" / "evolving_plane.csv").write_text("x\n")
    write_board(finished, report / "tensorboard")
    events = read(report / "tensorboard")
    assert events.Tags()["images"] == ["report/evolving_plane"]
    (image,) = events.Images("report/evolving_plane")
    assert (image.width, image.height) == (5, 3) and image.encoded_image_string == png(5, 3)
    (report / "figures" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png is no PNG"):
        write_board(finished, report / "tensorboard")


def session_groups(logdir: Path) -> tuple[list[str], list[str], dict[str, tuple[dict, dict]]]:
    """Columns, metrics, and per session its values, as the HParams page gets them."""
    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(logdir))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(logdir))
    shown = backend_context.Context(
        base_plugin.TBContext(data_provider=provider, logdir=str(logdir), multiplexer=events)
    )
    asked = context.RequestContext()
    experiment = shown.experiment_from_metadata(
        asked, "", True, shown.hparams_metadata(asked, ""), []
    )
    names = [info.name for info in experiment.hparam_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=50, allowed_statuses=[api_pb2.STATUS_SUCCESS]
    )
    for name in names:
        column = request.col_params.add()
        column.hparam, column.include_in_result = name, True
    answer = list_session_groups.Handler(asked, shown, "", request).run()
    metrics = [info.name.tag for info in experiment.metric_infos]
    return (
        names,
        metrics,
        {
            group.name: (
                {k: v.string_value or v.number_value for k, v in group.hparams.items()},
                {m.name.tag: m.value for m in group.metric_values},
            )
            for group in answer.session_groups
        },
    )


def test_runs_under_one_folder_are_compared(finished: FinishedRun, tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "other", ["stm"])
    write_board(finished, tmp_path / "boards" / "mine")
    write_board(other, tmp_path / "boards" / "other")
    names, metrics, found = session_groups(tmp_path / "boards")
    assert sorted(names) == sorted(HPARAMS) and metrics == list(METRICS)
    assert sorted(found) == ["mine/evolving", "mine/stm", "other/stm"]
    assert found["mine/evolving"][0] == {
        "run": "mine", "arm": "evolving", "rule": "token_cleaning", "level": "global",
        "keep": 0.4, "schedule": "self_evolving", "seed": 7.0, "base": "some/base",
    }  # fmt: skip
    assert found["mine/evolving"][1] == {
        "result/kept_share": pytest.approx(0.4), "result/accuracy": 0.375,
        "result/validation_nll": 1.5, "result/auroc": 0.75, "result/precision": 0.5,
        "result/recall": 1.0,
    }  # fmt: skip
    # a rule that decides token by token was asked for no share
    assert found["other/stm"][0] == {
        "run": "other", "arm": "stm", "rule": "stm", "level": "global",
        "schedule": "fixed_model", "weighting": "dft", "seed": 7.0, "base": "some/base",
    }  # fmt: skip


def test_the_same_run_gives_the_same_bytes(finished: FinishedRun, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        write_board(finished, tmp_path / name)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        contents.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert contents[0] == contents[1] and len(contents[0]) == 2
    # again into the same folder: in the place of the files before, not beside them
    write_board(finished, tmp_path / "one")
    assert len([p for p in (tmp_path / "one").rglob("*") if p.is_file()]) == 2


def test_an_estimated_keep_share_is_its_number() -> None:
    manifest = {"selection": {"rule": "token_cleaning", "keep": "auto"}, "share": {"keep": 0.75}}
    run: Any = SimpleNamespace(config={}, root=Path("outputs/run"), base=None)
    arm: Any = SimpleNamespace(name="a", manifest=manifest)
    assert hparams(run, arm)["keep"] == 0.75
    del manifest["share"]
    assert "keep" not in hparams(run, arm)
