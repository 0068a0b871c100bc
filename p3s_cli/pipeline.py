"""A diffusers pipeline with a tuned subject in it, to be dropped into code that has one.

    pipe = P3SPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subject="dog").to("cuda")
    pipe("a [V] dog on the beach", num_inference_steps=30, callback_on_step_end=...).images[0]

Everything but the U-Net's forward pass is StableDiffusionPipeline's own: arguments, callbacks, schedulers,
LoRAs. Guidance is that of `p3s generate`, with the subject's part apart from the text's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from p3s_cli import config as settings
from p3s_cli.errors import InputError
from p3s_cli.methods.binding import Part
from p3s_cli.methods.p3s import P3S
from p3s_cli.sd import text
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.sample import Eps, guided_noise, passes
from p3s_cli.sd.weights import load_tensors
from p3s_cli.subject import CONTROL, Subject

_SUBJECTS = "subjects"  # inside a saved pipeline's folder
_MODULES = ("vae", "text_encoder", "tokenizer", "unet")


class P3SPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline whose prompts know [V] (or [V1], [V2], ... with several subjects)."""

    @classmethod
    def from_pretrained(
        cls,
        base: str = "sd15",
        subject: str | Path | Sequence[str | Path] | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> P3SPipeline:
        """A base as `--model` names it, and tuned subjects' directories; or a folder of `save_pretrained`.

        `kwargs` are components that take the place of the base's (`scheduler=`, `safety_checker=None`).
        Raises InputError if a subject is not tuned, or was tuned on another base.
        """
        base, inside = str(base), Path(base) / _SUBJECTS
        roots = [subject] if isinstance(subject, (str, Path)) else list(subject or ())
        subjects = [Subject.open(Path(r)) for r in roots or sorted(inside.glob("*"))]
        if not subjects:
            raise InputError('P3SPipeline needs a tuned subject; name its directory with subject="..."')
        tower = subjects[0].tuned().settings.get("vision")
        family = load(base, "cpu", str(torch_dtype).removeprefix("torch."), None if inside.is_dir() else tower)
        for one in subjects:
            if one.method != "p3s":
                raise InputError(f"{one.root} is tuned by {one.method}; P3SPipeline draws what p3s learnt")
            if roots:
                one.check_control(family.fingerprint())
        if "safety_checker" not in kwargs and family.safety_checker is not None:
            kwargs["safety_checker"], kwargs["feature_extractor"] = family.safety_checker
        own = {name: getattr(family, name) for name in _MODULES}
        own["scheduler"] = DDIMScheduler.from_config(family.scheduler_config)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = cls(**none | own | kwargs)
        pipe.__dict__["_p3s"] = (family, subjects)
        return pipe

    def __call__(
        self,
        prompt: str | list[str],
        *args: Any,
        subject_strength: float = 1.0,
        schedule: str = "quadratic",
        subject_guidance: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """StableDiffusionPipeline's call; `subject_strength` and `schedule` are generate's `strength` and `schedule`.

        `guidance_scale` is s_t and `subject_guidance` s_i of `sd.sample.passes`; the latter defaults to the
        family's, and other than 1 takes a third pass of the U-Net. Without guidance (a scale of 1 or less) s_t is 1.
        """
        family, subjects = self._family(), self.__dict__["_p3s"][1]
        names = [s.manifest.identifier for s in subjects]
        words = [text.identify(p, *names) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        edge = family.profile.image_size
        size = kwargs.setdefault("height", edge), kwargs.setdefault("width", edge)
        config = settings.with_schedule(settings.GenerateConfig(strength=subject_strength, size=size), schedule)
        unet, strength = self.unet, subject_guidance
        strength = family.profile.subject_guidance if strength is None else strength
        with P3S().bind_many(family, [_part(s) for s in subjects], config) as generator:
            # encoded here, for a subject's word is learnt and no tokenizer knows it
            embeds, empty = (generator.encode(w).to(unet.dtype) for w in (words, [""]))
            self.__dict__["unet"] = _Controlled(unet, generator.eps, self._scale, strength, empty)
            try:
                return super().__call__(None, *args, prompt_embeds=embeds, **kwargs)
            finally:
                self.__dict__["unet"] = unet

    def _scale(self) -> float | None:
        """s_t at this step, which a callback may change; None while guidance is off."""
        return self.guidance_scale if self.do_classifier_free_guidance else None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The base in diffusers' layout, the CLIP pair, and the subjects without their outputs."""
        folder, (_, subjects) = Path(save_directory), self.__dict__["_p3s"]
        super().save_pretrained(folder, **kwargs)
        family = self._family()
        family.vision.clip.save_pretrained(folder / "clip")
        (folder / "clip/preprocessor_config.json").write_text(json.dumps(family.vision.statistics))
        own = replace(family.profile, base=".", clip="clip")
        (folder / "p3s.json").write_text(json.dumps(asdict(own), indent=2))
        for i, subject in enumerate(subjects):
            left_out = shutil.ignore_patterns("outputs", ".*")
            shutil.copytree(subject.root, folder / _SUBJECTS / f"{i:02d}", ignore=left_out, dirs_exist_ok=True)

    def _family(self) -> Family:
        """The family as it is now: `to`, and components that were replaced, included."""
        family = self.__dict__["_p3s"][0]
        family.device, family.dtype = str(self.device), self.unet.dtype
        family.__dict__.update({name: getattr(self, name) for name in _MODULES})
        family.vision.clip.to(family.device, family.dtype)
        return family


class _Controlled(nn.Module):
    """A U-Net as the pipeline calls it, with the subjects inside and guidance already done.

    `scale` tells s_t, None without guidance; `empty` are the states of no text (1, 77, D), for that case.
    """

    def __init__(
        self, unet: nn.Module, eps: Eps, scale: Callable[[], float | None], subject_guidance: float, empty: Tensor
    ):
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self._eps, self._scale, self._subject_guidance, self._empty = eps, scale, subject_guidance, empty

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        """Under guidance both halves are the guided noise, so that the pipeline's own u + s (t - u) leaves it as it is."""
        scale = self._scale()
        halves = 1 if scale is None else 2
        x = sample.chunk(halves)[-1]
        empty, text = (
            encoder_hidden_states.chunk(2)
            if halves == 2
            else (self._empty.expand(len(x), -1, -1), encoder_hidden_states)
        )
        times = torch.as_tensor(timestep, device=x.device).expand(len(x))
        s_t = 1.0 if scale is None else scale
        guided = guided_noise(self._eps, x, times, passes(text, empty, s_t, self._subject_guidance))
        return (guided.to(sample.dtype).repeat(halves, 1, 1, 1),)


def _part(subject: Subject) -> Part:
    tensors, metadata = load_tensors(subject.path(CONTROL), sha=subject.tuned().artifacts[CONTROL])
    return Part(subject, tensors, settings.read_control(metadata["config"]))
