"""Training that is cut off: told to stop, killed, or out of disk, it goes on bit for bit."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import conversation, write_jsonl
from lightning import Callback, LightningModule, seed_everything
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from tokenclean import interrupts
from tokenclean.checkpoints import CheckpointFiles, newest_checkpoint, read_checkpoint
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, LoraSettings, load_tokenizer
from tokenclean.publish import NotWritten
from tokenclean.trainer import Trainer
from tokenclean.training.module import CleanedSFTModule

LORA = LoraSettings(r=4, alpha=8, dropout=0.3, target_modules=["q_proj", "down_proj"])
STEPS = 5  # in each of two epochs


@pytest.fixture
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts._received = None


@pytest.fixture
def data(model_folder: Path, tmp_path: Path) -> TuluDataModule:
    return data_of(model_folder, tmp_path)


def data_of(model_folder: Path, folder: Path) -> TuluDataModule:
    rows = [
        conversation(f"What is {i} plus {i % 7}?", "It is " + f" {i + i % 7}." * (1 + i % 5))
        for i in range(24)
    ]
    path = write_jsonl(folder / "data.jsonl", rows)
    data = TuluDataModule(
        str(path), max_length=96, batch_size=5, token_budget=150, cache_dir=str(folder / "cache")
    )
    data.use_tokenizer(load_tokenizer(BaseConfig(str(model_folder))))
    data.prepare_data()
    data.setup()
    return data


class Steps(Callback):
    """Notes the losses, and does something after a step."""

    def __init__(self, then: dict[int, Callable[[], None]] | None = None):
        self.then = then or {}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.losses.append(module.last_step["train/loss"])
        self.then.get(trainer.global_step, lambda: None)()


def trainer_for(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "max_epochs": 2,
            **options,
        }
    )


def train(
    model_folder: Path,
    data: TuluDataModule,
    folder: Path | None,
    callback: Callback,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> tuple[dict[str, Tensor], Trainer]:
    """Two epochs from the newest checkpoint of a folder; the trained weights."""
    seed_everything(7, verbose=False)
    module = CleanedSFTModule(
        BaseConfig(str(model_folder)),
        lora=LORA,
        optimizer=partial(AdamW, lr=1e-2, fused=True),
        warmup_ratio=0.2,
    )
    trainer = trainer_for(callback, *callbacks, **{"val_check_interval": 2, **options})
    held_out = data.scoring_loader(TokenRows(data.pool, np.arange(12)))
    trainer.fit_within(folder, module, data.training_loader(TokenRows(data.pool)), held_out)
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}, trainer


def told(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


class Validations(Callback):
    """Notes after which steps the validation loss was measured, and its value."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["validation/loss"])
            self.seen.append((trainer.global_step, loss))


@pytest.fixture(scope="module")
def uninterrupted(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], list[float], list[tuple[int, float]]]:
    steps, validations = Steps(), Validations()
    data = data_of(model_folder, tmp_path_factory.mktemp("whole"))
    weights, _ = train(model_folder, data, None, steps, callbacks=[validations])
    assert len(steps.losses) == 2 * STEPS and [s for s, _ in validations.seen] == [2, 4, 7, 9]
    return weights, steps.losses, validations.seen


@pytest.mark.parametrize("stop", range(1, 2 * STEPS + 1))
def test_a_signal_finishes_the_step(
    model_folder: Path,
    data: TuluDataModule,
    tmp_path: Path,
    stop: int,
    signals: None,
    uninterrupted: Any,
) -> None:
    want, losses, validated = uninterrupted
    begun, before = Steps({stop: told}), Validations()
    with pytest.raises(interrupts.Stopped):
        train(model_folder, data, tmp_path / "checkpoints", begun, callbacks=[before])
    assert begun.losses == losses[:stop]
    interrupts.listen()
    rest, after = Steps(), Validations()
    got, trainer = train(model_folder, data, tmp_path / "checkpoints", rest, callbacks=[after])
    assert begun.losses + rest.losses == losses
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert before.seen + after.seen == validated
    module: Any = trainer.lightning_module
    assert module.metrics()["validation/loss"] == validated[-1][1]
    assert module.metrics()["train/loss"] == losses[-1]


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_during_validation(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, number: int, signals: None,
    uninterrupted: Any,
) -> None:  # fmt: skip
    """An epoch's validation is not finished first, and done whole by whoever goes on."""
    want, losses, _ = uninterrupted

    class Told(Callback):
        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                told(number)

    whole, before, after, rest = Validations(), Validations(), Validations(), Steps()
    train(model_folder, data, None, Steps(), callbacks=[whole], val_check_interval=1.0)
    with pytest.raises(interrupts.Stopped):
        train(model_folder, data, tmp_path, Told(), callbacks=[before], val_check_interval=1.0)
    interrupts.listen()
    got, _ = train(model_folder, data, tmp_path, rest, callbacks=[after], val_check_interval=1.0)
    assert rest.losses == losses[STEPS:]
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert before.seen == [] and after.seen == whole.seen and len(after.seen) == 2


