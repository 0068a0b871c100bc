"""Tensors on disk: safetensors with self-describing metadata, written whole or not at all. Pickle is never read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p3s_cli.atomic import replacing, sha256
from p3s_cli.errors import InputError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> str:
    """Write tensors and JSON-able metadata as one safetensors file. Returns the file's sha256."""
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # one JSON string under one key: safetensors metadata is unordered, and the file's hash must not depend on that
    described = {"p3s": json.dumps(metadata or {}, sort_keys=True)}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=described)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
    return sha256(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read a file of `save_tensors`: tensors by name, and the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("p3s", "{}"))
            return {k: file.get_tensor(k) for k in file.keys()}, metadata
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); make it again or restore it") from error
