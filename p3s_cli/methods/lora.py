"""DreamBooth by low-rank adapters (LoRA, arXiv:2106.09685) in every attention layer, with peft."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from p3s_cli.config import FinetuneConfig, GenerateConfig
from p3s_cli.methods.base import Generator, register, settled
from p3s_cli.methods.denoising import Bank, Denoising, noise_of, trainable, training_copy
from p3s_cli.methods.photos import crops
from p3s_cli.sd import images, text
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import Checkpoint, OnStep, Recipe, train
from p3s_cli.subject import Subject


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

    def recipe(self, profile: Profile, config: FinetuneConfig) -> LoraRecipe:
        return settled(LoraRecipe(), self.name, profile, config)

    def fit(
        self,
        family: Family,
        subject: Subject,
        config: FinetuneConfig,
        on_step: OnStep | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, Tensor]:
        """Train adapters in a copy of the U-Net on crops of the references. Returns the adapters, float32."""
        r, words = self.recipe(family.profile, config), subject.manifest
        torch.manual_seed(config.seed)
        unet = adapted(training_copy(family.unet), r.rank)
        seen = images.encode(family.vae, crops(subject, family.profile.image_size))
        prompt = f"a photo of a {words.identifier} {words.class_word}"
        source = Bank(seen, text.encode(family.tokenizer, family.text_encoder, [prompt]), r.batch)
        recipe = Recipe(r.steps, r.lr, r.weight_decay, seed=config.seed)
        return train(trainable(unet, ""), Denoising(family, unet, [source]), recipe, on_step, checkpoint)

    @contextlib.contextmanager
    def bind(
        self,
        family: Family,
        subject: Subject,
        tensors: Mapping[str, Tensor],
        recipe: Mapping[str, Any],
        sampling: GenerateConfig,
    ) -> Iterator[Generator]:
        """A copy of the U-Net under the adapters, whose output is multiplied by the strength."""
        unet = adapted(copy.deepcopy(family.unet), recipe["rank"])
        scaled = {n: t * sampling.strength if "lora_B" in n else t for n, t in tensors.items()}
        unet.load_state_dict(scaled, strict=False)
        unet.to(family.dtype).requires_grad_(False)
        yield Generator(
            lambda prompts: text.encode(family.tokenizer, family.text_encoder, prompts), noise_of(family, unet)
        )


register(Lora())
