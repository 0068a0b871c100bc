"""A diffusers pipeline with a tuned subject in it, to be dropped into code that has one.

    pipe = P3SPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subject="dog").to("cuda")
    pipe("a [V] dog on the beach", num_inference_steps=30, callback_on_step_end=...).images[0]

Everything but the prompt's encoding and the U-Net's forward pass is StableDiffusionPipeline's own: arguments,
callbacks, schedulers, LoRAs; ControlNets are StableDiffusionControlNetPipeline's. Guidance is that of
`p3s generate`, with the subject's part apart from the text's.
"""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from p3s_cli import config as settings
from p3s_cli.atomic import committing, finish
from p3s_cli.errors import InputError
from p3s_cli.methods.base import Learnt, SubjectPart, check_made_for, check_pair
from p3s_cli.methods.p3s import P3S
from p3s_cli.methods.sampling import settled, usual_reuse
from p3s_cli.sd import controlnet as controls
from p3s_cli.sd import text
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.sample import Control
from p3s_cli.sd.standins import Autoencoder, GuidedUNet
from p3s_cli.subject import Subject

_SUBJECTS = "subjects"  # inside a saved pipeline's folder
_MODULES = ("vae", "text_encoder", "tokenizer", "unet")
# arguments of StableDiffusionPipeline's call that would have no effect here, or half of one
_NOT_HERE = {
    "prompt_embeds": "a subject's word is learnt, so that prompts are encoded here; give them as text",
    "clip_skip": "subjects are tuned on the last layer of the text encoder",
    "guidance_rescale": "guidance has a part of its own for the subject; lower guidance_scale or subject_guidance",
    "cross_attention_kwargs": "set a LoRA's strength with set_adapters",
    "ip_adapter_image": "no other adapter reaches its U-Net",
    "ip_adapter_image_embeds": "no other adapter reaches its U-Net",
    "guess_mode": "ControlNets speak with and without the text, as in p3s generate",
}


