"""A scoring pass that is killed, stopped, damaged or dealt out otherwise ends in the same bytes."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama, write_jsonl
from test_scoring import data_for, score, trainer_for

from tokenclean import cli, interrupts, publish
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, Network
from tokenclean.scoring import shards as shards_module
from tokenclean.scoring import writer as writer_module
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.module import ScoringModule, score_pool
from tokenclean.scoring.shards import Shards
from tokenclean.scoring.table import ScoreTable
from tokenclean.scoring.writer import ScoreWriter


@pytest.fixture(autouse=True)
def two_batches_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forty samples make eleven batches or so: shards of two, and a last one of one.
    monkeypatch.setattr(shards_module, "BATCHES", 2)
    monkeypatch.setattr(shards_module, "LEAST", 1)


@pytest.fixture
def data(model_folder: Path, pool_file: Path, tmp_path: Path) -> TuluDataModule:
    return data_for(model_folder, pool_file, tmp_path / "cache", token_budget=150)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Pool rows of every batch that a pass computed; the noise is measured elsewhere."""
    batches: list[list[int]] = []
    step = ScoringModule.predict_step

    def counted(self: ScoringModule, batch: Any, batch_idx: int) -> Any:
        if batch.rows:
            batches.append(sorted(batch.rows))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ScoringModule, "predict_step", counted)
    return batches


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(model: Path, data: TuluDataModule, folder: Path, **options: Any) -> dict[str, bytes]:
    return files(score(ScoringModule(BaseConfig(str(model))), data, folder, **options).folder)