def test_a_signal_before_the_first_step_stops_at_once(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, signals: None
) -> None:
    class Told(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            told()
            raise AssertionError("it went on")

    with pytest.raises(interrupts.Stopped):
        train(model_folder, data, tmp_path / "checkpoints", Told())
    assert not (tmp_path / "checkpoints").exists()


def test_handlers_stay_as_they_are(model_folder: Path, data: TuluDataModule, signals: None) -> None:
    """Lightning would put its own in front of them, also for `predict`."""
    before = [signal.getsignal(n) for n in interrupts.SIGNALS]
    seen: list[Any] = []

    def look() -> None:
        seen.extend(signal.getsignal(n) for n in interrupts.SIGNALS)

    train(model_folder, data, None, Steps({1: look}), max_epochs=1)
    assert seen == before


class Scoring(LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            told()
        assert batch_idx < 2


def test_a_signal_ends_predict(signals: None) -> None:
    """Lightning would end it after this batch, with success."""
    loader: Any = DataLoader([0, 1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(interrupts.Stopped):
        trainer_for().predict(Scoring(), loader)


# -- killed ---------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run something in a forked process; how it ended, as `os.waitstatus_to_exitcode` says."""
    process = os.fork()
    if not process:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A `torch.save` whose process is killed in the middle of its nth file."""

    def __init__(self, number: int, size: int = 4096):
        self.left, self.size, self.save = number, size, torch.save

    def __call__(self, value: Any, path: Any) -> None:
        self.left -= 1
        self.save(value, path)
        if not self.left:
            os.truncate(path, self.size)
            killed()


@pytest.mark.parametrize("moment", ["step 4", "first file", "third file", "before deleting"])
def test_killed_training_goes_on(
    model_folder: Path, data: TuluDataModule, tmp_path: Path, moment: str, uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A checkpoint after every step; the kill comes between two, within one, or after one."""
    want, losses, _ = uninterrupted
    monkeypatch.setattr("tokenclean.checkpoints.EVERY", timedelta(0))
    folder = tmp_path / "checkpoints"

    def work() -> None:
        steps = Steps({4: killed} if moment == "step 4" else None)
        if moment == "first file":
            torch.save = Torn(1)  # type: ignore[assignment]
        elif moment == "third file":
            torch.save = Torn(3)  # type: ignore[assignment]
        elif moment == "before deleting":
            Path.unlink = lambda *_, **__: killed()  # type: ignore[method-assign,assignment]
        train(model_folder, data, folder, steps)

    assert in_child(work) == -signal.SIGKILL
    newest = newest_checkpoint(folder)
    step = {"step 4": 3, "first file": None, "third file": 2, "before deleting": 2}[moment]
    assert (newest and newest.name) == (step and f"step-{step:08d}.ckpt")
    rest = Steps()
    got, _ = train(model_folder, data, folder, rest)
    assert rest.losses == losses[step or 0 :]
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert [p.name for p in folder.glob("*.ckpt")] == ["step-00000010.ckpt"]


def test_checkpoints_are_written_beside_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning writes where temporary files are and copies, if that is another file system: a kill
    leaves a part under the final name."""
    opened: list[Path] = []
    saved = torch.save

    def noting(value: Any, path: Any) -> None:
        opened.append(Path(path))
        saved(value, path)

    monkeypatch.setattr(torch, "save", noting)
    trainer_for().strategy.checkpoint_io.save_checkpoint({"loops": {}}, tmp_path / "step.ckpt")
    assert [p.parent for p in opened] == [tmp_path]
    assert opened[0].name.startswith("step.ckpt.partial-")


# -- damaged, foreign, too large ------------------------------------------------------------------


def small_checkpoint(path: Path, step: int) -> Path:
    state = {"weight": torch.arange(5000.0)}
    value = {"state_dict": state, "global_step": step, "loops": {}}
    CheckpointFiles().save_checkpoint(value, path)
    return path


def test_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    whole = small_checkpoint(tmp_path / "epoch=0-step=90.ckpt", 90)
    (tmp_path / "last.ckpt").symlink_to("epoch=0-step=120.ckpt")  # Lightning moves links last
    assert newest_checkpoint(tmp_path) == whole
    torn = small_checkpoint(tmp_path / "step-00000100.ckpt", 100)
    os.truncate(torn, 9000)
    flipped = small_checkpoint(tmp_path / "step-00000095.ckpt", 95)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    assert newest_checkpoint(tmp_path) == whole
    for path in (torn, flipped):
        assert f"passed over: {path} is no whole checkpoint" in caplog.text
    assert read_checkpoint(whole)["global_step"] == 90


class Payload:
    def __init__(self, leaves: Path):
        self.leaves = leaves

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.leaves),))


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "loops": Payload(tmp_path / "trace")}, path)
    with pytest.raises(ValueError, match=r"step-00000001\.ckpt is no whole checkpoint .*delete it"):
        CheckpointFiles().load_checkpoint(path, weights_only=False)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="is no checkpoint of Lightning"):
        read_checkpoint(path)
    assert not (tmp_path / "trace").exists()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files says the same as a disk without room."""
    before = small_checkpoint(tmp_path / "step-00000001.ckpt", 1)
    read, write = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try:
            small_checkpoint(tmp_path / "step-00000002.ckpt", 2)
        except NotWritten as error:
            os.write(write, str(error).encode())

    assert in_child(work) == 0
    os.close(write)
    with os.fdopen(read) as said:
        message = said.read()
    assert message.startswith(f"{tmp_path / 'step-00000002.ckpt'} could not be written: ")
    assert "What was finished before is whole and stays" in message
    assert [p.name for p in tmp_path.iterdir()] == [before.name]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_wait_for_what_one_of_them_does_alone(strategy: str) -> None:
    """Tokenising or writing a large pool takes longer than the half hour of torch's default."""
    made: Any = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    assert made.strategy._timeout.days == 2
