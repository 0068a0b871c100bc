"""What a low-rank export costs in identity, on the bundled family where the truth can be drawn.

python benchmarks/export.py FOLDER [--subjects 4] [--first 0] [--steps N] [--images 4] [--sampling-steps 50] [--ranks 4 8 16 48]

Identity: mean cosine, by the family's identity encoder, of the images with true renders of the chosen subject. `SD v1-5`:
the size of a control of this rank at the exact shape of SD v1-5. The widths of `world` are a tenth of SD v1-5's,
so that a rank here keeps a larger part of a matrix than it does there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from p3s_cli import stages
from p3s_cli.config import ControlConfig
from p3s_cli.methods import lowrank
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.single_file import CONFIGS
from p3s_cli.story import identity_encoder, true_pictures
from p3s_cli.world import seeds
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import lookalike_scene

PROMPT = "a [V] {} on the beach"


def sd15_shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
        control = P3SControl(unet, 1024, ControlConfig())
    return {n: p.shape for n, p in control.named_parameters()}


def subject(folder: Path, seed: int, steps: int | None, family: Family) -> tuple[Path, str, torch.Tensor]:
    """A tuned subject's directory, its class word, and the vectors of true renders of it."""
    scene = lookalike_scene(seed)
    pixels, masks = render([scene])
    photo, root, chosen = folder / f"{seed}.png", folder / str(seed), scene.subjects[0]
    images.save_png(photo, images.to_pil(pixels[0]))
    points = [click(masks[0, 0])], [click(masks[0, 1])]
    stages.mask(photo, *points, root, chosen.instance.category, family=family)
    stages.finetune(root, steps=steps, family=family)
    return root, chosen.instance.category, identity_encoder(family).images(true_pictures(chosen, seed))


def identity(root: Path, word: str, truth: torch.Tensor, arguments: argparse.Namespace, family: Family) -> float:
    made = stages.generate(root, PROMPT.format(word), n=arguments.images, steps=arguments.sampling_steps, family=family)
    vectors = identity_encoder(family).images([images.load_image(p) for p in made.images])
    return (vectors @ truth.T).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, help="number of the first subject")
    parser.add_argument("--steps", type=int, help="default: the family's")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 48])
    arguments = parser.parse_args()
    family, shapes = load("world"), sd15_shapes()
    numbers = range(seeds.PAIRS + arguments.first, seeds.PAIRS + arguments.first + arguments.subjects)
    tuned = [subject(arguments.folder, seed, arguments.steps, family) for seed in numbers]
    whole = [identity(*one, arguments, family) for one in tuned]
    mean = sum(whole) / len(whole)
    print(f"{time.strftime('%d %B %Y')}, world, {vars(arguments) | {'folder': '...'}}\n")
    print("| rank | error of the difference | identity | lost | size here | SD v1-5 |\n|---|---|---|---|---|---|")
    print(f"| whole | 0 | {mean:.4f} | - | - | {lowrank.size(shapes, None) / 1e6:.0f} MB |")
    for rank in arguments.ranks:
        scores, errors = [], []
        for root, word, truth in tuned:
            out = stages.export_subject(root, arguments.folder / "x.p3s.safetensors", rank, family=family)
            copy = arguments.folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            stages.import_subject(out.file, copy, family=family)
            scores.append(identity(copy, word, truth, arguments, family))
            errors.append(out.error)
        score, error = sum(scores) / len(scores), sum(errors) / len(errors)
        lost, size = 1 - score / mean, lowrank.size(shapes, rank) / 1e6
        print(f"| {rank} | {error:.3f} | {score:.4f} | {lost:+.2%} | {out.bytes / 1e6:.2f} MB | {size:.0f} MB |")


if __name__ == "__main__":
    main()
