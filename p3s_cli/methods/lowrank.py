"""A trained control as a low-rank difference to what it started from.

    W = W_0 + U V,   U (m, r), V (r, n): the r largest singular directions of W - W_0

W_0 is the frozen layer a weight of the copy was initialised from, and zero for the zero convolutions.
Convolutions are matrices (out, in * k * k). Vectors, matrices that r(m + n) numbers would not make smaller,
and the little RNGR encoder, which begins at random, are kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from p3s_cli.paper.subject_copy import frozen_name

_COPY = "copy."
_FACTORED = (_COPY, "zero_")  # what has a known beginning
_OVERSAMPLE, _ITERATIONS = 8, 4  # of the randomised SVD
RANK = 48  # 73 MB at SD v1-5's shape


def split(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel, rank: int = RANK) -> dict[str, Tensor]:
    """The difference to the base: `<name>` for what stays whole, `<name>.u` and `<name>.v` for what does not, fp16."""
    parts = {}
    for name, tensor in tensors.items():
        difference = tensor.float() - _start(name, tensor, unet)
        if worthwhile(name, tensor.shape, rank):
            u, v = factors(difference.flatten(1), rank)
            parts |= {f"{name}.u": u.half(), f"{name}.v": v.half()}
        else:
            parts[name] = difference.half()
    return parts


def layout(shapes: Mapping[str, torch.Size], rank: int | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `split` makes of tensors of these shapes, or of none of them without a rank: name -> dtype and shape."""
    found = {}
    for name, shape in shapes.items():
        if rank is not None and worthwhile(name, shape, rank):
            found |= {f"{name}.u": ("F16", (shape[0], rank)), f"{name}.v": ("F16", (rank, shape[1:].numel()))}
        else:
            found[name] = ("F16", tuple(shape))
    return found


def join(
    parts: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], unet: UNet2DConditionModel
) -> dict[str, Tensor]:
    """The control's tensors again, fp16. `shapes`: of each of them by name."""
    tensors = {}
    for name, shape in shapes.items():
        if f"{name}.u" in parts:
            difference = (parts[f"{name}.u"].float() @ parts[f"{name}.v"].float()).view(shape)
        else:
            difference = parts[name].float().view(shape)
        tensors[name] = (_start(name, difference, unet) + difference).half()
    return tensors


def _start(name: str, like: Tensor, unet: UNet2DConditionModel) -> Tensor:
    """What training began with: the frozen layer's weight for the copy, nothing for the rest."""
    if not name.startswith(_COPY):
        return torch.zeros_like(like, dtype=torch.float32)
    return (
        unet.get_parameter(frozen_name(name.removeprefix(_COPY), unet.config.layers_per_block)).float().to(like.device)
    )


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) with the singular values' roots in each; the same on every call."""
    if min(matrix.shape) <= 4 * rank:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T


def worthwhile(name: str, shape: torch.Size, rank: int) -> bool:
    """Whether this tensor goes in as two factors, which then hold fewer numbers than it."""
    rows, columns = shape[0] if len(shape) else 1, shape[1:].numel()
    return name.startswith(_FACTORED) and len(shape) > 1 and rank * (rows + columns) < rows * columns


def size(shapes: Mapping[str, torch.Size], rank: int | None) -> int:
    """Bytes of a control's tensors in fp16; with a rank, of its low-rank difference."""

    def numbers(name: str, shape: torch.Size) -> int:
        if rank is None or not worthwhile(name, shape, rank):
            return shape.numel()
        return rank * (shape[0] + shape[1:].numel())

    return 2 * sum(numbers(name, shape) for name, shape in shapes.items())


def error(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor], unet: UNet2DConditionModel) -> float:
    """Norm of what the factors leave out, relative to the norm of the differences they stand for."""
    left = total = 0.0
    for name, tensor in tensors.items():
        if f"{name}.u" in parts:
            difference = (tensor.float() - _start(name, tensor, unet)).flatten(1)
            left += (difference - parts[f"{name}.u"].float() @ parts[f"{name}.v"].float()).square().sum().item()
            total += difference.square().sum().item()
    return (left / total) ** 0.5 if total else 0.0
