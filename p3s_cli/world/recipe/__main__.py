"""Train the bundled family from nothing: tokenizer -> vae -> clip -> vision -> unet -> unet_long -> export.

    python -m p3s_cli.world.recipe vae --work runs/world          # one stage
    python -m p3s_cli.world.recipe all --work runs/world --device cuda

Every stage resumes from its checkpoint, so `--until` cuts a long run into pieces. Scenes are drawn
on the training device. Training scenes have seeds below 10,000,000; held-out ones start there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from p3s_cli.sd.train import Checkpoint, Recipe, train
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.world import models
from p3s_cli.world.render import render
from p3s_cli.world.scenes import BACKGROUNDS, SIZE, caption, sample_scene

HELD_OUT = 10_000_000

STEPS = {"vae": 7_500, "clip": 1_400, "vision": 900, "unet": 4_800, "unet_long": 7_500}
BATCH = {"vae": 16, "clip": 96, "vision": 96, "unet": 32, "unet_long": 32}
LEARNING_RATE = {"vae": 2e-3, "clip": 1e-3, "vision": 7e-4, "unet": 5e-4, "unet_long": 5e-4}
SCENES = 32_000


class Pool:
    """Training scenes, drawn once and kept as bytes, with fresh captions at every visit."""

    def __init__(self, size: int, device: str):
        self.scenes = [sample_scene(seed) for seed in range(size)]
        images, subjects = [], []
        for i in range(0, size, 64):
            pixels, masks = render(self.scenes[i : i + 64], device)
            images.append((255 * pixels).round().to(torch.uint8))
            subjects.append((255 * F.avg_pool2d(masks.amax(1, keepdim=True).float(), 8)).round().to(torch.uint8))
        self._by_place = {
            b: torch.tensor([i for i, s in enumerate(self.scenes) if s.background == b]) for b in BACKGROUNDS
        }
        self.images = torch.cat(images)  # (N, 3, 128, 128)
        self.subjects = torch.cat(subjects).cpu()  # (N, 1, 16, 16), the share of each latent pixel in 0..255

    def pixels(self, index: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1]."""
        return self.images[index.to(self.images.device)].float() / 127.5 - 1

    def captions(self, index: Tensor, generator: torch.Generator) -> list[str]:
        salt = torch.randint(2**31, (len(index),), generator=generator).tolist()
        return [caption(self.scenes[i], s) for i, s in zip(index.tolist(), salt, strict=True)]

    def draw_alike(self, n: int, generator: torch.Generator) -> Tensor:
        """Scenes that share one background."""
        places = list(BACKGROUNDS)
        place = places[int(torch.randint(len(places), (1,), generator=generator))]
        rows = self._by_place[place]
        return rows[torch.randint(len(rows), (n,), generator=generator)]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.scenes), (n,), generator=generator)


class Workshop:
    """One run of the recipe: where its files are, on which device, how it reports."""

    def __init__(self, work: Path, device: str, seed: int, scenes: int, steps: int | None, until: int | None):
        self.work, self.device, self.seed, self.steps, self.until = work, device, seed, steps, until
        self.family = work / "family"
        self._scenes, self._pool = scenes, None

    @property
    def pool(self) -> Pool:
        if self._pool is None:
            started = time.monotonic()
            self._pool = Pool(self._scenes, self.device)
            self.log("scenes", {"drawn": self._scenes, "seconds": round(time.monotonic() - started, 1)})
        return self._pool

    def log(self, stage: str, row: dict) -> None:
        line = json.dumps({"stage": stage, **row})
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "log.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16)

    def fit(self, stage: str, module: nn.Module, loss: Callable, weight_decay: float, ema: float) -> None:
        """Train all of `module`, leaving the weights to keep in it."""
        steps = self.steps or STEPS[stage]
        recipe = Recipe(
            steps,
            LEARNING_RATE[stage],
            weight_decay,
            warmup=min(200, steps // 10),
            decay="cosine",
            ema=ema,
            seed=self.seed,
            betas=(0.9, 0.99),
        )
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        started, first = time.monotonic(), [None]

        def on_step(step: int, total: int, numbers: dict[str, float]) -> None:
            first[0] = first[0] or step
            if step % 50 == 0 or step == total:
                rate = (step - first[0] + 1) * BATCH[stage] / (time.monotonic() - started)
                self.log(
                    stage,
                    {
                        "step": step,
                        "of": total,
                        "samples_per_s": round(rate, 1),
                        **{k: round(v, 5) for k, v in numbers.items()},
                    },
                )

        keep = train(
            trained,
            loss,
            recipe,
            on_step,
            Checkpoint(self.work / f"{stage}.safetensors", 90),
            self.until,
        )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(keep[name])


def stage_tokenizer(shop: Workshop) -> None:
    captions = [caption(sample_scene(seed), seed) for seed in range(20_000)]
    tokenizer = models.build_tokenizer(captions, shop.family / "tokenizer")
    shop.log("tokenizer", {"tokens": len(tokenizer)})


def stage_vae(shop: Workshop) -> None:
    """L1 + MSE + 1e-6 KL on 64 px crops, three of four around a subject, where the patterns are."""
    torch.manual_seed(shop.seed)
    vae = models.build_vae().to(shop.device)
    crop = 64

    def corner(index: int, u: float, v: float, w: float) -> tuple[int, int]:
        subjects = shop.pool.scenes[index].subjects
        if w < 0.75:
            at = subjects[int(w / 0.75 * len(subjects))]
            x, y = at.x - crop / 2 + 48 * (u - 0.5), at.y - crop / 2 + 48 * (v - 0.5)
        else:
            x, y = u * (SIZE - crop), v * (SIZE - crop)
        return int(min(max(x, 0), SIZE - crop)), int(min(max(y, 0), SIZE - crop))

    def loss(step: int, generator: torch.Generator):
        index = shop.pool.draw(BATCH["vae"], generator)
        chance = torch.rand(len(index), 3, generator=generator).tolist()
        corners = [corner(i, *c) for i, c in zip(index.tolist(), chance, strict=True)]
        pixels = shop.pool.pixels(index)
        x = torch.stack([p[:, b : b + crop, a : a + crop] for p, (a, b) in zip(pixels, corners, strict=True)])
        with shop.autocast():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - x
        value = error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()
        psnr = -10 * torch.log10(error.square().mean() / 4)
        return value, {"psnr": psnr.item()}

    shop.fit("vae", vae, loss, weight_decay=0.0, ema=0.998)
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(shop.pool.pixels(torch.arange(i, i + 32))).latent_dist.mean for i in range(0, 512, 32)]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(shop.family / "vae")
    shop.log("vae", {"scaling_factor": vae.config.scaling_factor})


