"""How good the masks are, step by step of the way. Prints a Markdown table.

    python benchmarks/masks.py                        # the default, group by group, and 20 random clicks a subject
    python benchmarks/masks.py --ablate               # every choice and the alternatives it beat, one row each
    python benchmarks/masks.py --sheet contact.png    # DreamBench photos without truth, to be looked at

Real photos come from `P3S_DATA` or `../shared/data` and are read through its ViT-Tiny; `world` are drawn
look-alikes read through the bundled CLIP. Columns: `iou` and `boundary_f` (within 0.75 % of the diagonal)
of the subject's mask; `leak`, share of the other subjects inside it; `coverage` and `damage`, shares of
the other subjects and of the subject inside the negative mask; `clicks` and `worst_decile`, the mean IoU
over random clicks inside the truth and that of its worst tenth; `more_clicks`, the IoU with the extra
clicks of the manifest as well (two more of them); `seconds` a photo, models loaded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import torch
from cases import DATA, Case, Click
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import random_walker
from tables import last_line, machine, markdown

from p3s_cli import pictures
from p3s_cli.config import MaskConfig
from p3s_cli.paper import points as literal
from p3s_cli.sd import images
from p3s_cli.sd.family import load
from p3s_cli.sd.vision import VisionTower
from p3s_cli.segment import select as segment
from p3s_cli.segment.prototypes import holding

SETS: dict[str, Callable[[], Iterator[Case]]] = {
    "selective_dev": cases.selective_dev,
    "cut": cases.cut_by_the_frame,
    "filling": cases.filling_the_frame,
    "touching": cases.touching,
    "three": cases.three_of_a_kind,
    "world": cases.world,
}


class Reader:
    """Masks of a case under one setting; the features of a photo are read once."""

    def __init__(self, tower: VisionTower, config: MaskConfig):
        self.tower, self.config, self._photo, self._features = tower, config, None, None

    def features(self, photo: np.ndarray) -> torch.Tensor:
        if self._photo is not photo:
            read = self.tower.native_patches if self.config.recipe == "paper" else self.tower.patches
            self._photo, self._features = photo, read(images.to_tensor(Image.fromarray(photo)))
        return self._features

    def __call__(self, case: Case, positive: list[Click]) -> tuple[np.ndarray, np.ndarray]:
        height, width = case.truth.shape
        sides = [[((x + 0.5) / width, (y + 0.5) / height) for x, y in clicks] for clicks in (positive, case.negative)]
        features = self.features(case.photo)
        if self.config.recipe == "paper":
            made = literal.select(features, *sides, (height, width), self.config)
        else:
            made = segment.select(images.to_tensor(Image.fromarray(case.photo)), features, *sides, self.config)
        return made.subject.numpy(), made.negative.numpy()


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / max(1, (mask | truth).sum()))


def boundary_f(mask: np.ndarray, truth: np.ndarray) -> float:
    tolerance = 0.0075 * np.hypot(*mask.shape)
    edges = [m ^ ndimage.binary_erosion(m) for m in (mask, truth)]
    if not edges[0].any():
        return 0.0
    near = [ndimage.distance_transform_edt(~e) <= tolerance for e in edges]
    precision, recall = near[1][edges[0]].mean(), near[0][edges[1]].mean()
    return float(2 * precision * recall / max(1e-9, precision + recall))


def measure(reader: Reader, group: list[Case], random_clicks: int) -> dict[str, dict[str, float]]:
    """Scores by group, and of all of them together under "all"."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, float]]] = {}
    wandering: dict[str, list[float]] = {}
    for case in group:
        started = time.monotonic()
        subject, negative = reader(case, [case.positive])
        seconds = time.monotonic() - started
        more = reader(case, [case.positive, *case.extra])[0] if case.extra and random_clicks else subject
        other = np.any(case.others, axis=0) if case.others else np.zeros_like(case.truth)
        share = lambda a, b: float((a & b).sum() / max(1, b.sum()))  # noqa: E731
        row = {
            "iou": iou(subject, case.truth),
            "boundary_f": boundary_f(subject, case.truth),
            "leak": share(subject, other),
            "coverage": share(negative, other),
            "damage": share(negative, case.truth),
            "more_clicks": iou(more, case.truth),
            "seconds": seconds,
        }
        inside = np.argwhere(case.truth)
        clicks = [*case.extra, *((float(c), float(r)) for r, c in rng.permutation(inside)[:random_clicks])]
        found = [iou(reader(case, [c])[0], case.truth) for c in clicks] if random_clicks else []
        for name in (case.group, "all"):
            rows.setdefault(name, []).append(row)
            wandering.setdefault(name, []).extend(found)
    table = {}
    for name, group in rows.items():
        table[name] = {key: float(np.mean([r[key] for r in group])) for key in group[0]}
        worst = sorted(wandering[name])[: max(1, len(wandering[name]) // 10)]
        if worst:
            table[name] |= {"clicks": float(np.mean(wandering[name])), "worst_decile": float(np.mean(worst))}
    return table


def walk(image, coarse, other, seeds, patch, band) -> np.ndarray:
    """The alternative to GrabCut: scikit-image's random walker in the same band."""
    inside, outside = ndimage.distance_transform_edt(coarse), ndimage.distance_transform_edt(~coarse)
    reach = min(band * patch, 0.6 * inside.max())
    labels = np.zeros(coarse.shape, np.int32)
    labels[inside > reach], labels[(outside > band * patch) | other] = 1, 2
    for seed in seeds:
        labels[seed] = 1
    rim = (inside > reach + 3) | (outside > band * patch + 3)
    labels[rim & (labels != 0)] = -1
    lab = rgb2lab(image) / 40
    walked = random_walker(lab, labels, beta=1000, mode="cg_j", tol=1e-2, channel_axis=-1) == 1
    return holding(walked | (inside > reach), inside > reach)


ABLATIONS: dict[str, dict] = {
    "paper: eq. 1-2, raw cosines": {"recipe": "paper"},
    "paper: eq. 1-2, maps rescaled": {"recipe": "paper", "similarity": "rescaled"},
    "prototypes, one round, no image edges": {"rounds": 1, "band": 0.0},
    "prototypes, no image edges": {"band": 0.0},
    "default": {},
    "edges by random walker, band 1": {"band": 1.0, "walker": True},
    "edges by random walker, band 2.5": {"walker": True},
    "band 1": {"band": 1.0},
    "band 1.5": {"band": 1.5},
    "band 3.5": {"band": 3.5},
    "one round": {"rounds": 1},
    "five rounds": {"rounds": 5},
    "one prototype a click": {"prototypes": 1},
    "eight prototypes a click": {"prototypes": 8},
    "likeness 1": {"likeness": 1.0},
    "likeness 0.5": {"likeness": 0.5},
    "likeness 0.3": {"likeness": 0.3},
    "no nearness to the clicks": {"nearness": 0.0},
    "twice the nearness": {"nearness": 0.5},
    "last layer": {"layers": (-1,)},
    "layer 8 of 12 alone": {"layers": (8,)},
    "half the resolution": {"side": 0.5},
}


def ablate(tower: VisionTower, group: list[Case]) -> list[dict]:
    rows, grabcut = [], segment.refine
    for name, options in ABLATIONS.items():
        options = dict(options)
        segment.refine = walk if options.pop("walker", False) else grabcut
        layers, side = tower.layers, tower.side
        tower.layers = options.pop("layers", layers)
        tower.side = round(side * options.pop("side", 1.0))
        rows.append({"setting": name, **measure(Reader(tower, replace(MaskConfig(), **options)), group, 0)["all"]})
        tower.layers, tower.side, segment.refine = layers, side, grabcut
        print(last_line(rows), flush=True)
    return rows


def sheet(tower: VisionTower, path: Path) -> None:
    """One photo of every DreamBench subject, clicked in the middle, no negative."""
    tiles = []
    for folder in sorted((DATA / "dreambench512/dataset").iterdir()):
        if not folder.is_dir():
            continue
        photo = np.asarray(Image.open(folder / "00.jpg").convert("RGB"))
        height, width = photo.shape[:2]
        case = Case("", photo, np.zeros((height, width), bool), [], (width / 2, height * 0.55), [])
        subject, negative = Reader(tower, MaskConfig())(case, [case.positive])
        shown = pictures.overlay(Image.fromarray(photo), subject, negative, [case.positive], [])
        tiles.append((folder.name, shown))
    rows = [("", tiles[i : i + 6]) for i in range(0, len(tiles), 6)]
    images.save_png(path, pictures.sheet(rows, "one click in the middle, no negative"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--clicks", type=int, default=20, help="random clicks for each subject")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    family = load("world")
    photo_tower = family.mask_tower(str(DATA / "vision/vit_tiny_patch16_224"))
    if args.sheet:
        return sheet(photo_tower, args.sheet)
    if args.ablate:
        rows = ablate(photo_tower, list(cases.selective_dev()))
    else:
        found = {}
        for name in args.sets:
            tower = family.vision if name == "world" else photo_tower
            groups = measure(Reader(tower, MaskConfig()), list(SETS[name]()), args.clicks)
            found[name] = groups.pop("all") | {"groups": groups}
        if args.json:
            return print(json.dumps(found))
        rows = [{"set": n, **{k: v for k, v in s.items() if k != "groups"}} for n, s in found.items()]
        rows += [{"set": f"  {g}", **v} for s in found.values() if len(s["groups"]) > 1 for g, v in s["groups"].items()]
    print(f"\n{machine()}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
