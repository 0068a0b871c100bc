"""P3S-Diffusion as a method: its control is fitted to a subject's masked references, then bound to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import ControlConfig, FinetuneConfig, GenerateConfig, read_control
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Generator, register
from p3s_cli.methods.denoising import diffuse, noise_schedule
from p3s_cli.methods.photos import Photo, read_photos
from p3s_cli.methods.views import View, base_view, look, random_view
from p3s_cli.paper.losses import denoising_loss, total_loss
from p3s_cli.paper.model import P3SControl, connected, controlled_noise
from p3s_cli.paper.schedule import injection_weight
from p3s_cli.sd import images, text
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.train import Checkpoint, OnStep, Recipe, train
from p3s_cli.sd.weights import check_layout, layout_of
from p3s_cli.subject import Subject

TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}")
_VIEWS = 24  # augmented views encoded once for each reference


@dataclass(frozen=True)
class Condition:
    """What the copy is given of a reference: latent I' (B, 4, h, w) and vision states c_s (B, M, D)."""

    latent: Tensor
    vision: Tensor

    def __getitem__(self, index: Tensor) -> Condition:
        return Condition(self.latent[index], self.vision[index])

    def repeat(self, n: int) -> Condition:
        return Condition(self.latent.expand(n, -1, -1, -1), self.vision.expand(n, -1, -1))


def condition(family: Family, photos: list[Photo], views: list[View], config: ControlConfig) -> Condition:
    """Encode what the copy sees of each photo through its view, its background removed if so configured."""
    size = family.profile.image_size
    seen = []
    for photo, view in zip(photos, views, strict=True):
        square = look(photo.pixels, view, size)
        if config.reference_background == "remove":
            keep = look(photo.mask.float()[None], view, size)
            square = square * keep + 0.5 * (1 - keep)
        seen.append(square)
    batch = torch.stack(seen)
    vision = torch.cat([family.vision.tokens(b) for b in batch.split(8)])
    return Condition(images.encode(family.vae, batch), vision)


@dataclass(frozen=True)
class _Bank:
    """Everything a training step draws from, encoded once: targets (K, 4, h, w), their masks (K, 1, h, w), conditions."""

    targets: Tensor
    masks: Tensor
    conditions: Condition

    @classmethod
    def build(cls, family: Family, photos: list[Photo], config: ControlConfig, seed: int) -> _Bank:
        generator = torch.Generator().manual_seed(seed)
        size = family.profile.image_size
        repeats = 1 if config.augment == "none" else _VIEWS
        chosen = [p for p in photos for _ in range(repeats)]
        target_views = [_view(p, config, generator) for p in chosen]
        seen_views = target_views if config.augment != "independent" else [_view(p, config, generator) for p in chosen]
        targets = torch.stack([look(p.pixels, v, size) for p, v in zip(chosen, target_views, strict=True)])
        masks = torch.stack([look(p.mask.float()[None], v, size) for p, v in zip(chosen, target_views, strict=True)])
        latents = images.encode(family.vae, targets)
        inside = F.interpolate(masks, size=latents.shape[-2:], mode="area").to(latents.device)
        return cls(latents, inside, condition(family, chosen, seen_views, config))

    def draw(self, batch: int, config: ControlConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Condition]:
        """A batch of targets, masks and conditions; jointly or independently drawn."""
        target = torch.randint(len(self.targets), (batch,), generator=generator)
        seen = (
            torch.randint(len(self.targets), (batch,), generator=generator)
            if config.augment == "independent"
            else target
        )
        return self.targets[target], self.masks[target], self.conditions[seen]


def _view(photo: Photo, config: ControlConfig, generator: torch.Generator) -> View:
    base = base_view(photo.mask)
    return base if config.augment == "none" else random_view(base, photo.mask, generator)


