"""What the mask benchmark is run on: composites of real photos with true masks, and drawn look-alikes.

Real photos come from `P3S_DATA` or `../shared/data`. Subjects cut by the frame, touching ones and three of a
kind are made from the pasted DreamBench photos there by cropping, moving and mirroring the cut-outs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from p3s_cli.sd import images
from p3s_cli.world import seeds
from p3s_cli.world.render import click as middle
from p3s_cli.world.render import render
from p3s_cli.world.scenes import lookalike_scene

DATA = Path(os.environ.get("P3S_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
Click = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """A photo (H, W, 3) uint8, the truth of the subject and of all others (H, W), and one click on each."""

    group: str
    photo: np.ndarray
    truth: np.ndarray
    others: list[np.ndarray]
    positive: Click
    negative: list[Click]
    extra: tuple[Click, ...] = ()


def selective_dev() -> Iterator[Case]:
    folder = DATA / "selective_dev"
    groups = {"paste": "pasted", "concat": "side by side", "natural": "natural"}
    for record in json.loads((folder / "manifest.json").read_text()):
        photo = np.asarray(Image.open(folder / record["image"]).convert("RGB"))
        masks = [np.asarray(Image.open(folder / s["mask"]).convert("L")) > 127 for s in record["subjects"]]
        for task in record["tasks"]:
            k = task["target"]
            others = [m for i, m in enumerate(masks) if i != k]
            group = "three subjects" if len(masks) > 2 else groups[record["kind"]]
            extra = tuple(tuple(p) for p in record["subjects"][k]["extra_points"])
            negative = [tuple(p) for p in task["negative"]]
            yield Case(group, photo, masks[k], others, tuple(task["positive"][0]), negative, extra)


def cut_by_the_frame() -> Iterator[Case]:
    """The same photos, cropped so that the frame takes the outer third of the subject."""
    for case in selective_dev():
        columns = np.where(case.truth.any(0))[0]
        left, right = columns[0], columns[-1]
        third = (right - left) // 3
        keep = slice(left + third, None) if left < case.truth.shape[1] - right else slice(None, right - third)
        truth, others = case.truth[:, keep], [o[:, keep] for o in case.others]
        others = [o for o in others if o.sum() > 500]
        clicks = [deepest(o) for o in others]
        yield Case("cut by the frame", case.photo[:, keep], truth, others, deepest(truth), clicks)


def filling_the_frame() -> Iterator[Case]:
    """The same photos cropped to the middle of the subject, so that it touches all four sides of the frame."""
    for case in selective_dev():
        rows, columns = np.where(case.truth.any(1))[0], np.where(case.truth.any(0))[0]
        height, width = rows[-1] - rows[0], columns[-1] - columns[0]
        if min(height, width) < 160:
            continue
        window = (
            slice(rows[0] + height // 10, rows[-1] - height // 10),
            slice(columns[0] + width // 10, columns[-1] - width // 10),
        )
        truth, others = case.truth[window], [o[window] for o in case.others]
        others = [o for o in others if o.sum() > 500]
        clicks = [deepest(o) for o in others]
        yield Case("filling the frame", case.photo[window], truth, others, deepest(truth), clicks)


def three_of_a_kind() -> Iterator[Case]:
    """A mirrored copy of the subject pasted where there is room: the hardest look-alike, and three in the photo."""
    for case in selective_dev():
        if case.group != "pasted":
            continue
        mirrored, pixels = case.truth[:, ::-1], case.photo[:, ::-1]
        columns, width = np.where(mirrored.any(0))[0], mirrored.shape[1]
        taken = case.truth | case.others[0]
        shifts = range(-columns[0], width - columns[-1], 8)
        shift = min(shifts, key=lambda s: int((np.roll(mirrored, s, 1) & taken).sum()))
        copy = np.roll(mirrored, shift, 1)
        if (copy & taken).any():
            continue
        photo = np.where(copy[..., None], np.roll(pixels, shift, 1), case.photo)
        others = [*case.others, copy]
        yield Case("three of a kind", photo, case.truth, others, case.positive, [*case.negative, deepest(copy)])


def touching() -> Iterator[Case]:
    """The other subject cut out and set against the first, overlapping it a little, the photo cropped to both."""
    for case in selective_dev():
        if case.group != "pasted":
            continue
        rows, columns = np.where(case.truth)
        other_rows, other_columns = np.where(case.others[0])
        overlap = round(0.06 * (columns.max() - columns.min()))
        to_right = columns.mean() < case.truth.shape[1] / 2
        shift = (
            columns.max() - other_columns.min() - overlap if to_right else columns.min() - other_columns.max() + overlap
        )
        moved = np.roll(case.others[0], (round(rows.max() - other_rows.max()), shift), (0, 1))
        photo = case.photo.copy()
        photo[moved] = np.roll(case.photo, (round(rows.max() - other_rows.max()), shift), (0, 1))[moved]
        truth = case.truth & ~moved
        window = _around(truth | moved, 40)
        truth, moved, photo = truth[window], moved[window], photo[window]
        yield Case("touching", photo, truth, [moved], deepest(truth), [deepest(moved)])


def world(count: int = 24) -> Iterator[Case]:
    for k in range(count):
        pixels, masks = render([lookalike_scene(seeds.PAIRS + k)])
        photo = np.asarray(images.to_pil(pixels[0]))
        for i in (0, 1):
            truth, other = masks[0, i], masks[0, 1 - i]
            yield Case("world", photo, truth.numpy(), [other.numpy()], middle(truth), [middle(other)])


def deepest(mask: np.ndarray) -> Click:
    """The most interior pixel."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return float(column), float(row)


def _around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    return (
        slice(max(0, rows[0] - margin), rows[-1] + margin),
        slice(max(0, columns[0] - margin), columns[-1] + margin),
    )
