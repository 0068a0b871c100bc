"""Tensors on disk: safetensors with self-describing metadata, written whole or not at all, checked before
they are believed. Pickle is never read.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p3s_cli import signals
from p3s_cli.atomic import replacing, sha256
from p3s_cli.errors import InputError

SCHEMA = 1  # of the metadata; a file without it is of version 1
HEADER_LIMIT = 1_000_000  # bytes: a million empty tensors take 17 s and 2 GB otherwise
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I64": 8, "F16": 2, "BF16": 2, "F32": 4}  # what p3s writes, in bytes

# What a file must hold: by name, safetensors' word for the dtype and the shape; None is any size.
Layout = Mapping[str, tuple[str, tuple[int | None, ...]]]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> str:
    """Write tensors and JSON-able metadata as one safetensors file. Returns the file's sha256."""
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # one JSON string under one key: safetensors metadata is unordered, and the file's hash must not depend on that
    described = {"p3s": json.dumps({"schema": SCHEMA, **(metadata or {})}, sort_keys=True)}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=described)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        return sha256(temporary)


def load_tensors(
    path: Path, layout: Layout | None = None, sha: str | None = None, perhaps: Layout | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Read a file of `save_tensors`: tensors by name, and the metadata. What is in `perhaps` may be there as well.

    Size, header, names, dtypes, shapes and hash are checked before a tensor is read, and its numbers for
    being finite after. Raises InputError for whatever is not as it should be.
    """
    with _sentence(path):
        metadata = _check_header(path, layout, perhaps)
        if sha is not None and sha256(path) != sha:
            raise ValueError("its hash is not the one recorded for it")
        # an exception that a signal raises inside would be lost in the library, which says that the file is damaged
        with signals.deferred(), safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        return tensors, metadata


@contextlib.contextmanager
def _sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged or not made by p3s ({error}); restore it or make it again") from error


def check_layout(found: Layout, wanted: Layout, perhaps: Layout | None = None) -> None:
    """Raises ValueError unless names, dtypes and shapes are exactly those wanted, and those in `perhaps` or some of them."""
    wanted = {**wanted, **{name: entry for name, entry in (perhaps or {}).items() if name in found}}
    if found.keys() != wanted.keys():
        other = sorted(found.keys() ^ wanted.keys())[0]
        raise ValueError(f"{other} is {'missing' if other in wanted else 'not expected'} in it")
    for name, (dtype, shape) in wanted.items():
        its_dtype, its_shape = found[name]
        fits = len(shape) == len(its_shape) and all(w in (None, s) for w, s in zip(shape, its_shape, strict=True))
        if its_dtype != dtype or not fits:
            raise ValueError(f"{name} is {its_dtype}{list(its_shape)} instead of {dtype}{list(shape)}")


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Names and shapes; dtypes are left out, where a model takes any."""
    return {name: ("", tuple(t.shape)) for name, t in tensors.items()}


def load_metadata(path: Path) -> dict:
    """The metadata of a file of `save_tensors`, whose header is checked. Raises as `load_tensors`."""
    with _sentence(path):
        return _check_header(path, None)


def _check_header(path: Path, layout: Layout | None, perhaps: Layout | None = None) -> dict:
    """Returns the metadata. Raises ValueError for a header that does not describe exactly this file."""
    if not path.is_file() and path.exists():
        raise ValueError("it is no file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_LIMIT, size - 8):
            raise ValueError(f"its header of {length} bytes is longer than {HEADER_LIMIT} or than the file")
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    described = header.pop("__metadata__", {})
    entries = {name: _entry(name, value) for name, value in header.items()}
    expected = 8 + length + sum(_SIZES[dtype] * math.prod(shape) for dtype, shape in entries.values())
    if expected != size:
        raise ValueError(f"it has {size} bytes instead of {expected}")
    if layout is not None:
        check_layout(entries, layout, perhaps)
    return _metadata(described)


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...]]:
    shape = value.get("shape") if isinstance(value, dict) else None
    dtype = value.get("dtype") if isinstance(value, dict) else None
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if not whole or not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"its header does not describe {name!r:.80} as p3s does")
    return dtype, tuple(shape)


def _metadata(described: Any) -> dict:
    text = described.get("p3s", "{}") if isinstance(described, dict) else None
    metadata = json.loads(text) if isinstance(text, str) else None
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    schema = metadata.get("schema", 1)
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r:.20}, and this version of p3s reads {SCHEMA}")
    return metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found