class P3S:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "p3s"
    given: Literal["points"] = "points"

    def recipe(self, profile: Profile, config: FinetuneConfig) -> FinetuneConfig:
        """Steps, rate and batch left open are the family's."""
        recommended = profile.finetune
        return replace(
            config,
            steps=config.steps or int(recommended["steps"]),
            lr=config.lr or recommended["lr"],
            batch=config.batch or int(recommended["batch"]),
        )

    def fit(
        self,
        family: Family,
        subject: Subject,
        config: FinetuneConfig,
        on_step: OnStep | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, Tensor]:
        """Train a control on the subject's references (P3S eq. 15). Returns its tensors, float32."""
        config = self.recipe(family.profile, config)
        recipe = Recipe(
            steps=config.steps,
            lr=config.lr,
            weight_decay=0.01,
            seed=config.seed,
            lr_scale=(("gates", config.control.gate_lr_scale),),
        )
        torch.manual_seed(config.seed)
        control = P3SControl(family.unet, family.vision.width, config.control).to(family.device)
        bank = _Bank.build(family, read_photos(subject), config.control, config.seed)
        loss = _Loss(family, subject, control, bank, config.control, config.batch)
        with connected(family.unet, control):
            return train(dict(control.named_parameters()), loss, recipe, on_step, checkpoint)

    @contextlib.contextmanager
    def bind(
        self,
        family: Family,
        subject: Subject,
        tensors: Mapping[str, Tensor],
        recipe: Mapping[str, Any],
        sampling: GenerateConfig,
    ) -> Iterator[Generator]:
        """The frozen U-Net under this subject's control, conditioned on its first reference; as found on exit."""
        control_config = read_control(recipe)
        control = P3SControl(family.unet, family.vision.width, control_config)
        try:
            check_layout(layout_of(tensors), layout_of(control.state_dict()))
        except ValueError as error:
            raise InputError(
                f"the control of {subject.root} does not fit this base ({error}); tune it again"
            ) from error
        control.load_state_dict(tensors)
        control.to(family.device, family.dtype).eval().requires_grad_(False)
        photo = read_photos(subject)[0]
        seen = condition(family, [photo], [base_view(photo.mask)], control_config)
        seen = Condition(seen.latent.to(family.dtype), seen.vision.to(family.dtype))

        def eps(x_t: Tensor, t: Tensor, states: Tensor, with_subject: bool) -> Tensor:
            weight = sampling.strength * injection_weight(float(t[0]), sampling.schedule)
            x_t = x_t.to(family.dtype)
            if not with_subject or weight == 0:
                return controlled_noise(family.unet, x_t, t, states, None).float()
            given = seen.repeat(len(x_t))
            injection, _ = control.inject(
                x_t, t, states, given.latent, given.vision, torch.full((len(x_t),), weight, device=x_t.device)
            )
            return controlled_noise(family.unet, x_t, t, states, injection).float()

        with connected(family.unet, control):
            yield Generator(lambda prompts: text.encode(family.tokenizer, family.text_encoder, prompts), eps)


class _Loss:
    """One training step's loss: eq. 15 on a batch, text and injection dropped independently."""

    def __init__(
        self, family: Family, subject: Subject, control: P3SControl, bank: _Bank, config: ControlConfig, batch: int
    ):
        self.unet, self.control, self.bank, self.config, self.batch = family.unet, control, bank, config, batch
        self.device, self.dtype = family.device, family.dtype
        self.noise_schedule = noise_schedule(family)
        name = f"{subject.manifest.identifier} {subject.manifest.class_word}"
        prompts = [f"{t.format(name)} {c}".strip() for t in TEMPLATES for c in config.contexts]
        self.text = text.encode(family.tokenizer, family.text_encoder, [*prompts, ""])

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        config, n = self.config, self.batch
        x0, inside, seen = self.bank.draw(n, config, generator)
        x_t, t, noise = diffuse(x0, self.noise_schedule, generator)
        x_t = x_t.to(self.dtype)
        template = torch.randint(len(self.text) - 1, (n,), generator=generator)
        no_text = torch.rand(n, generator=generator) < config.drop_text
        active = (torch.rand(n, generator=generator) >= config.drop_injection).to(self.device)
        states = self.text[torch.where(no_text, len(self.text) - 1, template)]
        ones = torch.ones(n, device=self.device)
        maps = config.attention_loss != "off"
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            injection, copy_maps = self.control.inject(x_t, t, states, seen.latent, seen.vision, ones, active, maps)
            predicted = controlled_noise(self.unet, x_t, t, states, injection)
        weight = config.background_weight + (1 - config.background_weight) * inside
        denoising = denoising_loss(predicted, noise, weight)
        value, consistency = total_loss(
            denoising, copy_maps, injection.maps, config.gamma, config.attention_loss, config.attention_gradient
        )
        return value, {"denoising": denoising.item(), "consistency": consistency.item()}


register(P3S())
