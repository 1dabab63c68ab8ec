"""Lightning's Trainer, made to stop when told to, without losing what it has done.

Lightning's own handlers of signals are left out: SIGTERM in `predict` ended with success, its
handler talks to other processes while they compute, and under SLURM it puts jobs back into the
queue. `tokenclean.interrupts` handles them instead.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.distributed.constants import default_pg_timeout

from tokenclean.checkpoints import CheckpointFiles, Checkpoints, newest_checkpoint

log = logging.getLogger(__name__)

#: seconds that other processes of a run get to end by themselves, and again when told to
_GRACE = 8.0

#: how long processes wait for what one of them does alone: tokenising, writing. One that dies ends
#: their connection at once, so nothing is waited for in vain.
PATIENCE = timedelta(days=2)

#: name of the strategy that splits layers over processes, for models that fit on no device whole
SHARDED = "fsdp2"
if SHARDED not in StrategyRegistry:
    StrategyRegistry.register(SHARDED, ModelParallelStrategy, "Decoder layers split by FSDP2")


class Trainer(lightning.Trainer):
    """Lightning's Trainer with whole checkpoints and steps that a signal does not tear."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._signal_connector = _NoSignals(self)
        strategy: Any = self.strategy
        if isinstance(strategy, ModelParallelStrategy):
            # One file, gathered on the first process: folders of shards are torn by a crash.
            strategy._save_distributed_checkpoint = False
        if getattr(strategy, "_timeout", None) == default_pg_timeout:
            strategy._timeout = PATIENCE
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = CheckpointFiles()

    def fit_within(self, folder: Path | None, model: Any, *data: Any, **named: Any) -> None:
        """`fit`, going on from the newest whole checkpoint of a folder if there is one.

        Checkpoints are kept there by `Checkpoints`; the caller deletes the folder when the result
        is published. Other ``ModelCheckpoint`` callbacks that name no folder write there as well.

        Args:
            folder: for checkpoints; None keeps none.
            model, data, named: as `fit` takes them.

        Raises:
            Stopped: if told to stop; a checkpoint was written before.
            ValueError: if a checkpoint cannot be written.
        """
        callbacks = _callbacks(self)
        callbacks[:] = [c for c in callbacks if not _is_default(c)]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and not callback.dirpath and folder:
                callback.dirpath = str(folder)
        # Last of all: what others do after a step belongs into the checkpoint.
        callbacks.append(Checkpoints(folder))
        found = None if folder is None else newest_checkpoint(folder)
        if found is not None:
            log.info("going on from %s", found)
        path = None if found is None else str(found)
        self.fit(model, *data, **named, ckpt_path=path, weights_only=True)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, with an end for processes that were started for it."""
        #: closed when all is done
        with ExitStack() as self.fitting:
            try:
                super().fit(*args, **kwargs)
            except BaseException:
                self._end_others()
                raise

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; what its launcher started ends with this process."""
        try:
            return super().predict(*args, **kwargs)
        except BaseException:
            self._end_others()
            raise

    def _end_others(self) -> None:
        """End what Lightning's own launcher started: nobody else would tell it."""
        started: list[subprocess.Popen[bytes]] = getattr(self.strategy.launcher, "procs", [])
        if not started:
            return
        # It would kill this process, too, on seeing one of them end.
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                thread.__dict__["_child_processes"] = []
        # Those that agreed to stop are on their way; others wait for this one until they are told.
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + _GRACE
            while time.monotonic() < until and any(p.poll() is None for p in started):
                time.sleep(0.05)
            for process in started:
                process.send_signal(number)


class _NoSignals(_SignalConnector):
    """Leaves every handler as it is."""

    def register_signal_handlers(self) -> None:
        pass


def _callbacks(trainer: Any) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def _is_default(callback: Callback) -> bool:
    """Whether this is what Lightning adds by itself."""
    return (
        type(callback) is ModelCheckpoint
        and callback.dirpath is None
        and callback.state_key == ModelCheckpoint().state_key
        and callback.filename is None
    )