def stage_clip(shop: Workshop) -> None:
    """Both CLIP towers, by symmetric contrast; most steps show a quarter of the patches (FLIP, arXiv:2212.00794)."""
    torch.manual_seed(shop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = models.build_clip(tokenizer).to(shop.device)
    _contrast(shop, "clip", clip, tokenizer, shown=lambda progress: 0.25 if progress < 0.94 else 1.0, alike=0.0)


def stage_vision(shop: Workshop) -> None:
    """The vision tower alone goes on, towards the locked text tower (LiT, arXiv:2111.07991), which the U-Net reads.

    Half of the batches share one background, so that categories and looks have to be told apart, and at
    the end all patches are shown: from a quarter of them no outline can be learnt.
    """
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    clip = CLIPModel.from_pretrained(shop.family / "clip").to(shop.device)
    clip.text_model.requires_grad_(False)
    _contrast(shop, "vision", clip, tokenizer, shown=lambda progress: 0.5 if progress < 0.75 else 1.0, alike=0.5)


def _contrast(
    shop: Workshop, stage: str, clip: CLIPModel, tokenizer: CLIPTokenizer, shown: Callable, alike: float
) -> None:
    """Train `clip`; `shown` gives the share of patches by progress, `alike` the share of one-background batches."""
    steps = shop.steps or STEPS[stage]
    patches = (SIZE // clip.config.vision_config.patch_size) ** 2

    def image_vector(pixels: Tensor, keep: Tensor) -> Tensor:
        tower = clip.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels)[:, keep])
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return clip.visual_projection(tower.post_layernorm(hidden[:, 0]))

    def loss(step: int, generator: torch.Generator):
        one_place = alike > 0 and torch.rand(1, generator=generator).item() < alike
        index = (shop.pool.draw_alike if one_place else shop.pool.draw)(BATCH[stage], generator)
        order = torch.randperm(patches, generator=generator)[: round(shown(step / steps) * patches)] + 1
        keep = torch.cat((torch.zeros(1, dtype=torch.long), order)).to(shop.device)
        tokens = tokenizer(shop.pool.captions(index, generator), padding=True, return_tensors="pt").to(shop.device)
        with shop.autocast():
            image = F.normalize(image_vector(shop.pool.pixels(index), keep).float(), dim=-1)
            text = clip.text_projection(clip.text_model(**tokens).pooler_output).float()
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ F.normalize(text, dim=-1).T
        target = torch.arange(len(index), device=shop.device)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return value, {"accuracy": (logits.argmax(1) == target).float().mean().item()}

    shop.fit(stage, clip, loss, weight_decay=0.05, ema=0.0)
    clip.save_pretrained(shop.family / "clip")


def stage_unet(shop: Workshop) -> None:
    """Noise prediction from random weights."""
    torch.manual_seed(shop.seed)
    _denoise(shop, "unet", models.build_unet().to(shop.device), subject_weight=1.0)


