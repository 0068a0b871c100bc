"""Every constant of the paper, once, with its section; and the two presets. No torch in here.

`PAPER` is the literal reading of P3S-Diffusion (arXiv:2412.19533). `DEFAULT` is what measures best
here (`benchmarks/results/`). Defaults that belong to a family of models, not to the
method (image size, learning rate, feature layer), are in that family's `p3s.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from p3s_cli.errors import InputError

Similarity = Literal["raw", "rescaled"]
Injection = Literal["literal", "gated"]
AttentionReading = Literal["printed", "sum", "relative", "off"]
Optimizer = Literal["adamw", "adamw8"]
Timesteps = Literal["uniform", "cubic"]
Schedule = Literal["quadratic", "fixed", "increasing", "decreasing", "off", "learned"]


@dataclass(frozen=True)
class MaskConfig:
    """Points to masks and the inpainted reference (Sec. III-A)."""

    recipe: Literal["prototypes", "paper"] = "prototypes"  # `segment/`, or eq. 1-2 as printed
    similarity: Similarity = "raw"  # eq. 1-2: the cosines as they are, or each map stretched to [0, 1]
    sigma: float = 1.0  # eq. 2: width of the Gaussian, in patches
    prototypes: int = 4  # for each side, however many clicks it has
    background_prototypes: int = 10
    rounds: int = 3  # of competition
    learn: float = (
        0.75  # beside where the walk leads, the share of a mask that its prototypes learn from: the surest objects
    )
    likeness: float = 1.0  # weight of being like an object, against being unlike the background
    smooth: float = 0.7  # Gaussian over the patches' scores, in patches
    nearness: float = 0.25  # weight of where the walk leads, against cosines
    band: float = 2.5  # patches around the coarse outline in which the image's edges decide
    dilate: float = 1.0  # eq. 3: growth of the inpainted region, in patches
    attempts: int = 3  # eq. 3: seeds tried before the classical filler


@dataclass(frozen=True)
class ControlConfig:
    """The control: what is injected, how, and what it is trained with (Sec. III-B)."""

    rngr: bool = True  # eq. 4-5; without it the copy is given I' itself (Table II)
    injection: Injection = "gated"
    lam: float = 0.2  # lambda of eq. 7
    gate_start: float = -2.0  # b_i before training, gated form only; weight decay draws it towards 0, too
    gate_lr_scale: float = 100.0  # the learning rate of the gates, and of a learned weight, relative to the rest
    gamma: float = 0.1  # eq. 15
    attention_loss: AttentionReading = "sum"  # reading of eq. 11-12
    attention_layers: Literal["last", "all"] = "last"  # Table IV
    attention_gradient: Literal["copy", "both"] = "copy"  # whether eq. 11 also moves the frozen U-Net's map
    # train with eps_t from an MLP in t (Fig. 5) instead of 1; sampled by schedule `learned`
    learned_weight: bool = False
    learned_word: bool = True  # an offset learnt at the identifier's text states; the paper has none
    word_lr_scale: float = 20.0  # its learning rate, relative to the rest
    decay: Literal["constant", "cosine"] = "constant"  # of the learning rate; cosine falls to zero over all steps
    timesteps: Timesteps = "cubic"  # cubic: more of the noisy steps, where shape and colour are decided
    astray: float = 0.7  # how far states are led from the photo while training, to be mended; the paper has none
    astray_share: float = 0.7  # of the states
    average: float = 0.98  # decay of the running average of the weights that is kept; 0 keeps the last ones
    drop_text: float = 0.3  # 0.1 in Sec. IV-A; text and injection are dropped independently
    drop_injection: float = 0.1
    augment: Literal["none", "joint", "independent"] = "none"  # geometry of reference and target
    # as much as fits; the subject as large as in a portrait; the same with it in the very middle
    reference_view: Literal["photo", "close", "centred"] = "centred"
    reference_background: Literal["keep", "remove"] = "remove"
    background_weight: float = 0.0  # of L_LDM outside the subject's mask; 1 is eq. 14 as printed
    preserve: float = 1.0  # of the distance to the frozen U-Net's own prediction outside the mask; the paper has none
    # put behind the training prompts, so that a prompt with a place is nothing new to the control: without them it
    # paints the subject's colours over the places it never heard of
    contexts: tuple[str, ...] = (
        "",
        "in the city",
        "with a mountain in the background",
        "on a wooden floor",
        "on the beach",
        "on top of pink fabric",
    )


@dataclass(frozen=True)
class WeightSchedule:
    """Eq. 10: eps_t = 1 - alpha (t / T)^k + beta, and its variants of Fig. 5 and Table III."""

    kind: Schedule = "quadratic"
    alpha: float = 0.5
    beta: float = 0.2
    k: float = 2.0
    T: int = 1000


@dataclass(frozen=True)
class MemoryProfile:
    """What is switched so that SD v1-5 in bfloat16 fits a card of that many gigabytes.

    The training figures they follow: 13.8 GB with fp32 Adam and 2.4 for the average, 10.2 with 8-bit Adam,
    6.1 with bfloat16 masters, checkpointing and the encoders off the card as well.
    """

    gigabytes: int
    average: bool = False  # a running average of what trains, a third copy of it
    optimizer: Optimizer = "adamw"  # adamw8 keeps both moments in 8 bits
    masters: Literal["float32", "bfloat16"] = "float32"  # what trains; bfloat16 is rounded stochastically
    checkpointing: bool = False  # recompute activations in the backward pass
    offload: bool = False  # text encoder, VAE and CLIP are on the CPU while the U-Nets work
    images: int = 4  # sampled together, and decoded together


MEMORY = {
    "24": MemoryProfile(24, average=True),
    "16": MemoryProfile(16, images=2),
    "12": MemoryProfile(12, optimizer="adamw8", images=1),
    "8": MemoryProfile(8, optimizer="adamw8", masters="bfloat16", checkpointing=True, offload=True, images=1),
}


@dataclass(frozen=True)
class FinetuneConfig:
    """One subject's tuning. None means the family's own recommendation."""

    control: ControlConfig = field(default_factory=ControlConfig)
    steps: int | None = None
    lr: float | None = None
    batch: int | None = None
    seed: int = 0
    memory: MemoryProfile = MEMORY["24"]
    compiled: bool = False  # the forward passes: for many subjects on a GPU (benchmarks/results/speed.md)
    captured: bool = False  # the step as a CUDA graph, where it can be


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling (Sec. IV-A). None means the family's own recommendation."""

    steps: int = 50
    guidance: float | None = None  # s_t, the text's part
    # s_i, the subject's part; equal to `guidance` injects in the conditional half only
    subject_guidance: float | None = 1.0
    scheduler: str = "ddim"
    schedule: WeightSchedule = field(default_factory=WeightSchedule)
    strength: float = 1.0  # multiplies eps_t
    negative_prompt: str = ""  # what stands in for the empty text
    references: int = 1  # of each subject, side by side
    reuse: int = 2  # run the copy, and the third pass of guidance (`sd.sample.Guided`), at every n-th step only
    size: tuple[int, int] | None = None  # height and width in pixels; None is the family's square
    compiled: bool = False  # the forward passes: for many images on a GPU
    captured: bool = False  # the forward passes as CUDA graphs, where they can be


