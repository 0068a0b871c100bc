"""AdamW whose two moments take a byte each, for cards that cannot hold eight bytes a parameter.

Both moments are kept in blocks of 256 numbers as float8 (e4m3) with one fp32 scale a block; of the second
the root is kept, whose range is half as many decades. Parameters in bfloat16 are rounded stochastically,
because an update at lr 1e-5 is smaller than bfloat16's spacing and nearest rounding would lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 256
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 of any shape -> float8 codes (K, 256), as bytes, and scales (K, 1)."""
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / _LARGEST
    return (blocks / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def unpack(codes: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack`, up to float8's rounding (one part in 16), in the shape of `like`."""
    return (codes.view(torch.float8_e4m3fn).float() * scale).flatten()[: like.numel()].view(like.shape)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bfloat16, up or down with the probability that keeps the mean."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class AdamW8(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with packed moments. `seed` and the step decide the rounding."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        seed: int = 0,
    ):
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(parameter, group, index)

    def _update(self, parameter: Tensor, group: dict[str, Any], index: int) -> None:
        state, grad = self.state[parameter], parameter.grad.float()
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "root"):
                state[name], state[f"{name}_scale"] = pack(torch.zeros_like(grad))
        state["step"] += 1
        step, (b1, b2) = int(state["step"]), group["betas"]
        mean = unpack(state["exp_avg"], state["exp_avg_scale"], grad).lerp_(grad, 1 - b1)
        square = unpack(state["root"], state["root_scale"], grad).square_().mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = square.sqrt_()
        state["exp_avg"], state["exp_avg_scale"] = pack(mean)
        state["root"], state["root_scale"] = pack(root)
        moved = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        moved.addcdiv_(mean / (1 - b1**step), root / (1 - b2**step) ** 0.5 + group["eps"], value=-group["lr"])
        if parameter.dtype == torch.bfloat16:
            source = torch.Generator(parameter.device).manual_seed(hash((self._seed, step, index)) % 2**63)
            moved = round_stochastically(moved, source)
        parameter.copy_(moved)
