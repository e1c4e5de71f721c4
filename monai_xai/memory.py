"""Additional memory of a piece of work, at its peak."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """What a block takes over what was there before, at its peak: ``gib`` afterwards.

    Of a GPU, what PyTorch has allocated there; else of this process, which Linux tells. NaN where nothing tells.

    Args:
        device: where the work is done.

    Example:
        >>> with PeakMemory() as peak:
        ...     _ = torch.ones(2**20)
        >>> peak.gib >= 0 or math.isnan(peak.gib)
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.gib = math.nan
        self._before = math.nan

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            with suppress(OSError):
                _CLEAR.write_text("5")  # the peak begins anew
                self._before = _read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if not math.isnan(self._before):
            is_gpu = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self.device) if is_gpu else _read("VmHWM")
            self.gib = max(peak - self._before, 0) / GIB


def _read(field: str) -> float:
    lines = _STATUS.read_text().splitlines()
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), math.nan)


def _strided(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree that have a storage: not the sparse ones."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]


class LiveTensors(TorchDispatchMode):
    """The bytes of the tensors that are made in a block and alive at once, at their peak: ``peak`` afterwards.

    Exact and the same on every device, but blind to what a kernel allocates for itself.

    Example:
        >>> with LiveTensors() as live:
        ...     for _ in range(3):
        ...         _ = torch.ones(256, dtype=torch.float32) + 1
        >>> live.peak
        2048

    Views of what was there before do not count:

        >>> ones = torch.ones(256)
        >>> with LiveTensors() as live:
        ...     _ = ones[:2] + 1
        >>> live.peak
        8
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held = 0  # bytes of these, of which some may be gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in _strided((args, kwargs))}
        for x in _strided(results):
            if (storage := x.untyped_storage())._cdata not in given:
                self._note(StorageWeakRef(storage), storage.nbytes())
        if self._held > self.peak:  # else those that are gone would not change the peak
            self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
            self._held = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._held)
        return results

    def _note(self, reference: StorageWeakRef, size: int) -> None:
        _, before = self._alive.get(reference.cdata, (None, 0))
        self._alive[reference.cdata] = reference, size
        self._held += size - before
