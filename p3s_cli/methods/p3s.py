"""P3S-Diffusion as a method: its control is fitted to a subject's masked references, then bound to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from p3s_cli.config import MEMORY, ControlConfig, FinetuneConfig, GenerateConfig, MemoryProfile
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Generator, Heed, Learnt, Lesson, SubjectPart, asked, register
from p3s_cli.methods.binding import Bound, captures
from p3s_cli.methods.conditioning import ReferenceBank
from p3s_cli.methods.denoising import add_noise, alphas_cumprod, astray
from p3s_cli.methods.forward import Forward, forward
from p3s_cli.methods.memory import room_to_record
from p3s_cli.methods.photos import read_photos
from p3s_cli.paper.injection import attention_seam
from p3s_cli.paper.losses import denoising_loss, total_loss
from p3s_cli.paper.model import P3SControl, connected
from p3s_cli.paper.schedule import injection_weight
from p3s_cli.sd import text
from p3s_cli.sd.captured import CapturedLoss
from p3s_cli.sd.determinism import seeded
from p3s_cli.sd.devices import channels_last
from p3s_cli.sd.family import Family, Profile
from p3s_cli.sd.graphs import possible
from p3s_cli.sd.train import Loss, Recipe, sent
from p3s_cli.subject import Subject

TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}")


class P3S:
    """Contract: `p3s_cli.methods.base.Method`."""

    name = "p3s"
    given: Literal["points"] = "points"
    heeds: frozenset[Heed] = frozenset(("preset", "schedule", "references", "compiled", "memory", "joined", "vision"))

    def recipe(self, profile: Profile, config: FinetuneConfig) -> FinetuneConfig:
        """Steps, rate and batch left open are the family's."""
        return replace(config, **(profile.finetune | asked(config)))

    def fit(self, lesson: Lesson) -> dict[str, Tensor]:
        """Train a control on the subject's references (P3S eq. 15). Returns its tensors, float32."""
        family, subject = lesson.family, lesson.subject
        config = self.recipe(family.profile, lesson.config)
        recipe = Recipe(
            steps=config.steps,
            lr=config.lr,
            weight_decay=0.01,
            decay=config.control.decay,
            ema=config.control.average if config.memory.average else 0.0,
            seed=config.seed,
            lr_scale=(
                ("gates", config.control.gate_lr_scale),
                ("weighting", config.control.gate_lr_scale),
                ("word", config.control.word_lr_scale),
            ),
            optimizer=config.memory.optimizer,
        )
        with seeded(config.seed):
            control = P3SControl(family.unet, family.vision.width, config.control)
        control.to(family.device, torch.bfloat16 if config.memory.masters == "bfloat16" else torch.float32)
        bank = ReferenceBank.build(family, read_photos(subject), config.control, config.seed)
        loss = _Loss(family, subject, control, bank, config.control, config.batch, forward(config.compiled))
        # not where seconds are compared with those of methods that have neither (`FinetuneConfig.captured`)
        laid_out = contextlib.nullcontext()
        if config.captured:
            laid_out = channels_last(family.device, family.dtype, family.unet, control)
        with connected(family.unet, control), _saving(family, control, config.memory), laid_out:
            trained = lesson.train(dict(control.named_parameters()), _captured(loss, family, control, config), recipe)
        return {name: tensor.float() for name, tensor in trained.items()}

    def bind(self, family: Family, learnt: Learnt, sampling: GenerateConfig) -> AbstractContextManager[Generator]:
        """The frozen U-Net under this subject's control; as found on exit."""
        return self.bind_many(family, [SubjectPart(learnt)], sampling)

    @contextlib.contextmanager
    def bind_many(self, family: Family, parts: Sequence[SubjectPart], sampling: GenerateConfig) -> Iterator[Generator]:
        """The frozen U-Net under the control of several subjects at once, their features side by side; as found on exit.

        Raises InputError for a strength below 0, and what `Bound.build` raises.
        """
        if (least := min(sampling.strength, *(p.strength for p in parts))) < 0:
            raise InputError(f"a subject's strength cannot be {least:g}; give 0 or more")
        bound = [Bound.build(family, part, sampling) for part in parts]
        frozen = forward(sampling.compiled, captures(family, sampling)).frozen

        def eps(x_t: Tensor, t: Tensor, states: Tensor, with_subject: bool, residuals: tuple | None = None) -> Tensor:
            weight = sampling.strength * injection_weight(float(t[0]), sampling.schedule)
            x_t = x_t.to(family.dtype)
            if residuals is not None:  # a ControlNet that was given has a precision of its own
                residuals = [r.to(family.dtype) for r in residuals[0]], residuals[1].to(family.dtype)
            present = [b for b in bound if with_subject and weight * b.strength != 0]
            injections = [i for b in present for i in b.injections(x_t, t, states, weight)]
            return frozen(family.unet, x_t, t, states, *injections, residuals=residuals).float()

        with contextlib.ExitStack() as stack:
            stack.enter_context(attention_seam(family.unet, "frozen"))
            for b in bound:
                stack.enter_context(attention_seam(b.control.copy, "copy"))
            off = sampling.schedule.kind == "off"  # nothing of the subject, so nothing of its word
            yield Generator(lambda prompts: _encode(family, bound, prompts, 0.0 if off else sampling.strength), eps)


def _encode(family: Family, bound: Sequence[Bound], prompts: list[str], strength: float) -> Tensor:
    """Text states (B, 77, D), each subject's learned word, as strong as the subject, at its own places."""
    identifiers = [b.identifier for b in bound]
    states = text.encode(family.tokenizer, family.text_encoder, [text.fill(p, *identifiers) for p in prompts])
    for which, b in enumerate(bound):
        where = text.positions(family.tokenizer, prompts, identifiers, which)
        states = b.control.say(states, where.to(states.device), strength * b.strength)
    return states