def ready(model: Path) -> ScoringModule:
    """With its weights read: a child that dies as it shows progress keeps tqdm's lock for ever."""
    module = ScoringModule(BaseConfig(str(model)))
    module.load(torch.device("cpu"))
    return module


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], Any]) -> tuple[int, str]:
    """Run it in a copy of this process.

    It must not read weights; see `ready`.

    Returns:
        What that ended with, negative for a signal, and its error.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def on_call(function: Any, number: int, then: Callable[..., Any]) -> Any:
    """The same function, but its call of this number, counted from 0, is another one."""
    calls = iter(range(10**6))
    return lambda *a, **k: (then if next(calls) == number else function)(*a, **k)


# -- kill -9 ------------------------------------------------------------------------------------

#: where a pass is killed -> what is replaced by a blow, and shards that are whole by then
MOMENTS: dict[str, tuple[Any, str, int, int]] = {
    "before the first shard": (publish, "flush", 2, 0),  # the plan takes two
    "in a batch": (ScoringModule, "predict_step", 7, 3),
    "a shard is written, not renamed": (publish, "flush", 2 + 2 * 4, 4),
    "a shard is renamed, its folder not flushed": (publish, "flush", 2 + 2 * 4 + 1, 5),
    "shards are merged": (Shards, "merged", 0, -1),
    "the table is half written": (writer_module, "write_scores", 0, -1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_only_what_is_missing_is_computed(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    computed: list[list[int]],
    moment: str,
) -> None:
    want = run(model_folder, data, tmp_path / "want")
    plan = data.planned(TokenRows(data.pool)).plan
    assert len(plan) % 2 == 1 and len(computed) == len(plan) > 8
    where, name, number, whole = MOMENTS[moment]
    module = ready(model_folder)
    with monkeypatch.context() as blow:
        blow.setattr(where, name, on_call(getattr(where, name), number, die))
        folder = tmp_path / "scores"
        assert in_child(lambda: score(module, data, folder))[0] == -signal.SIGKILL
    assert not folder.exists()
    left = sorted((tmp_path / "scores.shards").glob("shard-*.arrows"))
    whole = -(-len(plan) // 2) if whole < 0 else whole
    assert len(left) == whole
    computed.clear()
    assert run(model_folder, data, folder) == want
    assert computed == [sorted(members) for members in plan[2 * whole :]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "pool.jsonl", "scores", "want"]


def test_half_a_shard_is_swept(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ready(model_folder)
    with monkeypatch.context() as blow:
        blow.setattr(publish, "flush", on_call(publish.flush, 4, die))
        assert in_child(lambda: score(module, data, tmp_path / "scores"))[0] == -signal.SIGKILL
    folder = tmp_path / "scores.shards"
    assert len(list(folder.glob("*.partial-*"))) == 1
    planned = data.planned(TokenRows(data.pool))
    shards = Shards(tmp_path / "scores", planned, {"other": "numbers"})
    shards.missing()
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json"]


# -- what lies there is not believed ------------------------------------------------------------


@pytest.fixture
def unmerged(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """All shards of a pass whose table was not written."""
    with monkeypatch.context() as blow:
        blow.setattr(Shards, "merged", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model_folder, data, tmp_path / "scores")
    return tmp_path / "scores.shards"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: shutil.copy(path.with_name("shard-00000.arrows"), path), "of another pass"),
    ],
)
def test_a_damaged_shard_is_computed_again(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    unmerged: Path,
    computed: list[list[int]],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], Any],
    said: str,
) -> None:
    want = run(model_folder, data, tmp_path / "want")
    computed.clear()
    damage(unmerged / "shard-00002.arrows")
    with caplog.at_level(logging.INFO, "tokenclean"):
        assert run(model_folder, data, tmp_path / "scores") == want
    assert computed == [sorted(m) for m in data.planned(TokenRows(data.pool)).plan[4:6]]
    assert re.search(rf"shard-00002\.arrows {'is ' * (said[0] == 'o')}{said}", caplog.text)
    count = -(-len(data.planned(TokenRows(data.pool))) // 2)
    assert f"{count - 1} of {count} shards are there already" in caplog.text


def test_a_shard_that_is_damaged_before_the_merge_is_an_error(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = Shards.merged

    def damaged(self: Shards) -> np.ndarray:
        flip(self.folder / "shard-00001.arrows")
        return merged(self)

    monkeypatch.setattr(Shards, "merged", damaged)
    with pytest.raises(ValueError, match=r"shard-00001\.arrows is damaged; the same command"):
        run(model_folder, data, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("change", ["model", "token_budget", "the rows or their batches"])
def test_shards_of_other_numbers_are_discarded(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    unmerged: Path,
    computed: list[list[int]],
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    if change == "model":
        tiny_llama(len(byte_level_tokenizer()), seed=5).save_pretrained(tmp_path / "other")
        byte_level_tokenizer().save_pretrained(tmp_path / "other")
        model_folder = tmp_path / "other"
    elif change == "token_budget":
        data.token_budget = 151
    else:
        data.subset = [0]
    with caplog.at_level(logging.WARNING, "tokenclean"):
        run(model_folder, data, tmp_path / "scores")
    rows = TokenRows(data.pool, data.chosen_rows())
    assert len(computed) == len(data.planned(rows))
    assert f"the shards there are not used: {change}" in caplog.text.replace("base, ", "")


def test_without_a_plan_shards_are_not_used(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    unmerged: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (unmerged / "plan.json").write_text("[]", encoding="utf-8")
    run(model_folder, data, tmp_path / "scores")
    assert "they have no readable plan.json" in caplog.text


def test_other_samples_under_a_shard_are_refused(data: TuluDataModule, tmp_path: Path) -> None:
    shards = Shards(tmp_path / "scores", data.planned(TokenRows(data.pool)), {})
    shards.missing()
    rows = np.array([r for members in shards.batches(1) for r in members])
    counts = data.pool.response_counts()[rows]
    values = np.zeros((1, int(counts.sum())), np.float32)
    with pytest.raises(RuntimeError, match="is not shard 0 of the plan"):
        shards.publish(0, shards_module.Scored(rows, counts, values))
    shards.publish(1, shards_module.Scored(rows, counts, values))


def test_the_number_of_shards_follows_from_the_plan_alone(
    data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    planned = data.planned(TokenRows(data.pool))
    sizes = {}
    for batches in (0, 1, 63, 64, 128, 1024, 2**20, 2**20 + 1):
        many = planned.only([np.zeros(1, np.int64)] * batches)
        shards = Shards(tmp_path / "scores", many, {})
        sizes[batches] = (shards.size, shards.count)
    assert sizes == {
        0: (1, 0),
        1: (1, 1),
        63: (7, 9),
        64: (8, 8),
        128: (16, 8),
        1024: (16, 64),
        2**20: (16, 65536),
        2**20 + 1: (17, 61681),
    }


def test_shards_of_another_size_are_others(
    data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, keys = data.planned(TokenRows(data.pool)), {}
    for batches in (1, 2):
        monkeypatch.setattr(shards_module, "BATCHES", batches)
        shards = Shards(tmp_path / "scores", planned, {})
        keys[shards.size] = shards.key
    assert len(keys) == len(set(keys.values())) == 2


# -- several processes ----------------------------------------------------------------------------


def process(rank: int, world: int, said: list[Any]) -> Any:
    """A trainer in one of several processes; the first one's words are kept for the others."""

    def broadcast(value: Any) -> Any:
        if not rank:
            said.append(value)
        return said[-1]

    strategy = SimpleNamespace(broadcast=broadcast)
    return SimpleNamespace(
        global_rank=rank, world_size=world, is_global_zero=not rank, strategy=strategy
    )


