"""P3S eq. 11-12 and 14-15: what the control is trained with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from p3s_cli.config import AttentionReading


def denoising_loss(predicted: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """P3S eq. 14: the mean of ||noise - predicted||^2, optionally weighted per position (B, 1, h, w)."""
    error = (predicted.float() - noise.float()).square()
    if weight is None:
        return error.mean()
    return (error * weight).sum() / (weight.sum().clamp(min=1e-6) * error.shape[1])


def attention_consistency(copy_map: Tensor, frozen_map: Tensor, reading: AttentionReading) -> Tensor:
    """P3S eq. 11-12 for one layer: how far M_c (the copy's map) is from M_o. Maps (B, heads, N, M), fp32.

    avg = (sum M_c + sum M_o) / 2 is B heads N, as rows sum to 1. `printed`: mean of squares over avg.
    `sum`: sum of squares over avg, the squared error per query. `relative`: mean of squares over the
    squared mean entry.
    """
    squares = (copy_map - frozen_map).square()
    total = (copy_map.sum() + frozen_map.sum()) / 2
    if reading == "printed":
        return squares.mean() / total
    if reading == "sum":
        return squares.sum() / total
    if reading == "relative":
        return squares.mean() / (total / squares.numel()).square()
    raise ValueError(f"no reading of eq. 11-12 is called {reading!r}")


def total_loss(
    denoising: Tensor,
    copy_maps: Mapping[str, Tensor],
    frozen_maps: Mapping[str, Tensor],
    gamma: float,
    reading: AttentionReading,
    gradient: str = "copy",
) -> tuple[Tensor, Tensor]:
    """P3S eq. 15: L = L_LDM + gamma L_ac, L_ac the mean over the layers given. Returns (L, L_ac).

    With `gradient="copy"` the frozen U-Net's maps are targets; with "both" gradients flow into them too.
    """
    if reading == "off" or not copy_maps:
        return denoising, torch.zeros_like(denoising)
    targets = {n: m.detach() if gradient == "copy" else m for n, m in frozen_maps.items()}
    consistency = torch.stack([attention_consistency(copy_maps[n], targets[n], reading) for n in copy_maps]).mean()
    return denoising + gamma * consistency, consistency
