"""Tensors inside dataclasses, dicts, lists and tuples: taken out in order, put back in order, told by their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor


def tensors(value: Any) -> list[Tensor]:
    """All that are in `value`, in order."""
    found: list[Tensor] = []
    shape(value, found)
    return found


def shape(value: Any, found: list[Tensor]) -> Hashable:
    """Equal for values in which nothing but the numbers in the tensors differs, models told by who they are; the tensors are
    added to `found`, in order.
    """
    if isinstance(value, Tensor):
        found.append(value)
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return "dict", *((k, shape(v, found)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(shape(v, found) for v in value)
    if dataclasses.is_dataclass(value):
        return type(value), *(shape(getattr(value, f.name), found) for f in dataclasses.fields(value))
    return value if isinstance(value, (int, float, str, bool, frozenset, type(None))) else id(value)


def filled(value: Any, new: Iterator[Tensor]) -> Any:
    """`value` with other tensors in it, in the order of `shape`."""
    if isinstance(value, Tensor):
        return next(new)
    if isinstance(value, dict):
        return {k: filled(v, new) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([filled(v, new) for v in value])
    if dataclasses.is_dataclass(value):
        fields = {f.name: filled(getattr(value, f.name), new) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
