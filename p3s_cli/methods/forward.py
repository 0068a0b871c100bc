"""The two forward passes of P3S, as they are, compiled, or recorded as CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p3s_cli.errors import P3SError
from p3s_cli.paper.injection import Injection
from p3s_cli.paper.model import P3SControl, controlled_noise
from p3s_cli.sd.captured import Graphed


@dataclass(frozen=True)
class Forward:
    """`copy`: P3S eq. 6, `P3SControl.inject` of the control it is given first. `frozen`: eq. 9, `controlled_noise`."""

    copy: Callable[..., tuple[Injection, dict[str, Tensor]]] = P3SControl.inject
    frozen: Callable[..., Tensor] = controlled_noise


def forward(compiled: bool, captured: bool = False) -> Forward:
    """The passes; compiled ones at the first call, minutes of it, and again for other shapes of tensors.

    `captured`: as CUDA graphs of the caller's own, of which compiled passes have no need; for use without gradients.
    What either gives: `benchmarks/results/speed.md`, `speed-gpu.md`; compiled passes have been measured on a CPU alone.
    """
    if captured and not compiled:
        return Forward(Graphed(P3SControl.inject), Graphed(controlled_noise))
    return _compiled() if compiled else Forward()


@functools.cache
def _compiled() -> Forward:
    # once a process: what was traced for one subject serves every other of the same shapes
    return Forward(_telling(torch.compile(P3SControl.inject)), _telling(torch.compile(controlled_noise)))


def _telling(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with one sentence for a machine on which it cannot be."""

    @functools.wraps(compiled)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return compiled(*args, **options)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = " ".join(str(error).split("\n")[:2])  # which backend, and what it said
            raise P3SError(f"the model cannot be compiled on this machine ({reason}); leave out --compile") from error

    return call