def stage_unet_long(shop: Workshop) -> None:
    """A second, longer round from the averaged weights of the first, in which subjects weigh three times the ground.

    The first round learns the eight grounds and leaves the categories rough; what is left to learn is in
    the subjects, which cover a fifth of the latents.
    """
    unet = UNet2DConditionModel.from_pretrained(shop.family / "unet").to(shop.device)
    _denoise(shop, "unet_long", unet, subject_weight=3.0)


def _denoise(shop: Workshop, stage: str, unet: UNet2DConditionModel, subject_weight: float) -> None:
    """Noise prediction with min-SNR weights (arXiv:2303.09556, gamma 5); a tenth of the captions dropped."""
    tokenizer = CLIPTokenizer.from_pretrained(shop.family / "tokenizer")
    text_model = CLIPModel.from_pretrained(shop.family / "clip").text_model.to(shop.device).eval()
    scheduler = models.build_scheduler()
    latents, subjects = _latents(shop)
    alphas = scheduler.alphas_cumprod.to(shop.device)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return text_model(ids.to(shop.device)).last_hidden_state

    def loss(step: int, generator: torch.Generator):
        index = shop.pool.draw(BATCH[stage], generator)
        dropped = torch.rand(len(index), generator=generator) < 0.1
        captions = ["" if d else c for c, d in zip(shop.pool.captions(index, generator), dropped.tolist(), strict=True)]
        x0 = latents[index].to(shop.device)
        weight = 1 + (subject_weight - 1) * subjects[index].to(shop.device).float() / 255
        noise = torch.randn(x0.shape, generator=generator).to(shop.device)
        t = torch.randint(1000, (len(index),), generator=generator).to(shop.device)
        with shop.autocast():
            eps = unet(scheduler.add_noise(x0, noise, t), t, encode(captions)).sample
        snr = alphas[t] / (1 - alphas[t])
        error = (weight * (eps.float() - noise).square()).mean((1, 2, 3)) / weight.mean((1, 2, 3))
        return (error * snr.clamp(max=5) / snr).mean(), {}

    shop.fit(stage, unet, loss, weight_decay=0.01, ema=0.999)
    unet.save_pretrained(shop.family / "unet")


@torch.no_grad()
def _latents(shop: Workshop) -> tuple[Tensor, Tensor]:
    """Scaled latents (N, 4, 16, 16) of every training scene and how much of each is subject (N, 1, 16, 16), in bytes.

    Kept in a file for the runs that go on from a checkpoint.
    """
    path = shop.work / "latents.safetensors"
    if path.exists():
        kept = load_tensors(path)[0]
        return kept["latents"], kept["subjects"]
    vae = AutoencoderKL.from_pretrained(shop.family / "vae").to(shop.device)
    latents = []
    for i in range(0, len(shop.pool.scenes), 64):
        with shop.autocast():
            latents.append(
                vae.encode(
                    shop.pool.pixels(torch.arange(i, min(i + 64, len(shop.pool.scenes))))
                ).latent_dist.mean.float()
            )
    scaled = torch.cat(latents).cpu() * vae.config.scaling_factor
    save_tensors(path, {"latents": scaled, "subjects": shop.pool.subjects})
    return scaled, shop.pool.subjects


def stage_export(shop: Workshop) -> None:
    """The family as a diffusers folder of fp16 safetensors, with `p3s.json` for what is particular to it."""
    target = shop.work / "export"
    clip = CLIPModel.from_pretrained(shop.family / "clip").half()
    parts = {
        "vae": AutoencoderKL.from_pretrained(shop.family / "vae").half(),
        "unet": UNet2DConditionModel.from_pretrained(shop.family / "unet").half(),
        "text_encoder": clip.text_model,
        "clip": clip,  # the whole pair, as openai/clip-vit-large-patch14 has it: towers and both projections
    }
    for name, model in parts.items():
        model.save_pretrained(target / name, max_shard_size="15MB")
    CLIPTokenizer.from_pretrained(shop.family / "tokenizer").save_pretrained(target / "tokenizer")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(target / "clip")
    models.build_scheduler().save_pretrained(target / "scheduler")
    shop.log("export", {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()})


STAGES: dict[str, Callable[[Workshop], None]] = {
    "tokenizer": stage_tokenizer,
    "vae": stage_vae,
    "clip": stage_clip,
    "vision": stage_vision,
    "unet": stage_unet,
    "unet_long": stage_unet_long,
    "export": stage_export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("runs/world"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes to draw")
    parser.add_argument("--steps", type=int, help="length of the whole stage, instead of the recipe's")
    parser.add_argument("--until", type=int, help="stop before this step; a later call goes on")
    args = parser.parse_args()
    shop = Workshop(args.work, args.device, args.seed, args.scenes, args.steps, args.until)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](shop)


if __name__ == "__main__":
    main()
