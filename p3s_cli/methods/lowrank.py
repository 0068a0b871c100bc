"""A trained control as a low-rank difference to what it started from.

    W = W_0 + U diag(s) V,   U (m, r), V (r, n): the r largest singular directions of W - W_0

W_0 is the frozen layer a weight of the copy was initialised from, and zero for the zero convolutions. It is taken in the
precision it was split in: rounding it to bfloat16 may move it by more than the factors leave out.
Convolutions are matrices (out, in * k * k). The factors are in eight bits, each column of U and row of V in steps of its
own, and s (r,) is the product of the two steps: at the same size, twice the rank of sixteen bits says more.
Vectors, matrices that this would not make smaller, and the little RNGR encoder, which begins at random, are kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from p3s_cli.paper.subject_copy import frozen_name
from p3s_cli.sd.determinism import seeded

_COPY = "copy."
_FACTORED = (_COPY, "zero_")  # what has a known beginning
_OVERSAMPLE, _ITERATIONS = 8, 4  # of the randomised SVD
RANK = 96  # 73 MB at SD v1-5's shape
_SMALLEST = 1e-30  # step, of a direction in which nothing differs


def split(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel, rank: int = RANK) -> dict[str, Tensor]:
    """The difference to the base: `<name>` in fp16 for what stays whole, `<name>.u`, `.v`, `.s` for what does not."""
    parts = {}
    for name, tensor in tensors.items():
        difference = tensor.float() - _start(name, tensor, unet)
        if worthwhile(name, tensor.shape, rank):
            parts |= {f"{name}.{part}": t for part, t in _in_eight_bits(difference.flatten(1), rank).items()}
        else:
            parts[name] = difference.half()
    return parts


def layout(
    shapes: Mapping[str, torch.Size], rank: int | None, eight_bits: bool = True
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `split` makes of tensors of these shapes, or of none of them without a rank: name -> dtype and shape.

    Without `eight_bits`, what it made in the days of format 1.
    """
    found = {}
    for name, shape in shapes.items():
        if rank is not None and worthwhile(name, shape, rank, eight_bits):
            r, kind = min(rank, shape[0], shape[1:].numel()), "I8" if eight_bits else "F16"
            found |= {f"{name}.u": (kind, (shape[0], r)), f"{name}.v": (kind, (r, shape[1:].numel()))}
            found |= {f"{name}.s": ("F32", (r,))} if eight_bits else {}
        else:
            found[name] = ("F16", tuple(shape))
    return found


def join(
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    unet: UNet2DConditionModel,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The control's tensors again, fp16. `shapes`: of each of them by name; `dtype`: of the base they were split from,
    to which this one, which must then be no coarser, is rounded."""
    tensors = {}
    for name, shape in shapes.items():
        if f"{name}.u" in parts:
            difference = _product(parts, name).view(shape)
        else:
            difference = parts[name].float().view(shape)
        tensors[name] = (_start(name, difference, unet, dtype) + difference).half()
    return tensors


def _start(name: str, like: Tensor, unet: UNet2DConditionModel, dtype: torch.dtype | None = None) -> Tensor:
    """What training began with: the frozen layer's weight for the copy, in this dtype; nothing for the rest."""
    if not name.startswith(_COPY):
        return torch.zeros_like(like, dtype=torch.float32)
    frozen = unet.get_parameter(frozen_name(name.removeprefix(_COPY), unet.config.layers_per_block))
    return frozen.to(dtype or frozen.dtype).float().to(like.device)


def _in_eight_bits(matrix: Tensor, rank: int) -> dict[str, Tensor]:
    u, v = factors(matrix, min(rank, *matrix.shape))
    steps = u.abs().amax(0).clamp(min=_SMALLEST) / 127, v.abs().amax(1).clamp(min=_SMALLEST) / 127
    u, v = (u / steps[0]).round().to(torch.int8), (v / steps[1][:, None]).round().to(torch.int8)
    return {"u": u, "v": v.contiguous(), "s": steps[0] * steps[1]}


def _product(parts: Mapping[str, Tensor], name: str) -> Tensor:
    u, v = parts[f"{name}.u"].float(), parts[f"{name}.v"].float()
    return (u * parts[f"{name}.s"] if f"{name}.s" in parts else u) @ v


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) with the singular values' roots in each; the same on every call."""
    if min(matrix.shape) <= 4 * rank:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with seeded(0):
            u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T


def worthwhile(name: str, shape: torch.Size, rank: int, eight_bits: bool = True) -> bool:
    """Whether this tensor goes in as two factors, which then take fewer bytes than it."""
    if not name.startswith(_FACTORED) or len(shape) < 2:
        return False
    rows, columns = shape[0], shape[1:].numel()
    return (_bytes(rows, columns, rank) if eight_bits else 2 * rank * (rows + columns)) < 2 * rows * columns


def _bytes(rows: int, columns: int, rank: int) -> int:
    """Of a matrix's factors, with a float32 for each direction."""
    return min(rank, rows, columns) * (rows + columns + 4)


def size(shapes: Mapping[str, torch.Size], rank: int | None) -> int:
    """Bytes of a control's tensors in fp16; with a rank, of its low-rank difference."""

    def taken(name: str, shape: torch.Size) -> int:
        if rank is None or not worthwhile(name, shape, rank):
            return 2 * shape.numel()
        return _bytes(shape[0], shape[1:].numel(), rank)

    return sum(taken(name, shape) for name, shape in shapes.items())


def error(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor], unet: UNet2DConditionModel) -> float:
    """Norm of what the factors leave out, relative to the norm of the differences they stand for."""
    left = total = 0.0
    for name, tensor in tensors.items():
        if f"{name}.u" in parts:
            difference = (tensor.float() - _start(name, tensor, unet)).flatten(1)
            left += (difference - _product(parts, name)).square().sum().item()
            total += difference.square().sum().item()
    return (left / total) ** 0.5 if total else 0.0
