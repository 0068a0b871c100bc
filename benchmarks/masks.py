"""How good the masks are, step by step of the way. Prints a Markdown table.

    python benchmarks/masks.py                        # the default, group by group, and 20 random clicks a subject
    python benchmarks/masks.py --ablate               # every choice and the alternatives it beat, one row each
    python benchmarks/masks.py --ablate world         # the same on another set than selective_dev
    python benchmarks/masks.py --unaided              # without negative clicks: how good, and when it warns
    python benchmarks/masks.py --sheet contact.png    # DreamBench photos without truth, to be looked at

Real photos come from `P3S_DATA` or `../shared/data` and are read through its ViT-Tiny; `world` are drawn
look-alikes read through the bundled CLIP. Columns: `iou` and `boundary_f` (within 0.75 % of the diagonal)
of the subject's mask; `leak`, share of the other subjects inside it; `coverage` and `damage`, shares of
the other subjects and of the subject inside the negative mask; `clicks` and `worst_decile`, the mean IoU
over random clicks inside the truth and that of its worst tenth; `two_random`, the IoU with two of them
together (the manifest's extra clicks, where it has any); `more_clicks`, with the given click and these
two; `seconds` a photo, models loaded.
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
from mask_choices import CHOICES, made_with
from PIL import Image
from scipy import ndimage
from tables import last_line, machine, markdown

from p3s_cli import pictures
from p3s_cli.config import MaskConfig
from p3s_cli.paper.points import Selection
from p3s_cli.sd import images
from p3s_cli.sd.family import load
from p3s_cli.sd.vision import VisionTower
from p3s_cli.stages.reference import embedding, select_masks

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

    def __init__(self, tower: VisionTower, config: MaskConfig, cache: dict | None = None):
        self.tower, self.config, self._cache = tower, config, {} if cache is None else cache

    def features(self, photo: np.ndarray) -> tuple[torch.Tensor, float]:
        """Patch features, and the seconds it took to read them."""
        if id(photo) not in self._cache:  # its case lives as long as the reader
            read, started = embedding(self.tower, self.config), time.monotonic()
            self._cache[id(photo)] = read(images.to_tensor(Image.fromarray(photo))), time.monotonic() - started
        return self._cache[id(photo)]

    def select(self, case: Case, positive: list[Click], negative: list[Click]) -> Selection:
        pixels, (features, _) = images.to_tensor(Image.fromarray(case.photo)), self.features(case.photo)
        return select_masks(pixels, features, positive, negative, self.config)

    def __call__(self, case: Case, positive: list[Click]) -> tuple[np.ndarray, np.ndarray]:
        made = self.select(case, positive, case.negative)
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


def share(mask: np.ndarray, of: np.ndarray) -> float:
    """How much of a region a mask holds."""
    return float((mask & of).sum() / max(1, of.sum()))


def measure(reader: Reader, group: list[Case], random_clicks: int | None) -> dict[str, dict[str, float]]:
    """Scores by group, and of all of them together under "all"; None: of the given clicks alone."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, float]]] = {}
    wandering: dict[str, list[float]] = {}
    for case in group:
        row, found = scores(reader, case), []
        if random_clicks is not None:
            anywhere = [(float(c), float(r)) for r, c in rng.permutation(np.argwhere(case.truth))]
            extra = list(case.extra) or anywhere[:2]
            more, two = ([case.positive, *extra], extra)
            row |= {n: iou(reader(case, c)[0], case.truth) for n, c in (("more_clicks", more), ("two_random", two))}
            clicks = dict.fromkeys([*extra, *anywhere[:random_clicks]]) if random_clicks else ()
            found = [iou(reader(case, [c])[0], case.truth) for c in clicks]
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


def scores(reader: Reader, case: Case) -> dict[str, float]:
    """Of the given clicks, one positive and one on each other subject."""
    _, reading = reader.features(case.photo)
    started = time.monotonic()
    subject, negative = reader(case, [case.positive])
    seconds = reading + time.monotonic() - started
    other = np.any([np.zeros_like(case.truth), *case.others], axis=0)
    return {
        "iou": iou(subject, case.truth),
        "boundary_f": boundary_f(subject, case.truth),
        "leak": share(subject, other),
        "coverage": share(negative, other),
        "damage": share(negative, case.truth),
        "seconds": seconds,
    }


def ablate(tower: VisionTower, group: list[Case]) -> list[dict]:
    rows, read, depth = [], {}, tower.model.config.num_hidden_layers
    for choice in CHOICES:
        if max(choice.layers or (0,)) > depth:
            continue  # layers that only a deeper tower has
        with made_with(choice, tower) as config:
            cache = read.setdefault((config.recipe, tower.layers, tower.side), {})
            cases_here = group if choice.with_negative else [replace(c, negative=[]) for c in group]
            rows.append({"setting": choice.name, **measure(Reader(tower, config, cache), cases_here, None)["all"]})
        print(last_line(rows), flush=True)
    return rows


def unaided(reader: Reader, group: list[Case]) -> dict[str, float]:
    """Masks without any negative click, and whether the warnings come where they should.

    A mask is wrong if a fifth of it is off (IoU) or it holds a tenth of another subject.
    """
    rows, wrong, warned = [], [], []
    for case in group:
        made = reader.select(case, [case.positive], [])
        mask, others = made.subject.numpy(), np.any([np.zeros_like(case.truth), *case.others], axis=0)
        rows.append({"iou": iou(mask, case.truth), "leak": share(mask, others)})
        wrong.append(rows[-1]["iou"] < 0.8 or rows[-1]["leak"] > 0.1)
        warned.append(bool(made.warnings))
    wrong, warned = np.array(wrong), np.array(warned)
    counts = {
        "wrong": wrong,
        "wrong, warned of": wrong & warned,
        "right": ~wrong,
        "right, warned of": ~wrong & warned,
    }
    return {n: float(np.mean([r[n] for r in rows])) for n in rows[0]} | {n: int(v.sum()) for n, v in counts.items()}


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
    parser.add_argument("--ablate", nargs="?", const="selective_dev", choices=list(SETS), metavar="SET")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case of a set, for a first look")
    parser.add_argument("--unaided", action="store_true")
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
        tower = family.vision if args.ablate == "world" else photo_tower
        rows = ablate(tower, list(SETS[args.ablate]())[:: args.every])
    elif args.unaided:
        towers = {n: family.vision if n == "world" else photo_tower for n in args.sets}
        rows = [
            {"set": n, **unaided(Reader(t, MaskConfig()), list(SETS[n]())[:: args.every])} for n, t in towers.items()
        ]
    else:
        found = {}
        for name in args.sets:
            tower = family.vision if name == "world" else photo_tower
            groups = measure(Reader(tower, MaskConfig()), list(SETS[name]())[:: args.every], args.clicks)
            found[name] = groups.pop("all") | {"groups": groups}
        if args.json:
            return print(json.dumps(found))
        rows = [{"set": n, **{k: v for k, v in s.items() if k != "groups"}} for n, s in found.items()]
        rows += [{"set": f"  {g}", **v} for s in found.values() if len(s["groups"]) > 1 for g, v in s["groups"].items()]
    print(f"\n{machine()}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
