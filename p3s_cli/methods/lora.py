"""DreamBooth by low-rank adapters (LoRA, arXiv:2106.09685) in every attention layer, with peft."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, register, settled
from p3s_cli.methods.denoising import Denoising, LatentBank, noise_of, partly_trained, states_of, trainable
from p3s_cli.methods.photos import crops
from p3s_cli.sd import images, text
from p3s_cli.sd.determinism import seeded
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import Recipe


@dataclass(frozen=True)
class LoraRecipe:
    """As diffusers' `examples/dreambooth/train_dreambooth_lora.py`: to_q, to_k, to_v, to_out, alpha = rank."""

    steps: int = 500
    lr: float = 1e-4
    batch: int = 1
    weight_decay: float = 0.01
    rank: int = 4


def adapted(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """The U-Net, in place, with adapters in its attention; they alone require a gradient, and at first do nothing."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    return inject_adapter_in_model(config, unet)


class Lora:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "lora"
    given: Literal["crop"] = "crop"
    heeds: frozenset[Heed] = frozenset()

    def recipe(self, profile: Profile, config: FinetuneConfig) -> LoraRecipe:
        return settled(LoraRecipe(), self.name, profile, config)

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Train adapters in a copy of the U-Net on crops of the references. Returns the adapters, float32."""
        family, seed = lesson.family, lesson.config.seed
        r = self.recipe(family.profile, lesson.config)
        with seeded(seed):
            unet = partly_trained(adapted(copy.deepcopy(family.unet), r.rank), lambda name: "lora_" in name)
        seen = images.encode(family.vae, crops(lesson.subject, family.profile.image_size))
        prompt = f"a photo of a {lesson.subject.manifest.name}"
        source = LatentBank(seen, text.encode(family.tokenizer, family.text_encoder, [prompt]), r.batch)
        recipe = Recipe(r.steps, r.lr, r.weight_decay, seed=seed)
        return lesson.train(trainable(unet, ""), Denoising(family, unet, [source]), recipe)

    @contextlib.contextmanager
    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> Iterator[Generator]:
        """A copy of the U-Net under the adapters, whose output is multiplied by the strength."""
        unet = adapted(copy.deepcopy(family.unet), learnt.recipe["rank"])
        scaled = {n: t * sampling.strength if "lora_B" in n else t for n, t in learnt.tensors.items()}
        unet.load_state_dict(scaled, strict=False)
        unet.to(family.dtype).requires_grad_(False)
        yield Generator(states_of(family, learnt.subject.manifest.identifier), noise_of(family, unet))


register(Lora())
