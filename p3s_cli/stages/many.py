"""Many subjects one after the other, in one process whose base stays loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3s_cli.atomic import read_text
from p3s_cli.errors import InputError, P3SError
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.profile import located
from p3s_cli.stages.progress import Progress, silent
from p3s_cli.stages.tuning import FinetuneResult, finetune
from p3s_cli.subject import Subject


@dataclass(frozen=True)
class Failed:
    """A subject that could not be tuned: one sentence, and what `p3s finetune` would exit with for it alone."""

    subject: Path
    error: str
    exit_code: int


def read_jobs(path: Path | str) -> list[Path]:
    """The subject directories a text file names, one a line, relative to the file; lines with # first are comments.

    Raises InputError if it cannot be read or names none.
    """
    try:
        lines = [line.strip() for line in read_text(Path(path)).splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no short UTF-8 text"
        raise InputError(
            f"the jobs in {path} cannot be read ({reason}); give a text file, one directory a line"
        ) from error
    named = [Path(path).parent / line for line in lines if line and not line.startswith("#")]
    if not named:
        raise InputError(f"{path} names no subject directory; write one on each line")
    return named


def finetune_many(
    subject_dirs: Sequence[Path | str],
    model: str | None = None,
    vision: str = "clip",
    device: str = "auto",
    dtype: str = "auto",
    on_progress: Progress | None = None,
    **options: Any,
) -> list[FinetuneResult | Failed]:
    """`finetune` for each directory, with the same options; what one of them needs is loaded once for all.

    The results are those of single runs, byte for byte (CPU). A subject that fails is reported in its place
    and does not stop the others.
    """
    report, results = on_progress or silent, []
    family: Family | None = None
    for number, folder in enumerate(map(Path, subject_dirs), 1):
        tell = _numbered(report, number, len(subject_dirs), folder)
        try:
            wanted = located(model or Subject.open(folder).manifest.model)
            if family is None or family.source != wanted:
                family = None  # the one before is let go first
                family = load(wanted, device, dtype, vision)
            results.append(finetune(folder, vision=vision, family=family, on_progress=tell, **options))
        except (P3SError, OSError) as error:
            results.append(Failed(folder, str(error), getattr(error, "exit_code", 1)))
    return results


def _numbered(report: Progress, number: int, of: int, folder: Path) -> Progress:
    return lambda what, done, total: report(f"{folder.name} ({number} of {of}): {what}", done, total)
