"""The same bits every time. On the CPU that is so anyway, with the same versions and number of threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from p3s_cli.errors import P3SError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def exact(wanted: bool) -> Iterator[None]:
    """If wanted, only kernels that repeat bit for bit, also on CUDA. As found on exit.

    cuDNN then neither chooses by timing nor sums in any order; TF32 stays as it is, as it rounds the same way every
    time. Memory that is about to be written is not filled before: that would only find faults of ours. Raises P3SError
    where torch has no such kernel, or cuBLAS was used before without its workspace being fixed.
    """
    if not wanted:
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    os.environ[_CUBLAS] = ":4096:8"  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        told = _sentence(error)
        if told is None:
            raise
        raise told from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = filled
        if workspace is None:
            del os.environ[_CUBLAS]
        else:
            os.environ[_CUBLAS] = workspace


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside from torch's own generators is decided by the seed; they go on as if nothing had been, on every device that is in use."""
    cards = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cards):
        torch.manual_seed(seed)
        yield


def _sentence(error: RuntimeError) -> P3SError | None:
    """None for an error that is about something else."""
    words = str(error)
    if _CUBLAS in words:
        return P3SError(
            f"this process has used CUDA before without --deterministic; start a new one, or set {_CUBLAS}=:4096:8 for it"
        )
    if "deterministic implementation" in words:
        return P3SError(f"{words.split(',')[0]} on this device; leave out --deterministic")
    return None
