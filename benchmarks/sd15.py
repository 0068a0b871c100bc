"""Mask, finetune and generate on Stable Diffusion v1-5's exact shape with random weights: times and memory.

python benchmarks/sd15.py FOLDER [--layout single] [--reduced] [--steps 20] [--sampling-steps 20] [--images 4]
                                 [--memory auto] [--inpainter classical] [--device auto] [--dtype auto]

Writes FOLDER/diffusers (a diffusers folder with its CLIP pair) and FOLDER/single.safetensors (the original
layout) in bfloat16, unless they are there, and prints a table of the stages on the one or the other. `--reduced` narrows every model, to see that
all runs where no GPU is; its numbers say nothing about SD v1-5. Random weights draw noise; only speed and
memory mean anything here.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.original_layout import original_layout  # noqa: E402
from p3s_cli import stages  # noqa: E402
from p3s_cli.methods import memory as needs  # noqa: E402
from p3s_cli.sd import images, profile  # noqa: E402
from p3s_cli.sd.family import Family, load  # noqa: E402
from p3s_cli.sd.single_file import CONFIGS  # noqa: E402
from p3s_cli.sd.vision import ClipPair  # noqa: E402
from p3s_cli.sd.vocabulary import clip_tokenizer  # noqa: E402
from p3s_cli.world import seeds
from p3s_cli.world.render import render  # noqa: E402
from p3s_cli.world.scenes import lookalike_scene  # noqa: E402

FLOORS = {"H200": {"finetune": 4.8, "generate": 3.8}, "3090": {"finetune": 54.0, "generate": 42.0}}  # ms a step
NARROW = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64, "sample_size": 16},
    "vae": {"block_out_channels": [32, 32, 32, 32], "sample_size": 128},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
}


def config(part: str, reduced: bool) -> dict:
    own = json.loads((CONFIGS / part / "config.json").read_text())
    return own | (NARROW[part] if reduced else {})


def write(folder: Path, reduced: bool) -> None:
    """A diffusers folder and a single file with the same random weights."""
    torch.manual_seed(0)
    dtype, root = torch.bfloat16, folder / "diffusers"
    text = CLIPTextConfig(**config("text_encoder", reduced))
    unet = UNet2DConditionModel.from_config(config("unet", reduced)).to(dtype)
    vae = AutoencoderKL.from_config(config("vae", reduced)).to(dtype)
    encoder = CLIPTextModel(text).to(dtype)
    for name, model in (("unet", unet), ("vae", vae), ("text_encoder", encoder)):
        model.save_pretrained(root / name)
    state = {k: v.contiguous() for k, v in original_layout(unet, vae, encoder).items()}
    save_file(state, folder / "single.safetensors")
    del unet, vae, encoder, state
    CLIPModel(pair_config(reduced)).to(dtype).save_pretrained(root / "clip")
    write_settings(root, reduced)


def pair_config(reduced: bool) -> CLIPConfig:
    text, vision = CLIPTextConfig(**config("text_encoder", reduced)), config("vision", reduced)
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=vision["projection_dim"])


def write_settings(root: Path, reduced: bool) -> None:
    """All of the diffusers folder but its weights."""
    (root / "clip").mkdir(parents=True, exist_ok=True)
    half = [0.5, 0.5, 0.5]
    (root / "clip/preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": half}))
    DDIMScheduler.from_pretrained(CONFIGS / "scheduler").save_pretrained(root / "scheduler")
    clip_tokenizer().save_pretrained(root / "tokenizer")
    own = replace(profile.find("sd15"), name=root.name, base=".", clip="clip", inpainter=".")
    if reduced:
        own = replace(own, image_size=128, feature_layers=(2, 3), feature_side=112)
    (root / "p3s.json").write_text(json.dumps(asdict(own)))


def in_memory(root: Path, reduced: bool, device: str) -> Family:
    """The same family in bfloat16 on a card and float32 elsewhere, made on the device itself: no weights are written."""
    for name in ("unet", "vae", "text_encoder"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(config(name, reduced)))
    write_settings(root, reduced)
    family = load(str(root), device, inpainter="classical")
    torch.manual_seed(0)
    with torch.device(family.device):
        made = {
            "unet": UNet2DConditionModel.from_config(config("unet", reduced)),
            "vae": AutoencoderKL.from_config(config("vae", reduced)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config("text_encoder", reduced))),
        }
        pair = CLIPModel(pair_config(reduced))
    for model in (*made.values(), pair):
        model.to(family.dtype).eval().requires_grad_(False)
    own, half = family.profile, [0.5, 0.5, 0.5]
    tower = ClipPair(pair, family.tokenizer, half, half, own.feature_layers, own.feature_side)
    family.__dict__.update(made, vision=tower, fingerprint="random")  # in the place of what is loaded at first use
    return family


class Meter:
    """Seconds between the steps a stage reports, and its peak memory."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith(("tuning", "images")):
            if self.cuda:
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    def row(self, stage: str, seconds: float) -> str:
        gaps = sorted(b - a for a, b in zip(self.marks, self.marks[1:], strict=False))
        step = f"{1000 * gaps[len(gaps) // 2]:.1f}" if gaps else "-"
        peak = (
            torch.cuda.max_memory_allocated()
            if self.cuda
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        return f"| {stage} | {seconds:.1f} | {step} | {peak / 1e9:.2f} |"


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """One row a stage, as it ends: seconds in all, median milliseconds a step, peak memory."""
    where = {"device": arguments.device, "dtype": arguments.dtype, "inpainter": arguments.inpainter}
    if arguments.layout == "single":  # which has no CLIP pair in it
        family = load(str(folder / "single.safetensors"), vision=str(folder / "diffusers/clip"), **where)
    else:
        family = load(str(folder / "diffusers"), **where)
    work = folder / f"subject-{arguments.layout}"
    if "mask" in arguments.only:
        shutil.rmtree(work, ignore_errors=True)
    scene = lookalike_scene(seeds.SINGLE + 7)
    photo = folder / "photo.png"
    images.save_png(photo, images.to_pil(render([scene])[0][0]))
    left, right = scene.subjects
    runs = {
        "mask": lambda meter: stages.mask(
            photo, [(left.x, left.y)], [(right.x, right.y)], work, "dog", family=family, on_progress=meter
        ),
        "finetune": lambda meter: stages.finetune(
            work, steps=arguments.steps, memory=arguments.memory, family=family, on_progress=meter
        ),
        "generate": lambda meter: stages.generate(
            work,
            "a [V] dog on the beach",
            n=arguments.images,
            steps=arguments.sampling_steps,
            memory=arguments.memory,
            family=family,
            on_progress=meter,
        ),
    }
    for name, run in ((n, r) for n, r in runs.items() if n in arguments.only):
        meter, start = Meter(), time.perf_counter()
        run(meter)
        yield meter.row(name, time.perf_counter() - start)
    sizes = needs.Sizes.of(family.profile)
    yield f"\nparameters: U-Net {sizes.unet / 1e6:.1f} M, control {sizes.control / 1e6:.1f} M"
    yield f"control on disk: {(work / 'control/control.safetensors').stat().st_size / 1e6:.1f} MB"


def check_single(folder: Path, reduced: bool) -> str:
    """The single file gives the folder's tensors; at the exact shape only, whose configurations it is read with."""
    if reduced:
        return "single file: not read back, as its configurations are those of the exact shape"
    one, other = (
        load(str(folder / n), "cpu", "bfloat16").unet.state_dict() for n in ("single.safetensors", "diffusers")
    )
    return f"single file and folder agree: {all(torch.equal(one[n], other[n]) for n in other)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("folder", "single"), default="folder", help="what the stages load")
    stages_ = ("mask", "finetune", "generate")
    parser.add_argument("--only", nargs="+", choices=stages_, default=stages_, help="after an earlier run's others")
    parser.add_argument("--reduced", action="store_true", help="narrow models, in a folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--memory", default="auto")
    parser.add_argument(
        "--inpainter", help="of the mask stage; default the base's own U-Net; classical spares a CPU an hour"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    if arguments.reduced and arguments.layout == "single":
        parser.error("a single file is read with SD v1-5's own configurations; leave out --reduced or --layout single")
    if not (arguments.folder / "diffusers/p3s.json").exists():
        write(arguments.folder, arguments.reduced)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"# SD v1-5's shape, random weights{' - REDUCED, not SD v1-5' if arguments.reduced else ''}\n")
    print(
        f"{where}; torch {torch.__version__}; {arguments.steps} training and {arguments.sampling_steps} sampling steps; "
        f"{arguments.layout}\n"
    )
    print("| stage | seconds | ms a step | peak GB |\n|---|---|---|---|")
    for row in measure(arguments.folder, arguments):
        print(row, flush=True)
    print(check_single(arguments.folder, arguments.reduced))
    floors = [f"{name} {f['finetune']:g} (finetune), {f['generate']:g} (generate)" for name, f in FLOORS.items()]
    print("floors at the exact shape, ms a step and sample: " + "; ".join(floors))


if __name__ == "__main__":
    main()
