"""What several processes tell one another about a pool that they select from together.

Each holds a contiguous range of the pool's blocks, the first process the first range. To agree on a
mask they exchange sums of integers alone: histograms add up, a count before a process is a sum with
the later ones left out, and arrays end to end are a sum of arrays that are zero elsewhere. Integer
sums do not depend on their order, so neither does a mask on the number of processes. Process 0 then
asks the others for theirs, piece by piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np

#: Tokens whose mask is sent at a time, and so what process 0 holds of the others' masks: 4 MB.
PIECE = 1 << 22


@dataclass
class Exchange:
    """One process among several; by itself by default, where everything is its own.

    Every method but `part` is to be called by all processes, in the same order.

    Attributes:
        rank: number of this process.
        processes: how many there are.
        group: a `torch.distributed` group of all of them that moves CPU tensors (gloo).
    """

    rank: int = 0
    processes: int = 1
    group: Any = None
    #: All have heard of an error, or the connection is gone: there is nobody left to tell.
    _over: bool = field(default=False, init=False, repr=False)

    def part(self, count: int) -> slice:
        """Which of ``count`` blocks are this process's: a contiguous range, perhaps empty."""
        return slice(count * self.rank // self.processes, count * (self.rank + 1) // self.processes)

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """Sum over all processes.

        Args:
            counts: int64, of the same shape in every process.

        Raises:
            ValueError: if another process has met an error.
            ConnectionError: if one is gone without a word.
        """
        if self.processes == 1:
            return counts
        self._raise_others(self._tell(None))
        return self._reduced(counts)

    def before(self, count: int) -> int:
        """Sum of the counts of the earlier processes."""
        return int(self._counts(count)[: self.rank].sum())

    def gather(self, values: np.ndarray) -> np.ndarray:
        """The arrays of all processes, end to end in their order.

        Args:
            values: of a type of 8 bytes, shape (n,); n may differ between processes.
        """
        if self.processes == 1:
            return values
        counts = self._counts(len(values))
        start = int(counts[: self.rank].sum())
        bits = np.zeros(int(counts.sum()), dtype=np.int64)
        bits[start : start + len(values)] = np.ascontiguousarray(values).view(np.int64)
        return self.sum(bits).view(values.dtype)

    def to_first(self, mask: np.ndarray) -> Iterator[np.ndarray]:
        """The masks of all processes, end to end in their order, for process 0 to read.

        All are to run through what is returned, to its end: process 0 asks for the next piece when
        it wants it, and the others send theirs.

        Args:
            mask: bool, shape (n,); n may differ between processes.

        Returns:
            Pieces of at most `PIECE` tokens, bool; the other processes get none.

        Raises:
            ValueError: if another process has met an error.
            ConnectionError: if one is gone without a word.
        """
        return self._pieces(mask, self._counts(len(mask)).tolist())

    def _pieces(self, mask: np.ndarray, counts: list[int]) -> Iterator[np.ndarray]:
        for rank, count in enumerate(counts):
            for start in range(0, count, PIECE):
                stop = min(start + PIECE, count)
                if rank > 0:  # or process 0 has it
                    self._raise_others(self._tell(None))
                if self.rank not in (0, rank):
                    continue
                piece = mask[start:stop] if self.rank == rank else np.zeros(stop - start, bool)
                if rank > 0:
                    self._pass(piece, rank)
                if self.rank == 0:
                    yield piece

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(np.zeros(1, dtype=np.int64))

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the block together, or all with an error if one of them has one.

        Without it the others would wait for a process that has met an error.

        Raises:
            ValueError: if another process has met an error, with its message.
        """
        try:
            yield
            self.barrier()
        except Exception as error:
            if self.processes > 1 and not self._over:
                self._tell(str(error) or type(error).__name__)
            raise

    def _counts(self, count: int) -> np.ndarray:
        """Every process's count, int64, shape (processes,)."""
        counts = np.zeros(self.processes, dtype=np.int64)
        counts[self.rank] = count
        return self.sum(counts)

    def _reduced(self, counts: np.ndarray) -> np.ndarray:
        import torch
        import torch.distributed as dist

        total = counts.copy()
        if total.size:
            self._over = True  # unless it comes back
            try:
                dist.all_reduce(torch.from_numpy(total), group=self.group)
            except RuntimeError as error:
                raise ConnectionError(f"another process is gone: {error}") from error
            self._over = False
        return total

    def _pass(self, piece: np.ndarray, sender: int) -> None:
        """Send a piece to process 0, or receive it there from its sender."""
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(piece.view(np.uint8))
        self._over = True  # unless it arrives
        try:
            if self.rank == sender:
                dist.send(tensor, 0, self.group)
            else:
                dist.recv(tensor, sender, self.group)
        except RuntimeError as error:
            raise ConnectionError(f"another process is gone: {error}") from error
        self._over = False

    def _tell(self, error: str | None) -> dict[int, str]:
        """Tell the others of an error, or that there is none; process -> message of those met."""
        import torch.distributed as dist

        if not self._reduced(np.array([error is not None], dtype=np.int64))[0]:
            return {}
        self._over = True
        messages: list[Any] = [None] * self.processes
        dist.all_gather_object(messages, error, group=self.group)
        return {rank: text for rank, text in enumerate(messages) if text is not None}

    @staticmethod
    def _raise_others(errors: dict[int, str]) -> None:
        if errors:
            rank, text = next(iter(errors.items()))
            raise ValueError(f"process {rank}: {text}")


def join() -> Exchange:
    """`here`, after connecting the processes that torchrun started, where nothing else does."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return here()


def here() -> Exchange:
    """Among the processes of the initialised `torch.distributed` group, if there is one."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Exchange()
    return Exchange(dist.get_rank(), dist.get_world_size(), _cpu_group(dist.group.WORLD))


@lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """A group of the same processes for CPU tensors; made once, by all of them."""
    import torch.distributed as dist

    # Some wait long for what only one of them does; if one dies the connection ends at once.
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))
