"""What the machine at hand has: free memory, speed of matrix products."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

import torch


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be taken on a device.

    CUDA: what the driver and this process's own allocator have left. CPU: ``MemAvailable`` of
    /proc/meminfo; where there is no such file (macOS) half of the physical memory.
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@cache
def matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of square matrix products in ``dtype``, measured for about so many seconds."""
    device = torch.device(device)
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    with torch.no_grad():
        left @ right  # the first call sets things up
        started, products = settled(device), 0
        while (now := settled(device)) - started < seconds:
            for _ in range(4):
                left @ right
            products += 4
    return products * 2.0 * size**3 / (now - started)


def settled(device: torch.device | str) -> float:
    """The clock, in seconds, once everything queued on a device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
