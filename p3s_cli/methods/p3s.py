"""P3S-Diffusion as a method: its control is fitted to a subject's masked references, then bound to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import ControlConfig, FinetuneConfig, GenerateConfig, MemoryProfile, read_control
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Generator, register
from p3s_cli.methods.denoising import diffuse, noise_schedule
from p3s_cli.methods.photos import Photo, read_photos
from p3s_cli.methods.views import View, base_view, look, random_view
from p3s_cli.paper.injection import Injection, attention_seam
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

    def __getitem__(self, index: Tensor | slice) -> Condition:
        return Condition(self.latent[index], self.vision[index])

    def repeat(self, n: int) -> Condition:
        return Condition(self.latent.expand(n, -1, -1, -1), self.vision.expand(n, -1, -1))


def condition(
    family: Family,
    photos: list[Photo],
    views: list[View],
    config: ControlConfig,
    size: tuple[int, int] | None = None,
) -> Condition:
    """Encode what the copy sees of each photo through its view, its background removed if so configured.

    The latents have `size` (height, width in pixels; default the family's square), as the image to be
    drawn has; the vision tower always sees the square.
    """
    square = (family.profile.image_size,) * 2
    seen = _seen(photos, views, config, square)
    vision = torch.cat([family.vision.tokens(b) for b in seen.split(8)])
    drawn = seen if size in (None, square) else _seen(photos, views, config, size)
    return Condition(images.encode(family.vae, drawn), vision)


def _seen(photos: list[Photo], views: list[View], config: ControlConfig, size: tuple[int, int]) -> Tensor:
    seen = []
    for photo, view in zip(photos, views, strict=True):
        picture = look(photo.pixels, view, size)
        if config.reference_background == "remove":
            keep = look(photo.mask.float()[None], view, size)
            picture = picture * keep + 0.5 * (1 - keep)
        seen.append(picture)
    return torch.stack(seen)


@dataclass(frozen=True)
class Part:
    """One tuned subject's part in an image: its control's tensors and settings, and how strongly it is injected."""

    subject: Subject
    tensors: Mapping[str, Tensor]
    config: ControlConfig
    strength: float = 1.0


@dataclass(frozen=True)
class _Bound:
    """A subject's control on the device, and what its copy sees of each reference used, one at a time."""

    control: P3SControl
    seen: list[Condition]
    strength: float

    @classmethod
    def build(cls, family: Family, part: Part, references: int, size: tuple[int, int] | None) -> _Bound:
        control = P3SControl(family.unet, family.vision.width, part.config)
        try:
            check_layout(layout_of(part.tensors), layout_of(control.state_dict()))
        except ValueError as error:
            raise InputError(
                f"the control of {part.subject.root} does not fit this base ({error}); tune it again"
            ) from error
        control.load_state_dict(part.tensors)
        control.to(family.device, family.dtype).eval().requires_grad_(False)
        photos = read_photos(part.subject)[:references]
        seen = condition(family, photos, [base_view(p.mask) for p in photos], part.config, size)
        seen = Condition(seen.latent.to(family.dtype), seen.vision.to(family.dtype))
        return cls(control, [seen[i : i + 1] for i in range(len(photos))], part.strength)

    def injections(self, x_t: Tensor, t: Tensor, states: Tensor, weight: float) -> list[Injection]:
        """P3S eq. 6 for each reference; together they take the place of one."""
        weights = torch.full((len(x_t),), weight * self.strength, device=x_t.device)
        made = []
        for seen in self.seen:
            given = seen.repeat(len(x_t))
            injection, _ = self.control.inject(x_t, t, states, given.latent, given.vision, weights)
            made.append(replace(injection, share=1 / len(self.seen)))
        return made


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
            optimizer=config.memory.optimizer,
        )
        torch.manual_seed(config.seed)
        control = P3SControl(family.unet, family.vision.width, config.control)
        control.to(family.device, torch.bfloat16 if config.memory.masters == "bfloat16" else torch.float32)
        bank = _Bank.build(family, read_photos(subject), config.control, config.seed)
        loss = _Loss(family, subject, control, bank, config.control, config.batch)
        with connected(family.unet, control), _saving(family, control, config.memory):
            trained = train(dict(control.named_parameters()), loss, recipe, on_step, checkpoint)
        return {name: tensor.float() for name, tensor in trained.items()}

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
        with self.bind_many(family, [Part(subject, tensors, read_control(recipe))], sampling) as generator:
            yield generator

    @contextlib.contextmanager
    def bind_many(self, family: Family, parts: Sequence[Part], sampling: GenerateConfig) -> Iterator[Generator]:
        """The frozen U-Net under the control of several subjects at once, their features side by side; as found on exit."""
        bound = [_Bound.build(family, part, sampling.references, sampling.size) for part in parts]

        def eps(x_t: Tensor, t: Tensor, states: Tensor, with_subject: bool, residuals: tuple | None = None) -> Tensor:
            weight = sampling.strength * injection_weight(float(t[0]), sampling.schedule)
            x_t = x_t.to(family.dtype)
            present = [b for b in bound if with_subject and weight * b.strength != 0]
            injections = [i for b in present for i in b.injections(x_t, t, states, weight)]
            return controlled_noise(family.unet, x_t, t, states, *injections, residuals=residuals).float()

        with contextlib.ExitStack() as stack:
            stack.enter_context(attention_seam(family.unet, "frozen"))
            for b in bound:
                stack.enter_context(attention_seam(b.control.copy, "copy"))
            yield Generator(lambda prompts: text.encode(family.tokenizer, family.text_encoder, prompts), eps)


@contextlib.contextmanager
def _saving(family: Family, control: P3SControl, memory: MemoryProfile) -> Iterator[None]:
    """What a memory profile switches while training; the family as found on exit."""
    unets = (family.unet, control.copy) if memory.checkpointing else ()
    for unet in unets:
        unet.enable_gradient_checkpointing()
    if memory.offload:
        family.rest()
    try:
        yield
    finally:
        for unet in unets:
            unet.disable_gradient_checkpointing()
        if memory.offload:
            family.wake()


class _Loss:
    """One training step's loss: eq. 15 on a batch, text and injection dropped independently."""

    def __init__(
        self, family: Family, subject: Subject, control: P3SControl, bank: _Bank, config: ControlConfig, batch: int
    ):
        self.unet, self.control, self.bank, self.config, self.batch = family.unet, control, bank, config, batch
        self.device, self.dtype = family.device, family.dtype
        # masters in bfloat16 compute in it, whatever the frozen part is kept in
        self.autocast = self.dtype if self.dtype != torch.float32 else next(control.parameters()).dtype
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
        with torch.autocast(self.device.split(":")[0], self.autocast, enabled=self.autocast != torch.float32):
            injection, copy_maps = self.control.inject(x_t, t, states, seen.latent, seen.vision, ones, active, maps)
            predicted = controlled_noise(self.unet, x_t, t, states, injection)
        weight = config.background_weight + (1 - config.background_weight) * inside
        denoising = denoising_loss(predicted, noise, weight)
        value, consistency = total_loss(
            denoising, copy_maps, injection.maps, config.gamma, config.attention_loss, config.attention_gradient
        )
        return value, {"denoising": denoising.item(), "consistency": consistency.item()}


register(P3S())
