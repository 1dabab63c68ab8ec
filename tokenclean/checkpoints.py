"""Checkpoints that survive: written whole or not at all, found again, read without running code.

A checkpoint is written beside its name, flushed, and renamed, on the file system where it stays.
The one before is deleted after that, so that whatever ends the process leaves at least one.
"""

from __future__ import annotations

import logging
import pickle
import pickletools
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from tokenclean import interrupts
from tokenclean.models.adapters import disk_errors
from tokenclean.publish import publish_file, writing_to

log = logging.getLogger(__name__)

#: training between two checkpoints inside an epoch
EVERY = timedelta(minutes=15)
#: what torch and zipfile say of a file that is damaged or something else
_UNREADABLE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError),
)
#: bytes of a checkpoint's pickle: all but the tensors
_PLAN_BYTES = 64 << 20
#: what such a pickle may name besides the types of storages
_CALLED = frozenset(
    {
        *("collections.OrderedDict", "collections.defaultdict", "builtins.set", "__builtin__.set"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
        *("torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"),
        *("torch.nn.parameter.Parameter", "torch.Size", "torch.device", "_codecs.encode"),
        *(f"torch.{name}" for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)),
    }
)


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, published like everything else, read as plain data."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            NotWritten: if the disk takes no more; what stood there before stays.
        """
        path = Path(path)
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(path) as partial, disk_errors(partial):
            torch.save(checkpoint, partial)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; never more than tensors and plain values.

        Raises:
            ValueError: if it is damaged, or holds something else.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path, whole: bool = True) -> dict[str, Any]:
    """A checkpoint's tensors and plain values, on the CPU.

    Args:
        whole: read all of it and compare it with its checksums; else the tensors stay on the disk.

    Raises:
        ValueError: if it is damaged, or holds something else.
    """
    remedy = "delete it, and the same command goes on from the one before, or from the start"
    try:
        with zipfile.ZipFile(path) as file:
            _check_plan(file, path.stat().st_size)
            if whole and (member := file.testzip()) is not None:
                raise ValueError(f"{member} is not what was written")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except _UNREADABLE as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is no whole checkpoint ({lines[0][:200]}); {remedy}") from error
    if not isinstance(found, dict) or not {"state_dict", "global_step", "loops"} <= set(found):
        raise ValueError(f"{path} is no checkpoint of Lightning; {remedy}")
    return found


def _check_plan(file: zipfile.ZipFile, size: int) -> None:
    """Refuse a checkpoint whose loading could take more memory than its file has bytes.

    torch keeps it from running code, but not from calling ``bytearray(10 ** 12)``, say: what its
    pickle calls is looked at, opcode by opcode, before any of it is made.

    Raises:
        ValueError: for what no checkpoint of ours holds.
    """
    members = file.infolist()
    if len({member.filename for member in members}) != len(members):
        raise ValueError("two of its members have one name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, as torch never writes it")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members are larger than it is")
    plans = [member for member in members if member.filename.split("/")[-1] == "data.pkl"]
    if len(plans) != 1 or plans[0].file_size > _PLAN_BYTES:
        raise ValueError("it holds no data.pkl of ordinary size")
    with file.open(plans[0]) as plan:
        for opcode, value, _ in pickletools.genops(plan):
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"its pickle holds {opcode.name}, which torch never writes")
            if opcode.name == "GLOBAL":
                module, _, name = str(value).partition(" ")
                storage = module == "torch" and name.endswith("Storage")
                if not storage and f"{module}.{name}" not in _CALLED:
                    raise ValueError(f"it names {module}.{name}, which no checkpoint needs")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a folder that got furthest, of those that are whole; None without one.

    Those that are damaged are passed over, with a warning.
    """
    steps: list[tuple[int, bool, Path]] = []
    # A link that Lightning kept may point to nothing, and else to one of the others.
    files = {path.resolve() for path in folder.glob("*.ckpt")} if folder.is_dir() else set()
    for path in sorted(files):
        if not path.is_file():
            continue
        try:
            step = int(read_checkpoint(path, whole=False)["global_step"])
            steps.append((step, path.name == file_name(step), path))
        except ValueError as error:
            log.warning("passed over: %s", error)
    for _, _, path in sorted(steps, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            log.warning("passed over: %s", error)
        else:
            return path
    return None


def file_name(step: int) -> str:
    """What `Checkpoints` calls the checkpoint after so many steps."""
    return f"step-{step:08d}.ckpt"


class Checkpoints(Checkpoint):
    """Keeps the newest checkpoint: at each epoch's end, every so often, and when told to stop.

    Signals wait for the end of a step; processes agree on which.

    Args:
        folder: where, or None to keep none.
        every: training time between two; `EVERY` by default.

    Raises:
        Stopped: from a hook, after a checkpoint, if the process was told to stop.
        ValueError: if processes start from different checkpoints.
    """

    def __init__(self, folder: Path | None, every: timedelta | None = None):
        self.folder, self.every = folder, EVERY if every is None else every
        self._last = 0.0
        self._saved = -1
        self._validating = False

    @property
    def state_key(self) -> str:
        # Lightning restores a callback's state by this name; there is none.
        return type(self).__qualname__

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.fitting.enter_context(interrupts.deferred())
        self._last = time.monotonic()
        self._saved = trainer.global_step
        if trainer.global_step:
            # A call that was killed may have left the one before, too.
            self._drop_others(trainer, trainer.global_step)
        if trainer.world_size > 1:
            step = torch.tensor([trainer.global_step], device=trainer.strategy.root_device)
            steps = trainer.strategy.all_gather(step).flatten().tolist()
            if len(set(steps)) > 1:
                raise ValueError(
                    f"processes would go on from different steps ({steps}): they do not see the "
                    f"same {self.folder}; put --outputs on a file system that all of them share"
                )

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # Lightning would leave out a validation that follows, if it went on from here.
        loop = trainer.fit_loop
        if trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        stop, due = self._agreed(trainer)
        if stop or due:
            self._save(trainer)
        if stop:
            raise interrupts.Stopped("after a step")

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        stop, due = self._agreed(trainer)
        # An epoch's validation may take long, and be cut off.
        if stop or due or trainer.is_last_batch:
            self._validating, self._saved = True, -1
            self._save(trainer)
        if stop:
            raise interrupts.Stopped("before validation")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._validating and self._agreed(trainer)[0]:
            raise interrupts.Stopped("during validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._validating = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._validating:
            # As Lightning notes a validation that was cut off; else it would be left out.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["started"] = counts["completed"] + 1
                counts["processed"] = counts["completed"]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._saved = -1  # the state has moved on since the last step's
        self._save(trainer)
        if self._agreed(trainer)[0]:
            raise interrupts.Stopped("after an epoch")

    def _agreed(self, trainer: Any) -> tuple[bool, bool]:
        """Whether any process was told to stop, and whether a checkpoint is due."""
        mine = (interrupts.requested(), time.monotonic() - self._last >= self.every.total_seconds())
        if trainer.world_size == 1:
            return mine
        asked: Tensor = torch.tensor(mine, dtype=torch.float32, device=trainer.strategy.root_device)
        stop, due = trainer.strategy.reduce(asked, reduce_op="sum").tolist()
        return stop > 0.0, due > 0.0

    def _save(self, trainer: Any) -> None:
        if self.folder is None or trainer.global_step == self._saved:
            return
        path = self.folder / file_name(trainer.global_step)
        trainer.save_checkpoint(path)
        self._saved, self._last = trainer.global_step, time.monotonic()
        self._drop_others(trainer, trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # A call that was killed after its last step may have left the one before, too.
        if self.folder is not None and (self.folder / file_name(trainer.global_step)).is_file():
            self._drop_others(trainer, trainer.global_step)

    def _drop_others(self, trainer: Any, step: int) -> None:
        if trainer.is_global_zero and self.folder is not None:
            for other in self.folder.glob("step-*.ckpt"):
                if other.name != file_name(step):
                    other.unlink(missing_ok=True)