@contextlib.contextmanager
def _saving(family: Family, control: P3SControl, memory: MemoryProfile) -> Iterator[None]:
    """What a memory profile switches while training; the family as found on exit."""
    unets = [u for u in (family.unet, control.copy) if memory.checkpointing and not u.is_gradient_checkpointing]
    for unet in unets:
        unet.enable_gradient_checkpointing()
    try:
        with family.resting() if memory.offload else contextlib.nullcontext():
            yield
    finally:
        for unet in unets:
            unet.disable_gradient_checkpointing()


def _captured(loss: _Loss, family: Family, control: P3SControl, config: FinetuneConfig) -> Loss:
    """The loss as one CUDA graph where that is asked for, pays, and fits, the memory profile asking for no economy.

    Not in float16, whose loss is scaled anew between steps, nor beside what a compiler or checkpointing does to the passes.
    """
    precise = family.dtype != torch.float16 and next(control.parameters()).dtype == torch.float32
    plain = precise and config.memory == MEMORY["24"] and not config.compiled
    if not (config.captured and plain and possible(family.device, config.steps or 0)):
        return loss
    room = room_to_record(family.profile, config.memory, family.device, family.dtype, config.batch or 1)
    return CapturedLoss(loss, control, family.dtype) if room else loss


@dataclass(frozen=True)
class _Drawn:
    """What a step draws, on the device: states and times, what they are led by, and where; conditions; text and its places."""

    x_t: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    noise: Tensor  # (B, 4, h, w)
    inside: Tensor  # (B, 1, h, w)
    latent: Tensor  # (B, 4, h, w), I'
    vision: Tensor  # (B, M, D), c_s
    text: Tensor  # (B, 77, D)
    where: Tensor  # (B, 77) bool
    active: Tensor  # (B,) bool


class _Loss:
    """One training step's loss: eq. 15 on a batch, states led astray, text and injection dropped independently."""

    def __init__(
        self,
        family: Family,
        subject: Subject,
        control: P3SControl,
        bank: ReferenceBank,
        config: ControlConfig,
        batch: int,
        forward: Forward,
    ):
        self.unet, self.control, self.bank, self.config, self.batch = family.unet, control, bank, config, batch
        self.forward = forward
        self.device, self.dtype = family.device, family.dtype
        # in the frozen part's precision; beside one in float32 in that of the masters, which may be bfloat16
        self.autocast = self.dtype if self.dtype != torch.float32 else next(control.parameters()).dtype
        self.alphas_cumprod = alphas_cumprod(family)
        name, identifier = f"{text.PLACEHOLDER} {subject.manifest.class_word}", subject.manifest.identifier
        prompts = [*(f"{t.format(name)} {c}".strip() for t in TEMPLATES for c in config.contexts), ""]
        filled = [text.fill(p, identifier) for p in prompts]
        self.text = text.encode(family.tokenizer, family.text_encoder, filled)
        self.where = text.positions(family.tokenizer, prompts, [identifier], 0).to(family.device)

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.judge(self.draw(step, generator))

    def draw(self, step: int, generator: torch.Generator) -> _Drawn:
        """All that is random in a step."""
        config, n = self.config, self.batch
        x0, inside, seen = self.bank.draw(n, config, generator)
        x_t, t, noise = add_noise(x0, self.alphas_cumprod, generator, config.timesteps)
        if config.astray:
            alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
            x_t, noise = astray(x_t, noise, alpha, generator, config.astray, config.astray_share)
        template = torch.randint(len(self.text) - 1, (n,), generator=generator)
        no_text = torch.rand(n, generator=generator) < config.drop_text
        active = sent(torch.rand(n, generator=generator) >= config.drop_injection, self.device)
        chosen = sent(torch.where(no_text, len(self.text) - 1, template), self.device)
        condition = seen.latent, seen.vision, self.text[chosen], self.where[chosen]
        return _Drawn(x_t.to(self.dtype), t, noise, inside, *condition, active)

    def judge(self, drawn: _Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the control itself, whose masters autocast casts where the frozen part is in half precision."""
        return self.compute(drawn, self.control, cast=self.autocast != torch.float32)

    def compute(self, drawn: _Drawn, control: P3SControl, cast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """All that follows from what was drawn, for a control in the frozen part's precision or, with `cast`, in another."""
        config, x_t, t = self.config, drawn.x_t, drawn.t
        untouched = None
        if config.preserve:
            with torch.no_grad():
                untouched = self.forward.frozen(self.unet, x_t, t, drawn.text)
        states = control.say(drawn.text, drawn.where)
        weight = torch.ones(self.batch, device=self.device) if control.weighting is None else control.weighting(t)
        maps = config.attention_loss != "off"
        seen = (drawn.latent, drawn.vision) if cast else (drawn.latent.to(self.dtype), drawn.vision.to(self.dtype))
        with torch.autocast(self.device.split(":")[0], self.autocast, enabled=cast):
            injection, copy_maps = self.forward.copy(
                control, x_t, t, states, control.see(*seen), weight, drawn.active, maps
            )
            predicted = self.forward.frozen(self.unet, x_t, t, states, injection)
        inside, ground = drawn.inside, config.background_weight
        denoising = denoising_loss(predicted, drawn.noise, ground + (1 - ground) * inside)
        if untouched is not None:
            denoising = denoising + config.preserve * denoising_loss(predicted, untouched, 1 - inside)
        value, consistency = total_loss(
            denoising, copy_maps, injection.maps, config.gamma, config.attention_loss, config.attention_gradient
        )
        return value, {"denoising": denoising.detach(), "consistency": consistency.detach()}


register(P3S())