@pytest.mark.parametrize("there", [(), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
def test_processes_share_what_is_missing(
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    there: tuple[int, ...],
) -> None:
    planned = data.planned(TokenRows(data.pool))
    missing = [n for n in range(-(-len(planned) // 2)) if n not in there]
    monkeypatch.setattr(Shards, "missing", lambda self: missing)
    said: list[Any] = []
    shares = [
        ScoreWriter(planned, tmp_path / "scores", {}).deal(process(rank, world, said)).plan
        for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1  # all in step
    dealt = sorted(tuple(members) for share in shares for members in share if len(members))
    assert dealt == sorted(tuple(m) for n in missing for m in planned.plan[2 * n : 2 * n + 2])


def test_a_process_with_other_data_is_refused(data: TuluDataModule, tmp_path: Path) -> None:
    planned, said = data.planned(TokenRows(data.pool)), [None]
    ScoreWriter(planned, tmp_path / "scores", {"model": "m"}).deal(process(0, 2, said))
    with pytest.raises(ValueError, match="process 1 scores something else than process 0"):
        ScoreWriter(planned, tmp_path / "scores", {"model": "n"}).deal(process(1, 2, said))


def test_an_error_of_the_first_process_is_everyones() -> None:
    said: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        writer_module.on_first(process(0, 2, said), lambda: 1 / 0)
    with pytest.raises(ValueError, match="process 0: division by zero"):
        writer_module.on_first(process(1, 2, said), lambda: None)


def test_nothing_left_to_compute_still_makes_the_table(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    unmerged: Path,
    computed: list[list[int]],
) -> None:
    found = run(model_folder, data, tmp_path / "scores")
    assert computed == [] and not unmerged.exists()
    assert found == run(model_folder, data, tmp_path / "want")


def test_samples_without_a_target_have_empty_rows(model_folder: Path, tmp_path: Path) -> None:
    ids = [0, 40, 41, 42, 43]
    prompts = (2, 1, 4)  # nothing predicts the first token
    rows = [{"id": str(n), "input_ids": ids, "labels": [*([-100] * n), *ids[n:]]} for n in prompts]
    path = write_jsonl(tmp_path / "pool.jsonl", rows)
    data = data_for(model_folder, path, tmp_path / "cache", targets="prompt")
    module = ScoringModule(BaseConfig(str(model_folder)))
    module.load(torch.device("cpu"))
    folder, given = tmp_path / "scores", data.scored_rows()
    score_pool(module, trainer_for(), data, given, folder, data.token_budget)
    table = ScoreTable(folder)
    assert [len(table.nll[i]) for i in range(3)] == [1, 0, 3]


_RUN = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tokenclean import cli
from tokenclean.scoring import shards
from tokenclean.scoring.writer import ScoreWriter
shards.BATCHES, shards.LEAST = 2, 1
publish = shards.Shards.publish
kill = os.environ.get("KILL_AT")
def published(self, number, scored):
    publish(self, number, scored)
    if kill and number == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)
shards.Shards.publish = published
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_are_killed_and_one_goes_on(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    """Under torchrun, with Lightning's own dealing-out left on."""
    script = tmp_path / "run.py"
    script.write_text(_RUN, encoding="utf-8")
    words = ["score", "--model.base.name", str(model_folder), "--data.path", str(pool_file)]
    words += ["--data.max_length", "96", "--data.token_budget", "150"]
    words += ["--outputs", str(tmp_path), "--trainer.accelerator", "cpu"]
    words += ["--trainer.use_distributed_sampler", "true"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    torchrun = [*(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")]
    torchrun += ["--master_port", str(20000 + os.getpid() % 10000)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def go(name: str, launcher: list[str], more: list[str], **extra: str) -> int:
        place = ["--name", name, "--data.cache_dir", str(tmp_path / f"cache_{name}")]
        command = [*launcher, str(script), *words, *place, *more]
        return subprocess.run(command, env={**environment, **extra}, timeout=300).returncode

    assert go("one", [sys.executable], []) == 0
    assert go("two", torchrun, two) == 0
    assert go("killed", torchrun, two, KILL_AT="2") != 0
    left = {path.name for path in (tmp_path / "killed" / "scores.shards").glob("shard-*")}
    assert "shard-00002.arrows" in left and not (tmp_path / "killed" / "scores").exists()
    assert go("killed", [sys.executable], []) == 0
    tables = [ScoreTable(tmp_path / name / "scores") for name in ("one", "two", "killed")]
    for other in tables[1:]:
        for part in tables[0].folder.glob("*.arrow"):
            assert (other.folder / part.name).read_bytes() == part.read_bytes()
        changes = {k: (v, other.manifest[k]) for k, v in tables[0].manifest.items()}
        different = {k for k, (a, b) in changes.items() if a != b}
        assert different <= {"pool_folder"}


# -- signals ----------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.listen()
    yield
    interrupts.listen()  # forgets what came
    for number, handler in before.items():
        signal.signal(number, handler)


def told(number: signal.Signals, function: Any) -> Any:
    """The same function, after this process gets a signal."""

    def doing(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return function(*arguments)

    return doing


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_finishes_the_shard(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listening: None,
    computed: list[list[int]],
    number: signal.Signals,
) -> None:
    want = run(model_folder, data, tmp_path / "want")
    planned = data.planned(TokenRows(data.pool))
    computed.clear()
    step = ScoringModule.predict_step
    with monkeypatch.context() as change:
        # in the first batch of the third shard
        change.setattr(ScoringModule, "predict_step", on_call(step, 4, told(number, step)))
        with pytest.raises(interrupts.Stopped, match=number.name):
            run(model_folder, data, tmp_path / "scores")
    assert computed == [sorted(members) for members in planned.plan[:6]]
    assert len(list((tmp_path / "scores.shards").glob("shard-*"))) == 3
    computed.clear()
    interrupts.listen()
    assert run(model_folder, data, tmp_path / "scores") == want
    assert computed == [sorted(members) for members in planned.plan[6:]]


def test_the_verb_ends_as_told_and_goes_on(
    model_folder: Path,
    pool_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listening: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["score", "--model.base.name", str(model_folder), "--data.path", str(pool_file)]
    words += ["--data.max_length", "96", "--data.token_budget", "150", "--name", "run"]
    words += ["--data.cache_dir", str(tmp_path / "cache"), "--outputs", str(tmp_path)]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    step, folder = ScoringModule.predict_step, tmp_path / "run"
    with monkeypatch.context() as change:
        stopped = on_call(step, 2, told(signal.SIGTERM, step))
        change.setattr(ScoringModule, "predict_step", stopped)
        with pytest.raises(SystemExit) as end:
            cli.main(words)
    assert end.value.code == 143 and not (folder / "scores").exists()
    assert len(list((folder / "scores.shards").glob("shard-*"))) == 2
    cli.main(words)
    assert not (folder / "scores.shards").exists()
    summary = (folder / "summary.json").read_text(encoding="utf-8")
    assert "shards are there already" in (folder / "log.txt").read_text(encoding="utf-8")

    # Killed after the table, before what comes after it.
    (folder / "summary.json").unlink()
    (folder / "scores.shards").mkdir()
    (folder / "scores.shards" / "shard-00000.arrows").write_bytes(b"")
    before = files(folder / "scores")
    monkeypatch.setattr(ScoringModule, "load", lambda *a: 1 / 0)  # no model is needed
    cli.main(words)
    assert files(folder / "scores") == before and not (folder / "scores.shards").exists()
    for line in ('"samples": 40', '"mean_nll"', '"table"'):
        assert line in summary and line in (folder / "summary.json").read_text(encoding="utf-8")
    capsys.readouterr()
    cli.main(words)
    assert "finished before" in capsys.readouterr().out


# -- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["shard-00000.arrows", "merged"])
def test_a_full_disk_is_named_and_loses_nothing(
    model_folder: Path,
    pool_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(shards_module, "BATCHES", 1)
    data = data_for(model_folder, pool_file, tmp_path / "cache", token_budget=30)
    want = run(model_folder, data, tmp_path / "want")
    with monkeypatch.context() as change:
        change.setattr(Shards, "merged", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model_folder, data, tmp_path / "sizes")
    largest = max(path.stat().st_size for path in (tmp_path / "sizes.shards").iterdir())
    tokens = int(data.pool.response_counts().sum())
    assert 4 * tokens > largest + 8  # so that a limit can lie between them
    limit = 4 * tokens - 8
    if what != "merged":
        # The plan, which is larger than a shard, is there already.
        with monkeypatch.context() as change:
            change.setattr(Shards, "publish", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(model_folder, data, tmp_path / "scores")
        limit = 200

    module = ready(model_folder)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        score(module, data, tmp_path / "scores")

    code, said = in_child(limited)
    assert code == 1
    assert f"NotWritten: {tmp_path / 'scores.shards' / what} could not be written" in said
    assert "What was finished before is whole" in said
    assert run(model_folder, data, tmp_path / "scores") == want


def test_room_for_all_values_is_reserved_before_they_are_written(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map over a file that the disk has no room for would end the process with SIGBUS."""
    asked = []

    def full(handle: int, start: int, size: int) -> None:
        asked.append((start, size))
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(publish.NotWritten, match=r"scores\.shards/merged could not be .* space"):
        run(model_folder, data, tmp_path / "scores")
    assert asked == [(0, 4 * int(data.pool.response_counts().sum()))]


# -- memory -----------------------------------------------------------------------------------


def small_memory(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """A device that a pass over more than so many tokens does not fit into; sizes it was asked."""
    asked: list[int] = []
    hidden = Network.hidden

    def limited(self: Network, batch: Any, *readers: Any) -> Any:
        asked.append(batch.tokens)
        if batch.tokens > tokens:
            raise torch.OutOfMemoryError(f"tried to allocate {batch.tokens} tokens")
        return hidden(self, batch, *readers)

    monkeypatch.setattr(Network, "hidden", limited)
    return asked


@pytest.mark.parametrize("columns", [[], ["gap", "alone", "attention", "attention_keys"]])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_less_memory_gives_the_same_numbers(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    columns: list[Any],
    layout: Any,
) -> None:
    if layout == "padded" and columns:
        columns = ["gap", "alone"]  # attention is read from packed batches

    def table(name: str) -> ScoreTable:
        base = BaseConfig(str(model_folder), layout=layout)
        return score(ScoringModule(base, columns=columns), data, tmp_path / name)

    want = table("want")
    longest = int(TokenRows(data.pool).lengths.max())
    asked = small_memory(monkeypatch, 80)
    assert longest < 80
    got = table("got")
    refused = [tokens for tokens in asked if tokens > 80]
    assert len(refused) == 1 and max(asked) > 130  # once, and never again
    assert caplog.text.count("out of memory in a pass over") == 1
    assert got.rows.tolist() == want.rows.tolist() and got.folder != want.folder
    for name in ("nll", *columns):
        for row in range(40):
            one, other = (t.of_rows(np.array([row]), name)[1] for t in (got, want))
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6, err_msg=name)


def test_a_sample_that_does_not_fit_alone_is_named(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = TokenRows(data.pool).lengths
    longest = int(np.argmax(lengths))
    small_memory(monkeypatch, int(lengths[longest]) - 1)
    said = rf"out of memory: sample 'row-{longest}' alone, {lengths[longest]} tokens.*max_length"
    with pytest.raises(ValueError, match=said):
        run(model_folder, data, tmp_path / "scores")


@pytest.mark.parametrize("column", ["gap", "alone"])
def test_a_number_that_is_not_finite_names_the_sample(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    column: Any,
) -> None:
    module = ScoringModule(BaseConfig(str(model_folder)), columns=[column])
    statistics = ScoringModule._statistics

    def poisoned(self: ScoringModule, batch: Any) -> list[Any]:
        found = statistics(self, batch)
        if 17 in batch.rows:
            at = sum(batch.counts[: batch.rows.index(17)])
            found[1][at] = float("inf")
        return found

    monkeypatch.setattr(ScoringModule, "_statistics", poisoned)
    with pytest.raises(FloatingPointError, match=f"column {column} of sample 'row-17' is not"):
        score(module, data, tmp_path / "scores")


# -- the cache --------------------------------------------------------------------------------


def test_a_damaged_table_in_the_cache_is_made_again(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    computed: list[list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = ScoreCache(tmp_path / "tables")

    def with_cache(name: str) -> dict[str, bytes]:
        module, rows = ScoringModule(BaseConfig(str(model_folder))), TokenRows(data.pool)
        module.load(torch.device("cpu"))
        folder = tmp_path / name
        score_pool(module, trainer_for(), data, rows, folder, data.token_budget, cache)
        return files(folder)

    want = with_cache("one")
    computed.clear()
    assert with_cache("two") == want and computed == []
    (entry,) = (tmp_path / "tables").iterdir()
    flip(entry / "part-00000.arrow")  # and so, by their links, all
    assert with_cache("three") == want and computed
    assert "its scores in the cache are no use" in caplog.text
    computed.clear()
    assert with_cache("four") == want and computed == []
