"""Compare the readings that the paper leaves open, on the bundled family. Prints a Markdown table.

    python benchmarks/readings.py control --subjects 4  # injection, attention loss, training data
    python benchmarks/readings.py guidance              # s_i and s_t of one tuned subject

How masks are found is compared by `masks.py`. Scenes are held-out pairs of look-alikes. Columns of the control table: `selective`, share of images
nearer to true renders of the chosen subject than of the other; `identity`, mean CLIP cosine with true
renders of the chosen subject (`other`: with those of the other one); `background` and `category`, share
of images whose prompt CLIP recognises among all of the world's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tables import last_line, machine, markdown

from p3s_cli import stages
from p3s_cli.config import ControlConfig
from p3s_cli.demo import true_vectors
from p3s_cli.evals.metrics import nearer
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, load
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import BACKGROUNDS, lookalike_scene

FIRST_SCENE = 21_000_000
PLACES = ("beach", "snow", "jungle", "pink fabric")

CONTROLS: dict[str, Callable[[ControlConfig], ControlConfig]] = {
    "default": lambda c: c,
    "injection literal": lambda c: replace(c, injection="literal"),
    "L_ac printed": lambda c: replace(c, attention_loss="printed"),
    "L_ac relative": lambda c: replace(c, attention_loss="relative"),
    "L_ac off": lambda c: replace(c, attention_loss="off"),
    "L_ac gradient both": lambda c: replace(c, attention_gradient="both"),
    "augment joint": lambda c: replace(c, augment="joint"),
    "augment independent": lambda c: replace(c, augment="independent"),
    "background kept": lambda c: replace(c, reference_background="keep"),
    "loss over the whole image": lambda c: replace(c, background_weight=1.0),
}


class Bench:
    """Held-out subjects, masked once, and the scores of what a setting makes of them."""

    def __init__(self, family: Family, subjects: int, folder: Path):
        self.family, self.folder, self.scenes = (
            family,
            folder,
            [lookalike_scene(FIRST_SCENE + k) for k in range(subjects)],
        )
        place_names = [f"a photo {phrases[0]}" for phrases in BACKGROUNDS.values()]
        self.places = family.vision.embed_text(place_names)
        self.nouns = family.vision.embed_text([f"a photo of a {n}" for n in family.profile.nouns])
        for k, scene in enumerate(self.scenes):
            pixels, truth = render([scene])
            images.save_png(folder / f"{k}.png", images.to_pil(pixels[0]))
            stages.mask(
                folder / f"{k}.png",
                [click(truth[0, 0])],
                [click(truth[0, 1])],
                folder / str(k),
                self.noun(k),
                family=family,
            )

    def noun(self, k: int) -> str:
        return self.scenes[k].subjects[0].instance.category

    def tune(self, control: ControlConfig, steps: int | None) -> None:
        for k in range(len(self.scenes)):
            stages.finetune(self.folder / str(k), steps=steps, family=self.family, control=control)

    def score(self, **sampling) -> dict[str, float]:
        """Two images for each subject and place."""
        found = {"selective": [], "identity": [], "other": [], "background": [], "category": []}
        for k, scene in enumerate(self.scenes):
            chosen, other = (true_vectors(self.family, p, 500 + k) for p in scene.subjects)
            for place in PLACES:
                prompt = f"a [V] {self.noun(k)} {BACKGROUNDS[place][0]}"
                made = stages.generate(self.folder / str(k), prompt, n=2, family=self.family, **sampling)
                vectors = self.family.vision.embed(
                    torch.stack([images.to_tensor(images.load_image(p)) for p in made.images])
                )
                found["selective"] += nearer(vectors, chosen, other).tolist()
                found["identity"] += (vectors @ chosen.T).mean(1).tolist()
                found["other"] += (vectors @ other.T).mean(1).tolist()
                found["background"] += ((vectors @ self.places.T).argmax(1) == list(BACKGROUNDS).index(place)).tolist()
                found["category"] += (
                    (vectors @ self.nouns.T).argmax(1) == self.family.profile.nouns.index(self.noun(k))
                ).tolist()
        return {name: sum(values) / len(values) for name, values in found.items()}

    def calibration(self) -> dict[str, float]:
        """What `identity` and `other` are for true renders of the chosen subject."""
        own, other = [], []
        for k, scene in enumerate(self.scenes):
            chosen, stranger = (true_vectors(self.family, p, 500 + k) for p in scene.subjects)
            fresh = true_vectors(self.family, scene.subjects[0], 900 + k)
            own.append((fresh @ chosen.T).mean().item())
            other.append((fresh @ stranger.T).mean().item())
        return {"identity of true renders": sum(own) / len(own), "with the other": sum(other) / len(other)}


def control(family: Family, subjects: int, steps: int | None, only: list[str] | None) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(family, subjects, Path(folder))
        print(json.dumps(bench.calibration()), flush=True)
        for name in only or CONTROLS:
            started = time.monotonic()
            bench.tune(CONTROLS[name](ControlConfig()), steps)
            seconds = (time.monotonic() - started) / subjects
            rows.append({"setting": name, **bench.score(), "tuning s": seconds})
            print(last_line(rows), flush=True)
    return rows


def guidance(family: Family, subjects: int, steps: int | None) -> list[dict]:
    """One tuning, many ways of sampling it."""
    ways = [
        {},
        {"subject_guidance": family.profile.guidance},
        {"subject_guidance": 2.0},
        {"guidance": 3.0},
        {"guidance": 7.5},
    ]
    ways += [{"strength": s} for s in (0.7, 1.3)] + [
        {"schedule": s} for s in ("fixed", "increasing", "decreasing", "off")
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(family, subjects, Path(folder))
        bench.tune(ControlConfig(), steps)
        for way in ways:
            rows.append({"setting": ", ".join(f"{k} {v}" for k, v in way.items()) or "default", **bench.score(**way)})
            print(last_line(rows), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["control", "guidance"])
    parser.add_argument("--model", default="world")
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--steps", type=int, help="tuning steps; default the family's")
    parser.add_argument("--only", nargs="+", choices=list(CONTROLS))
    args = parser.parse_args()
    family = load(args.model)
    if args.what == "control":
        rows = control(family, args.subjects, args.steps, args.only)
    else:
        rows = guidance(family, args.subjects, args.steps)
    print(f"\n{machine()}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
