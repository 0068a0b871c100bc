"""Train the bundled family from nothing: tokenizer, autoencoder, CLIP pair, U-Net, readers; then export it.

    python -m p3s_cli.world.recipe vae --work runs/world          # one stage
    python -m p3s_cli.world.recipe all --work runs/world --device cuda
    python -m p3s_cli.world.recipe reopen --work runs/more        # the committed family, to train it further

Every stage resumes from its checkpoint, so `--until` cuts a long run into pieces. Scenes are drawn
on the training device. Training scenes have seeds below 10,000,000; held-out ones start there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from p3s_cli.sd.determinism import exact
from p3s_cli.world.recipe.autoencoder import stage_vae
from p3s_cli.world.recipe.contrast import stage_clip, stage_tokenizer
from p3s_cli.world.recipe.denoiser import stage_unet
from p3s_cli.world.recipe.export import stage_export, stage_reopen
from p3s_cli.world.recipe.readers import stage_identity, stage_labels
from p3s_cli.world.recipe.reward import stage_reward, stage_unet_reward
from p3s_cli.world.recipe.vision import stage_vision, stage_vision_fresh
from p3s_cli.world.recipe.words import stage_words
from p3s_cli.world.recipe.workshop import SCENES, Workshop

STAGES: dict[str, Callable[[Workshop], None]] = {
    "tokenizer": stage_tokenizer,
    "vae": stage_vae,
    "clip": stage_clip,
    "words": stage_words,
    "vision": stage_vision,
    "vision_fresh": stage_vision_fresh,
    "unet": stage_unet,
    "reward": stage_reward,
    "unet_reward": stage_unet_reward,
    "labels": stage_labels,
    "identity": stage_identity,
    "export": stage_export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="+", choices=[*STAGES, "all", "reopen"])
    parser.add_argument("--work", type=Path, default=Path("runs/world"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes to draw")
    parser.add_argument("--steps", type=int, help="length of the whole stage, instead of the recipe's")
    parser.add_argument("--batch", type=int, help="samples a step, instead of the recipe's, which are a GPU's")
    parser.add_argument("--until", type=int, help="stop before this step; a later call goes on")
    parser.add_argument(
        "--compile", action="store_true", help="compile the U-Net: minutes at first, then 1.4x the rate"
    )
    args = parser.parse_args()
    shop = Workshop(args.work, args.device, args.seed, args.scenes, args.steps, args.batch, args.until, args.compile)
    with exact(args.device != "cpu"):
        for stage in STAGES if args.stage == ["all"] else args.stage:
            started = time.monotonic()
            (stage_reopen if stage == "reopen" else STAGES[stage])(shop)
            shop.log(stage, {"seconds": round(time.monotonic() - started, 1)})


if __name__ == "__main__":
    main()
