"""Photos under a coordinate grid, for choosing points without a mouse. No model in here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from p3s_cli import pictures
from p3s_cli.errors import InputError
from p3s_cli.sd import images
from p3s_cli.stages.clicks import twice

_GRID = "grid"  # what the picture says it is, and of which photo


def grid(photo: Path | str, output: Path | str | None = None) -> Path:
    """Write the upright photo under a labelled coordinate grid, for choosing points without a mouse.

    Returns the picture's path, `<stem>-grid.png` in the current folder by default. Raises InputError where that is the
    photo itself.
    """
    photo, path = Path(photo), _place(photo, output)
    _check_free(path, [photo])
    images.save_png(path, pictures.coordinate_grid(images.load_image(photo)), {_GRID: photo.name})
    return path


def grid_many(photos: Sequence[Path | str], output: Path | str | None = None) -> list[Path]:
    """`grid` for several photos. Raises InputError for two that would be one picture, and for several with one `output`."""
    if output is not None and len(photos) > 1:
        raise InputError("several photos make several grids; leave out --output, or give one photo")
    if output is None and (stem := twice(Path(p).stem for p in photos)):
        raise InputError(f"two of the photos would be {stem}-grid.png; give one of them by itself, with -o")
    for photo in photos:
        _check_free(_place(photo, output), photos)
    return [grid(photo, output) for photo in photos]


def _place(photo: Path | str, output: Path | str | None) -> Path:
    return Path(output) if output else Path(f"{Path(photo).stem}-grid.png")


def _check_free(path: Path, photos: Sequence[Path | str]) -> None:
    """Raises InputError if a grid would take the place of a photo, or of any other file but a grid."""
    for photo in map(Path, photos):
        if path.exists() and photo.exists() and path.samefile(photo):
            raise InputError(f"a grid would take the place of {photo} itself; name another file with --output")
    if path.exists() and _GRID not in (images.read_metadata(path) or {}):
        raise InputError(
            f"{path} is there already and is no grid of p3s's; name another file with --output, or remove it"
        )
