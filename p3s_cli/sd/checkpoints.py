"""The state of a training run on disk: a folder of checkpoints, each committed whole, the newest kept.

step-00000120/state.safetensors   the tensors, and what the loop needs besides them
step-00000120/manifest.json       their sha256
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from p3s_cli.atomic import new_folder, replacing
from p3s_cli.errors import InputError, P3SError
from p3s_cli.sd.weights import load_tensors, save_tensors

_NAME = re.compile(r"step-(\d{8,})")
_STATE, _MANIFEST = "state.safetensors", "manifest.json"


def commit(folder: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Keep the state after `step` steps: written aside, flushed, renamed; only then are older ones removed.

    Raises P3SError when it cannot be written, or its folder was removed; the older ones are still there then.
    """
    if not folder.is_dir():
        raise P3SError(f"{folder} was removed while the run was on; nothing was saved")
    path = folder / f"step-{step:08d}"
    if not path.exists():  # a run is deterministic: the same step is the same state
        with new_folder(path) as temporary:
            digest = save_tensors(temporary / _STATE, tensors, metadata)
            with replacing(temporary / _MANIFEST) as manifest:
                manifest.write_text(json.dumps({"step": step, "sha256": digest}) + "\n")
    for old in _steps(folder)[1:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The newest whole state, or None where there is none. Those that are damaged are removed: they help nobody."""
    for path in _steps(folder):
        try:
            digest = json.loads((path / _MANIFEST).read_text())["sha256"]
            return load_tensors(path / _STATE, sha=digest)
        except (InputError, OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)
    return None


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)
