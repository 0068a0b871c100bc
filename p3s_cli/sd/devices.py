"""Where models work and in which precision: `auto`, or what was named; and how their weights lie there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from p3s_cli.errors import InputError


def resolve_device(name: str) -> str:
    """`auto` prefers CUDA, then MPS, then the CPU. Raises InputError where the asked one is absent."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = {"cuda": cards, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return next(kind for kind, devices in count.items() if devices)
    try:
        device = torch.device(name)
    except RuntimeError:  # such as cpu:abc
        device = None
    if device is None or device.type not in count:
        raise InputError(f"no device is called {name!r}; choose one of: auto, cuda, mps, cpu")
    if (device.index or 0) >= count[device.type]:
        raise InputError(f"this machine has no {name} device that torch can use; try --device auto")
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float16 on cards that only emulate that (before Ampere), float32 elsewhere."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return _half(device) if device.startswith("cuda") else torch.float32
    if name not in kinds:
        raise InputError(f"no dtype is called {name!r}; choose one of: auto, {', '.join(kinds)}")
    return kinds[name]


def _half(device: str) -> torch.dtype:
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextlib.contextmanager
def channels_last(device: str, dtype: torch.dtype, *modules: nn.Module) -> Iterator[None]:
    """Convolutions' weights in the layout that cuDNN's kernels of half precision want; as found on exit, and elsewhere.

    Without it they turn what they are given, and turn back what they give: a sixth of a training step on a card
    (benchmarks/results/speed-gpu.md).
    """
    if not (device.startswith("cuda") and dtype != torch.float32):
        yield
        return
    filed = [m for m in modules if not _is_channels_last(m)]
    try:
        for module in filed:
            module.to(memory_format=torch.channels_last)
        yield
    finally:
        for module in filed:
            module.to(memory_format=torch.contiguous_format)


def _is_channels_last(module: nn.Module) -> bool:
    weights = [p for p in module.parameters() if p.dim() == 4]
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