@dataclass(frozen=True)
class Pace:
    """What `GenerateConfig` says where nothing else is asked for (benchmarks/results/speed.md)."""

    steps: int
    scheduler: str
    reuse: int


PACES = {False: Pace(50, "ddim", 2), True: Pace(16, "dpm++", 4)}  # with --fast: True

PAPER_CONTROL = ControlConfig(
    injection="literal",
    attention_loss="printed",
    attention_gradient="both",
    learned_word=False,
    timesteps="uniform",
    astray=0.0,
    average=0.0,
    augment="none",
    reference_view="photo",
    reference_background="keep",
    preserve=0.0,
    background_weight=1.0,
    contexts=("",),
    drop_text=0.1,
)
PRESETS: dict[str, tuple[MaskConfig, ControlConfig]] = {
    "paper": (MaskConfig(recipe="paper"), PAPER_CONTROL),
    "default": (MaskConfig(), ControlConfig()),
}


def preset(name: str) -> tuple[MaskConfig, ControlConfig]:
    """The mask and control settings of a preset. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def with_schedule(config: GenerateConfig, kind: str) -> GenerateConfig:
    """The same sampling with another weight schedule. Raises InputError for an unknown name."""
    kinds = Schedule.__args__  # type: ignore[attr-defined]
    if kind not in kinds:
        raise InputError(f"no weight schedule is called {kind!r}; choose one of: {', '.join(kinds)}")
    return replace(config, schedule=replace(config.schedule, kind=kind))


# what a control was made with that does not say so, as these settings came later
_UNSAID = {
    "rngr": True,
    "learned_word": False,
    "decay": "constant",
    "timesteps": "uniform",
    "astray": 0.0,
    "average": 0.0,
    "reference_view": "photo",
    "preserve": 0.0,
}


def read_control(tuned: Any) -> ControlConfig:
    """The control's part of finetune settings out of an artifact. Raises InputError for what no p3s wrote."""
    names = {f.name for f in fields(ControlConfig)}
    try:
        if (
            not isinstance(tuned, Mapping)
            or not isinstance(tuned.get("control"), dict)
            or tuned["control"].keys() - names
        ):
            raise ValueError("other settings than a control has")
        return TypeAdapter(ControlConfig).validate_python(_UNSAID | tuned["control"])
    except ValueError as error:
        raise InputError(
            "the settings of the control cannot be read; tune the subject again with p3s finetune"
        ) from error


def as_settings(config: Any) -> dict:
    """A configuration as a manifest holds it: what JSON would read back (tuples are lists there)."""
    return json.loads(json.dumps(asdict(config)))
