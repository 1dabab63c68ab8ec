"""Training on several processes: what one computes, stopping together, and going on.

Processes are forked, which spares them the imports; `scripts/distributed_training.py` holds what
they do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import distributed_training as script
from tokenclean import interrupts
from tokenclean.checkpoints import newest_checkpoint

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