class P3SPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline whose prompts know [V] (or [V1], [V2], ... with several subjects)."""

    _optional_components = [*StableDiffusionPipeline._optional_components, "controlnet"]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | MultiControlNetModel | None = None,
    ):
        """The components themselves, which diffusers reads off this signature; `from_pretrained` finds them."""
        parts = vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder
        super().__init__(*parts, requires_safety_checker)
        self.register_modules(
            controlnet=MultiControlNetModel(controlnet) if isinstance(controlnet, (list, tuple)) else controlnet
        )

    @classmethod
    def from_pretrained(
        cls,
        base: str = "sd15",
        subject: str | Path | Sequence[str | Path] | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> P3SPipeline:
        """A base as `--model` names it, and tuned subjects' directories; or a folder of `save_pretrained`.

        `kwargs` are components that take the place of the base's (`scheduler=`, `safety_checker=None`), and
        `controlnet=`: one or several, as modules or by the names that `--control` knows. Raises InputError if a
        subject is not tuned, or was tuned on another base or another CLIP pair than the first, and for what is no component.
        """
        if unknown := sorted(set(kwargs) - set(inspect.signature(cls.__init__).parameters)):
            raise InputError(
                f"P3SPipeline.from_pretrained takes components, and {unknown[0]} is none; it finds the base's files as "
                "p3s does (safetensors, fp16 where there is nothing else), and a revision is part of the name: base@revision"
            )
        base, inside = str(base), Path(base) / _SUBJECTS
        roots = [subject] if isinstance(subject, (str, Path)) else list(subject or ())
        subjects = [Subject.open(Path(r)) for r in roots or sorted(inside.glob("*"))]
        if not subjects:
            raise InputError('P3SPipeline needs a tuned subject; name its directory with subject="..."')
        check_pair(subjects)
        tower = subjects[0].tuned().settings.get("vision")
        family = load(base, "cpu", str(torch_dtype).removeprefix("torch."), None if inside.is_dir() else tower)
        for one in subjects:
            if one.method != "p3s":
                raise InputError(f"{one.root} is tuned by {one.method}; P3SPipeline draws what p3s learnt")
            if roots:
                check_made_for(one, family)
        if "safety_checker" not in kwargs and family.safety_checker is not None:
            kwargs["safety_checker"], kwargs["feature_extractor"] = family.safety_checker
        nets = controls.gathered(family, kwargs.get("controlnet", Path(base) if inside.is_dir() else None))
        kwargs["controlnet"] = nets[0] if len(nets) == 1 else nets or None
        own = {name: getattr(family, name) for name in _MODULES}
        own["scheduler"] = DDIMScheduler.from_config(family.scheduler_config)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = cls(**none | own | kwargs)
        pipe.__dict__["_p3s"] = (family, subjects)
        return pipe

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        *,
        subject_strength: float | Sequence[float] = 1.0,
        schedule: str | None = None,
        subject_guidance: float | None = None,
        references: int = 1,
        image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        **kwargs: Any,
    ) -> Any:
        """StableDiffusionPipeline's call; `subject_strength`, `schedule` and `references` are generate's.

        `image` and the three after it are StableDiffusionControlNetPipeline's, for a pipeline with `controlnet=`; the
        pictures are resized to what is drawn, which has the family's size unless `height` and `width` say another.
        `subject_strength` is one number, or one for each subject. `guidance_scale` is s_t and `subject_guidance`
        s_i of `sd.sample.passes`; the latter defaults to the family's, and other than 1 takes a third pass of the
        U-Net. Without guidance (a scale of 1 or less) s_t is 1.
        Warns of words that the text encoder does not see. Raises InputError for arguments of `_NOT_HERE`, and for
        more `references` than any subject has.
        """
        for name in _NOT_HERE.keys() & kwargs.keys():
            if not (kwargs[name] is None or isinstance(kwargs[name], (int, float)) and kwargs[name] == 0):
                raise InputError(f"P3SPipeline takes no {name}: {_NOT_HERE[name]}")
        family, subjects = self._family(), self.__dict__["_p3s"][1]
        prompts = _checked(family, subjects, prompt, kwargs.get("negative_prompt"))
        edge = family.profile.image_size
        size = height or edge, width or edge
        if references < 1:
            raise InputError("give at least one of each subject's references (references=1)")
        if references > (most := max(len(s.manifest.references) for s in subjects)):
            raise InputError(f"{subjects[0].root} has {most} of {references} references; give no more with references=")
        shared = {"references": references, "reuse": usual_reuse(subjects[0])}
        asked = settings.GenerateConfig(size=size, subject_guidance=subject_guidance, **shared)
        config = settled(asked, family.profile, subjects[0], schedule)
        assert config.subject_guidance is not None
        spans = controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        each = kwargs.get("num_images_per_prompt") or 1
        controls.brought(self.controlnet)
        guides = controls.guides_of(controls.listed(self.controlnet), image, *spans, size, len(prompts), each)
        unet, vae = self.unet, self.vae
        if isinstance(kwargs.get("negative_prompt"), str):  # diffusers spreads it over prompts it is given as text
            kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
        with P3S().bind_many(family, self._parts(subject_strength), config) as generator:
            # encoded here, for a subject's word is learnt and no tokenizer knows it
            embeds, empty = (generator.encode(w).to(unet.dtype) for w in (prompts, [""]))
            controlled = GuidedUNet(
                unet, generator.eps, self._scale, config.subject_guidance, empty, self._control(guides), config.reuse
            )
            self.__dict__.update(unet=controlled, vae=Autoencoder(vae))
            try:
                return super().__call__(None, *size, num_inference_steps, prompt_embeds=embeds, **kwargs)
            finally:
                self.__dict__.update(unet=unet, vae=vae)
                self.maybe_free_model_hooks()  # of models kept off the device, which these two took no part in

    def _parts(self, strength: float | Sequence[float]) -> list[SubjectPart]:
        """Each subject's part, its tensors read from the disk once."""
        subjects, learnt = self.__dict__["_p3s"][1], self.__dict__.setdefault("_learnt", {})
        strengths = [strength] * len(subjects) if isinstance(strength, (int, float)) else list(strength)
        if len(strengths) != len(subjects):
            raise InputError(
                f"subject_strength has {len(strengths)} numbers for {len(subjects)} subjects; give one for each"
            )
        for i, subject in enumerate(subjects):
            if i not in learnt:
                learnt[i] = Learnt.read(subject)
        return [SubjectPart(learnt[i], own) for i, own in enumerate(strengths)]

    def _scale(self) -> float | None:
        """s_t at this step, which a callback may change; None while guidance is off."""
        return self.guidance_scale if self.do_classifier_free_guidance else None

    def _control(self, guides: Sequence[controls.Guide]) -> Callable[[int], Control | None]:
        """What the ControlNets add at a step of the trajectory that is being drawn."""
        return lambda step: controls.speaker([g for g in guides if g.speaks(step, self.num_timesteps)])

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The base in diffusers' layout, ControlNets, the CLIP pair, and the subjects without their outputs and what `p3s eval` made of them.

        A pipeline that was saved there before gives way, with its ControlNets and subjects, once all of this one is written.
        Raises P3SError if it cannot be, which leaves that one as it was, and InputError for `safe_serialization=False`.
        """
        if not kwargs.get("safe_serialization", True):
            raise InputError("p3s reads safetensors and never pickles; leave out safe_serialization=False")
        family, folder = self._family(), Path(save_directory)
        subjects, own = self.__dict__["_p3s"][1], replace(family.profile, base=".", clip="clip")
        finish(folder)  # a save that was killed
        places = {i: folder / _SUBJECTS / f"{i:02d}" for i in range(len(subjects))}
        staying = {i: p for i, p in places.items() if p.exists() and p.samefile(subjects[i].root)}  # with its outputs
        moving = {i: p for i, p in places.items() if i not in staying}
        former = self._former(folder) - set(staying.values())
        if theirs := [p for p in moving.values() if p.exists() and p not in former]:
            raise InputError(f"{theirs[0]} would be replaced, and no saved pipeline wrote it; save into another folder")
        with committing(folder) as new:
            super().save_pretrained(new, **kwargs)
            family.vision.clip.save_pretrained(new / "clip")
            (new / "clip/preprocessor_config.json").write_text(json.dumps(family.vision.statistics))
            (new / "p3s.json").write_text(json.dumps(asdict(own), indent=2))
            for i, place in moving.items():
                left_out = shutil.ignore_patterns("outputs", "eval", ".*")
                shutil.copytree(subjects[i].root, new / place.relative_to(folder), ignore=left_out)
            made = {folder / p.relative_to(new) for p in new.rglob("*")}
        for place in former:
            _clear(place, made)
        for i, place in moving.items():
            if subjects[i].root.parent.resolve() == place.parent.resolve():  # no more, where it was loaded from
                subjects[i] = Subject.open(place)
                self.__dict__.get("_learnt", {}).pop(i, None)

    def _former(self, folder: Path) -> set[Path]:
        """The folders of a pipeline that was saved here before, if one was: of its components, CLIP pair and subjects."""
        if not _saved_here(folder):
            return set()
        nets, subjects = folder.glob("controlnet_[0-9]"), (folder / _SUBJECTS).glob("[0-9][0-9]")
        return {*(folder / name for name in (*self.components, "clip")), *nets, *subjects}

    def _family(self) -> Family:
        """The family as it is now: `to`, and components that were replaced, included."""
        if "_p3s" not in self.__dict__:
            raise InputError(
                "this pipeline has no subject; make it with P3SPipeline.from_pretrained(base, subject=...)"
            )
        family = self.__dict__["_p3s"][0]
        # where models that are kept off the device are brought to, with enable_model_cpu_offload
        family.device, family.dtype = str(self._execution_device), self.unet.dtype
        # of one that torch.compile wraps, what is inside: its attention is ours while it draws
        family.__dict__.update(
            {name: getattr(getattr(self, name), "_orig_mod", getattr(self, name)) for name in _MODULES}
        )
        family.vision.clip.to(family.device, family.dtype)
        return family


def _saved_here(folder: Path) -> bool:
    """Whether a pipeline with subjects was saved in this folder, by what diffusers writes of its class."""
    try:
        told = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("_class_name") == P3SPipeline.__name__


def _clear(place: Path, made: set[Path]) -> None:
    """Remove what of a folder was not made just now, or the whole folder; of one that is a link no more than the link."""
    inside = () if place.is_symlink() else place.rglob("*")
    for path in sorted((place, *inside), reverse=True):  # what lies in a folder before the folder
        if path not in made:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _checked(
    family: Family, subjects: Sequence[Subject], prompt: str | list[str] | None, negative: str | list[str] | None
) -> list[str]:
    """The prompts, each with every subject in it. Warns of what is cut off."""
    if prompt is None:
        raise InputError('P3SPipeline needs a prompt with [V] in it, such as "a [V] dog on the beach"')
    names = [s.manifest.identifier for s in subjects]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    for one in prompts:
        text.identify(one, *names)
    unwanted = negative if isinstance(negative, list) else [negative or ""]
    for one, against in itertools.zip_longest(prompts, unwanted, fillvalue=""):
        for warning in text.check_words(family.tokenizer, one, against, names if one else ()):
            warnings.warn(warning, stacklevel=3)
    return prompts
