"""Training and scoring on several processes: what one computes, stopping together, and going on.

Processes are forked, which spares them the imports; `scripts/distributed_training.py` holds what
they do in training.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_scoring import data_for

from scripts import distributed_training as script
from tokenclean import cli, commands, interrupts
from tokenclean.checkpoints import newest_checkpoint
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.models import BaseConfig, LoraSettings, Network, Speed
from tokenclean.models.sharding import local
from tokenclean.scoring import shards as shards_module
from tokenclean.scoring.attributes import AttributeSettings
from tokenclean.scoring.module import ScoringModule, score_pool
from tokenclean.trainer import Trainer

LIMIT_S = 240


def in_processes(count: int, work: Callable[[int], object]) -> list[int]:
    """Call ``work(rank)`` in forked processes as torchrun would; how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        process = os.fork()
        if not process:
            os.environ.update(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
                RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0",
                WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            )  # fmt: skip
            code = 1
            try:
                work(rank)
                code = 0
            except interrupts.Stopped:
                code = interrupts.EXIT_CODE
            except BaseException as error:
                print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(process)
    until, codes = time.monotonic() + LIMIT_S, dict[int, int]()
    while len(codes) < count:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done in started:
            codes[done] = os.waitstatus_to_exitcode(status)
        if codes:
            until = min(until, time.monotonic() + 20.0)  # others may wait for one that is gone
        if time.monotonic() > until:
            for process in set(started) - set(codes):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[process] for process in started]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    script.write_inputs(folder, steps=6)
    assert in_processes(1, lambda rank: script.work(folder, "1", list(script.WAYS))) == [0]
    return folder


def differences(folder: Path, setting: str, way: str) -> dict[str, float]:
    one, got = (load_file(str(folder / f"{s}-{way}.safetensors")) for s in ("1", setting))
    assert one["steps"].shape == (6, 2)
    # of the step without a kept token, loss and norm are 0
    assert [bool(step.any()) for step in one["steps"]] == [True, True, False, True, True, True]
    return script.differences(got, one)


FEW = ["LoRA", "all weights, rho1_online"]


@pytest.mark.parametrize(
    ("setting", "ways"),
    [
        ("2", FEW),
        ("2 sharded", FEW),
        pytest.param("4", list(script.WAYS), marks=pytest.mark.slow),
        pytest.param("2 sharded", list(script.WAYS), marks=pytest.mark.slow),
    ],
)
def test_processes_compute_what_one_does(inputs: Path, setting: str, ways: list[str]) -> None:
    count = script.SETTINGS[setting][0]
    codes = in_processes(count, lambda rank: script.work(inputs, setting, ways))
    assert codes == [0] * count
    for way in ways:
        found = differences(inputs, setting, way)
        assert max(found.values()) < 1e-5, (way, found)


def test_differences_can_be_seen(inputs: Path) -> None:
    """Other weights of the tokens are another gradient."""
    one, other = (load_file(str(inputs / f"1-{way}.safetensors")) for way in ("LoRA", "LoRA, dft"))
    assert min(script.differences(other, one).values()) > 1e-5


@pytest.mark.parametrize("setting", ["2", "2 sharded"])
def test_processes_stop_together_and_go_on(inputs: Path, tmp_path: Path, setting: str) -> None:
    """One is told to stop; both do, after the same step; then both go on as if nothing had been."""

    def work(told: int | None, rank: int) -> None:
        interrupts.listen()
        callbacks = [] if told is None else [script.Told(rank, told)]
        folder = tmp_path / "checkpoints"
        script.work(tmp_path, setting, ["LoRA"], inputs, folder, callbacks)

    assert in_processes(2, partial(work, 1)) == [143, 143]
    assert newest_checkpoint(tmp_path / "checkpoints") is not None
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000002.ckpt"]
    assert in_processes(2, partial(work, None)) == [0, 0]
    reference = inputs / f"{setting}-LoRA.safetensors"
    if not reference.is_file():
        in_processes(2, lambda rank: script.work(inputs, setting, ["LoRA"]))
    want, got = load_file(str(reference)), load_file(str(tmp_path / reference.name))
    assert torch.equal(got["steps"], want["steps"][2:])
    assert all(torch.equal(got[name], want[name]) for name in want if name != "steps")


