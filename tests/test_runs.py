"""One run per folder at a time; what a killed one left is taken over."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenclean.interrupts import Stopped
from tokenclean.publish import NotWritten
from tokenclean.runs import (
    LOCK,
    check_inputs,
    check_processes,
    check_run,
    content_of,
    locked,
    open_run,
)

Held = tuple[Path, Any, Any]


def _hold(folder: Path, line: Any) -> None:
    with open_run(folder, {"a": 1}):
        line.send("open")
        line.recv()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """A run's folder, and another process that has it open."""
    context = multiprocessing.get_context("fork")
    line, other = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path / "run", other))
    process.start()
    assert line.poll(60) and line.recv() == "open"
    yield tmp_path / "run", process, line
    process.kill()
    process.join(60)


def test_a_second_run_is_refused_by_the_holders_name(held: Held) -> None:
    folder, process, line = held
    before = (folder / "config.yaml").read_bytes()
    refused = pytest.raises(ValueError, match=f"run is in use by process {process.pid} on .*--name")
    with refused, open_run(folder, {"a": 1}):
        raise AssertionError("not reached")
    assert (folder / "config.yaml").read_bytes() == before
    line.send("leave")
    process.join(60)
    with open_run(folder, {"a": 1}):
        pass
    assert not (folder / LOCK).exists()


def test_a_dead_holders_lock_is_taken_over_and_its_rests_are_swept(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    folder, process, _ = held
    (folder / "deep").mkdir()
    (folder / "deep" / "scores.partial-elsewhere-17").mkdir()
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert (folder / LOCK).exists()
    with open_run(folder, {"a": 1}):
        assert not (folder / "deep" / "scores.partial-elsewhere-17").exists()
    assert f"process {process.pid} on" in (folder / "log.txt").read_text()
    assert f"process {process.pid} on" in caplog.text
    assert "ended without finishing" in caplog.text


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before the last holder removed it, locked after: another file has the name by then."""
    import fcntl

    flock = fcntl.flock
    calls: list[int] = []

    def late(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(calls[1]), (tmp_path / LOCK).stat())


def test_other_processes_of_a_run_share_the_firsts_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path / "run", {"a": 1}):
        monkeypatch.setenv("RANK", "1")
        with open_run(tmp_path / "run", {"a": 1}):
            pass
        assert (tmp_path / "run" / LOCK).exists()


def test_another_configuration_is_refused_even_when_it_waited(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {"a": 1}):
        (tmp_path / "run" / "result").touch()
    refused = pytest.raises(ValueError, match="another configuration")
    with refused, open_run(tmp_path / "run", {"a": 2}):
        raise AssertionError("not reached")
    check_run(tmp_path / "run", {"a": 1})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(NotWritten, match=r"file/run could not be written: Not a directory")
    with refused, open_run(tmp_path / "file" / "run", {"a": 1}):
        raise AssertionError("not reached")


@pytest.mark.parametrize("name", [LOCK, "log.txt", "config.yaml", "inputs.json"])
def test_no_link_in_a_strangers_folder_is_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("all I have")
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    refused = pytest.raises(ValueError, match=f"{name} is a link, to .*precious")
    with refused, open_run(tmp_path / "run", {"a": 1}):
        check_inputs(tmp_path / "run", {"data.path": "x"})
    assert (tmp_path / "precious").read_text() == "all I have"


def test_a_lock_that_is_no_file_is_named_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    refused = pytest.raises(ValueError, match=r"\.lock is no file")
    with refused, locked(tmp_path):
        raise AssertionError("not reached")
    assert (tmp_path / LOCK).is_fifo()


def test_a_lock_removed_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat, calls = Path.lstat, []

    def gone(path: Path) -> os.stat_result:
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", gone)
    with locked(tmp_path):
        assert (tmp_path / LOCK).is_file()
    assert len(calls) >= 2


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "adapter").mkdir(parents=True)
    weights = model / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"begin" + bytes(5_000_000) + b"end")
    inputs = {
        "data.path": "a",
        str(model): content_of(str(model)),
        "org/hub": content_of("org/hub"),
    }
    assert inputs["org/hub"] == "org/hub"
    check_inputs(tmp_path, inputs)
    check_inputs(tmp_path, {**inputs, str(model): content_of(str(model))})
    weights.write_bytes(b"begin" + bytes(5_000_000) + b"END")
    assert content_of(str(model)) != inputs[str(model)]
    with pytest.raises(ValueError, match=f"begun with something else .*: {model}; put back"):
        check_inputs(tmp_path, {**inputs, str(model): content_of(str(model))})
    with pytest.raises(ValueError, match=r"same names: data\.path;"):
        check_inputs(tmp_path, {**inputs, "data.path": "b"})
    check_inputs(tmp_path, inputs)


@pytest.mark.parametrize(
    ("environment", "expected", "fits"),
    [
        ({}, 1, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 2, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, False),  # torchrun without --trainer.devices
        ({"SLURM_PROCID": "1"}, 1, False),  # srun of what takes one process
        ({"SLURM_PROCID": "0"}, 1, True),  # a batch script's own shell
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2, True),  # Lightning's own launcher
    ],
)
def test_processes_that_nothing_connects_are_refused(
    environment: dict[str, str], expected: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if fits:
        check_processes(expected)
    else:
        with pytest.raises(ValueError, match=r"--trainer\.devices"):
            check_processes(expected)


def test_a_stopped_run_says_so_in_its_log(tmp_path: Path) -> None:
    with pytest.raises(Stopped), open_run(tmp_path / "run", {"a": 1}):
        raise Stopped("SIGTERM")
    assert "stopped by SIGTERM" in (tmp_path / "run" / "log.txt").read_text()