def test_the_process_that_has_the_sample_names_it(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(rank: int) -> None:
        script.work(tmp_path, "2", ["LoRA"], inputs, None, [script.Spoilt()])

    assert in_processes(2, work) == [1, 1]
    said = capfd.readouterr().err
    for rank in (0, 1):
        message = f"the loss of sample 'row-{script.SPOILT}' is not finite at step "
        assert f"process {rank}: FloatingPointError: {message}" in said
    assert said.count("(1 of 7 samples there)") == 2


@pytest.mark.slow
def test_lightnings_own_launcher_leaves_no_process_behind(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    """The signal reaches the process that was started by hand, alone."""
    options = {
        "model.base.name": model_folder, "data.path": pool_file, "data.batch_size": 8,
        "data.cache_dir": tmp_path / "cache", "outputs": tmp_path, "name": "run",
        "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.strategy": "ddp",
        "trainer.max_epochs": 1000, "trainer.enable_progress_bar": "false",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tokenclean", "fit", *words]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + LIMIT_S
    while newest_checkpoint(tmp_path / "run" / "checkpoints") is None:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == interrupts.EXIT_CODE
    assert "the same command goes on where it stopped" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


# -- scoring with a model in parts --------------------------------------------------------------


@pytest.fixture
def data(
    model_folder: Path, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TuluDataModule:
    """An odd number of shards: two processes cannot have equally many."""
    monkeypatch.setattr(shards_module, "BATCHES", 2)
    monkeypatch.setattr(shards_module, "LEAST", 1)
    data = data_for(model_folder, pool_file, tmp_path / "cache", token_budget=100)
    assert -(-len(data.planned(data.scored_rows())) // 2) % 2 == 1
    return data


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> str:
    network = Network.load(BaseConfig(str(model_folder)))
    network.add_adapter(LoraSettings(r=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.save_last_adapter(tmp_path / "adapter")
    return str(tmp_path / "adapter")


class Scoring(ScoringModule):
    """Calls ``then`` before this process's batch ``at``, counted from 0, empty ones included."""

    def __init__(self, *arguments: Any, at: int = -1, then: Callable[[], None], **named: Any):
        super().__init__(*arguments, **named)
        self.at, self.then = at, then

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.at:
            self.then()
        return super().predict_step(batch, batch_idx)


def nothing() -> None:
    pass


def score(
    model: Path,
    data: TuluDataModule,
    folder: Path,
    rank: int = 0,
    processes: int = 1,
    at: int = -1,
    then: Callable[[], None] = nothing,
    merge: bool = True,
    **options: Any,
) -> None:
    """Score as `tokenclean score` does; with more than one process, with the layers split."""
    torch.set_num_threads(1)
    interrupts.listen()
    strategy = "auto" if processes == 1 else "fsdp2"
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    base = BaseConfig(str(model), speed=Speed(merge=merge))
    module = Scoring(base, at=at, then=then, **options)
    module.load(torch.device("cpu"))
    network = module.network
    assert network is not None
    layers = network.hf.base_model.layers
    whole = sum(p.numel() for p in layers.parameters())
    score_pool(module, trainer, data, data.scored_rows(), folder, data.token_budget)
    mine = sum(local(p).numel() for p in layers.parameters())
    assert mine <= whole / processes * 1.1, (mine, whole)


def in_one(work: Callable[[int], object]) -> None:
    assert in_processes(1, work) == [0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


COLUMNS = ["gap", "alone", "attention", "attention_keys", "relevance", "relevance_hidden"]


ALL_COLUMNS = {"columns": COLUMNS, "attributes": AttributeSettings(["ab", "ba b"])}


@pytest.mark.parametrize(
    ("processes", "inference", "options"),
    [
        (2, False, {}),
        (2, True, ALL_COLUMNS),
        pytest.param(3, True, {}, marks=pytest.mark.slow),
        pytest.param(3, False, ALL_COLUMNS, marks=pytest.mark.slow),
    ],
)
def test_a_model_in_parts_gives_the_same_bytes(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    inference: bool,
    options: dict[str, Any],
) -> None:
    """Manifest and noise included. ``inference``: tensors as on GPUs, where gloo is not used."""
    in_one(lambda rank: score(model_folder, data, tmp_path / "want", **options))
    if inference:
        utilities = "lightning.pytorch.loops.utilities._distributed_is_initialized"
        monkeypatch.setattr(utilities, lambda: False)

    def work(rank: int) -> None:
        given = {"rank": rank, "processes": processes, "at": 0, "then": check_mode, **options}
        score(model_folder, data, tmp_path / "got", **given)

    def check_mode() -> None:
        assert torch.is_inference_mode_enabled() == inference

    assert in_processes(processes, work) == [0] * processes
    assert files(tmp_path / "got") == files(tmp_path / "want")
    manifest = json.loads((tmp_path / "got" / "manifest.json").read_text())
    assert manifest["noise"]["samples"] == 4 and manifest["speed"]["merge"]


def test_adapters_of_a_model_in_parts_are_not_merged(
    model_folder: Path,
    data: TuluDataModule,
    adapter: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The manifest says so: the table is the one that a whole model gives without merging."""

    def parts(folder: Path) -> list[int]:
        return in_processes(
            2, lambda rank: score(model_folder, data, folder, rank, 2, adapters=adapter)
        )

    for merge in (True, False):
        folder = tmp_path / f"{merge}"
        in_one(lambda r: score(model_folder, data, folder, merge=merge, adapters=adapter))  # noqa: B023
    assert parts(tmp_path / "got") == [0, 0]
    got, merged, apart = (files(tmp_path / name) for name in ("got", "True", "False"))
    assert got == apart
    assert json.loads(got["manifest.json"])["speed"]["merge"] is False
    assert (
        json.loads(got["manifest.json"])["content"]
        != json.loads(merged["manifest.json"])["content"]
    )


@pytest.mark.parametrize(
    ("first", "then"), [(1, 2), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_stopped_pass_goes_on_with_the_model_held_otherwise(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    first: int,
    then: int,
) -> None:
    def told(rank: int) -> Callable[[], None]:
        return (lambda: os.kill(os.getpid(), signal.SIGTERM)) if not rank else nothing

    in_one(lambda rank: score(model_folder, data, tmp_path / "want"))

    def begin(rank: int) -> None:
        score(model_folder, data, tmp_path / "got", rank, first, at=1, then=told(rank))

    def go_on(rank: int) -> None:
        logging.getLogger("tokenclean").setLevel(logging.INFO)
        logging.getLogger("tokenclean").addHandler(logging.StreamHandler(sys.stderr))
        score(model_folder, data, tmp_path / "got", rank, then)

    assert in_processes(first, begin) == [143] * first
    left = sorted(path.name for path in (tmp_path / "got.shards").glob("shard-*"))
    assert left == [f"shard-{n:05d}.arrows" for n in range(first)]  # one of each
    capfd.readouterr()
    assert in_processes(then, go_on) == [0] * then
    assert f"{first} of " in capfd.readouterr().err
    assert files(tmp_path / "got") == files(tmp_path / "want")
    assert not (tmp_path / "got.shards").exists()


def failing(
    monkeypatch: pytest.MonkeyPatch, ranks: str, error: Exception, when: Callable[[Any], bool]
) -> None:
    """Processes that fail in some passes."""
    hidden = Network.hidden

    def limited(self: Network, batch: Any, *readers: Any) -> Any:
        if os.environ.get("RANK", "-") in ranks and when(batch):
            raise error
        return hidden(self, batch, *readers)

    monkeypatch.setattr(Network, "hidden", limited)


NO_MEMORY = torch.OutOfMemoryError("tried to allocate 7 GiB")


def test_out_of_memory_names_the_remedy(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Parts of a batch would be passes that the other process does not make."""
    failing(monkeypatch, "1", NO_MEMORY, lambda batch: batch.tokens > 60)
    assert in_processes(2, lambda r: score(model_folder, data, tmp_path / "got", r, 2)) == [1, 1]
    said = capfd.readouterr().err
    assert "process 1: ValueError: out of memory in a pass over " in said
    assert "score on more devices, or under another --name with --data.token_budget " in said


@pytest.mark.parametrize(
    ("ranks", "error"), [("1", NO_MEMORY), ("01", RuntimeError("no such kernel"))]
)
def test_noise_that_cannot_be_measured_does_not_hold_up_a_pass(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ranks: str,
    error: Exception,
) -> None:
    """One process alone leaves the others waiting; the next call does not try again."""
    in_one(lambda rank: score(model_folder, data, tmp_path / "want"))
    # Samples are measured one by one, in padded batches.
    failing(monkeypatch, ranks, error, lambda batch: batch.segments is None)

    def work(rank: int) -> None:
        score(model_folder, data, tmp_path / "got", rank, 2)

    if len(ranks) == 1:
        assert in_processes(2, work) == [1, 1]
        said = capfd.readouterr().err
        assert "all is scored, and the same command ends without that measurement" in said
        assert not (tmp_path / "got").exists()
    assert in_processes(2, work) == [0, 0]
    got, want = (files(tmp_path / name) for name in ("got", "want"))
    manifests = [json.loads(found.pop("manifest.json")) for found in (got, want)]
    assert got == want and manifests[1].pop("noise") and manifests[0] == manifests[1]
    assert not (tmp_path / "got.shards").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.base.load_in_4bit", "true"], "model.base.load_in_4bit: .* cannot be split"),
        (["--probe", "true"], "--probe: it runs on one device"),
    ],
)
def test_what_does_not_go_with_parts_is_refused_before_weights_are_read(
    model_folder: Path,
    pool_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(commands, "check_base", lambda *a: None)  # it wants a GPU for 4 bit
    monkeypatch.setattr(ScoringModule, "load", lambda *a: 1 / 0)
    words = ["score", "--model.base.name", str(model_folder), "--data.path", str(pool_file)]
    words += ["--data.max_length", "96", "--data.cache_dir", str(tmp_path / "cache")]
    words += ["--outputs", str(tmp_path), "--name", "run", "--trainer.accelerator", "cpu"]
    words += ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", *options]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert re.search(said, capsys.readouterr().err)
