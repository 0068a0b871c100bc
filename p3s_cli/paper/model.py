"""P3S eq. 9: the frozen U-Net under the control of the trained copy, one forward over the other rooms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from p3s_cli.config import ControlConfig
from p3s_cli.paper.injection import Injection, Recording, attention_seam
from p3s_cli.paper.rngr import RNGREncoder
from p3s_cli.paper.schedule import LearnedWeight
from p3s_cli.paper.subject_copy import attention_layers, build_copy, copy_name


def _key(layer: str) -> str:
    return layer.replace(".", "/")  # ModuleDict keys may not hold dots


def _zero_convolutions(widths: dict[str, int]) -> nn.ModuleDict:
    """A zero 1x1 convolution for each layer; on tokens (B, N, C) that is a linear map."""
    convolutions = nn.ModuleDict({_key(name): nn.Linear(width, width) for name, width in widths.items()})
    for parameter in convolutions.parameters():
        nn.init.zeros_(parameter)
    return convolutions


class P3SControl(nn.Module):
    """Everything that trains: the copy, the zero convolutions, the gates, the RNGR encoder, and what is learned beside.

    The frozen U-Net is an argument of every call and never a part of this module.
    """

    def __init__(self, unet: UNet2DConditionModel, vision_width: int, config: ControlConfig):
        super().__init__()
        layers = unet.config.layers_per_block
        self.config = config
        self.copy = build_copy(unet)
        self.rngr = RNGREncoder(unet.config.in_channels, vision_width) if config.rngr else None
        self.self_layers = attention_layers(unet, "attn1")
        self.cross_layers = attention_layers(unet, "attn2")
        self.speaks_to = {name: copy_name(name, layers) for name in (*self.self_layers, *self.cross_layers)}
        widths = {n: unet.get_submodule(n).to_q.in_features for n in self.speaks_to}
        self.zero_self = _zero_convolutions({n: widths[n] for n in self.self_layers})
        self.zero_cross = _zero_convolutions({n: widths[n] for n in self.cross_layers})
        self.word = nn.Parameter(torch.zeros(unet.config.cross_attention_dim)) if config.learned_word else None
        gated = self.self_layers if config.injection == "gated" else []
        self.gates = nn.ParameterDict({_key(n): torch.full((), config.gate_start) for n in gated})
        self.weighting = LearnedWeight() if config.learned_weight else None
        self.map_layers = self.cross_layers if config.attention_layers == "all" else self.cross_layers[-1:]

    def say(self, states: Tensor, where: Tensor, strength: float = 1.0) -> Tensor:
        """Text states (B, 77, D) with the learned word added where the identifier stands, `where` (B, 77) bool.

        Not in the paper. Without it an identifier says nothing, and guidance pulls the subject towards
        what the base makes of its class.
        """
        # a bool times a float is float32, so the strength comes last
        return states if self.word is None else states + where[..., None] * self.word.to(states.dtype) * strength

    def see(self, latent: Tensor, vision: Tensor) -> Tensor:
        """P3S eq. 4-5: I'' (B, C, h, w) of a reference's latent I' and its vision states c_s (B, M, Dv)."""
        return latent if self.rngr is None else self.rngr(latent, vision)

    def inject(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Tensor,
        seen: Tensor,
        weight: Tensor,
        active: Tensor | None = None,
        maps: bool = False,
    ) -> tuple[Injection, dict[str, Tensor]]:
        """P3S eq. 6 for every layer: run the copy on x_t + I'' and pass its states through the zero convolutions.

        x_t, seen (B, C, h, w), the latter I'' of `see`; t (B,); text (B, 77, D); weight (B,) is eps_t; active
        (B,) bool. Returns the injection and, with `maps`, eq. 13's M_c by the frozen layer it answers to.
        """
        wanted = frozenset(self.map_layers) if maps else frozenset()
        recording = Recording(wanted=frozenset(self.speaks_to[n] for n in wanted))
        self.copy(x_t + seen, t, text, cross_attention_kwargs={"p3s": recording})
        injection = Injection(
            features={n: self.zero_self[_key(n)](recording.self_inputs[self.speaks_to[n]]) for n in self.self_layers},
            cross={n: self.zero_cross[_key(n)](recording.cross_outputs[self.speaks_to[n]]) for n in self.cross_layers},
            weight=weight,
            lam=self.config.lam,
            gates={n: self.gates[_key(n)] for n in self.self_layers} if len(self.gates) else None,
            active=active,
            wanted=wanted,
        )
        return injection, {n: recording.maps[self.speaks_to[n]] for n in wanted}


@contextlib.contextmanager
def connected(unet: UNet2DConditionModel, control: P3SControl) -> Iterator[None]:
    """Both U-Nets with P3S's attention inside, their own processors afterwards."""
    with attention_seam(unet, "frozen"), attention_seam(control.copy, "copy"):
        yield


def controlled_noise(
    unet: UNet2DConditionModel,
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    *injections: Injection,
    residuals: tuple[Sequence[Tensor], Tensor] | None = None,
) -> Tensor:
    """P3S eq. 9: eps = F(eps_t f, x_t, c, t). With no injection, the frozen U-Net alone. (B, C, h, w).

    `residuals`: a ControlNet's, of the down blocks and of the middle one; they enter outside attention.
    """
    down, middle = residuals or (None, None)
    return unet(
        x_t,
        t,
        text,
        cross_attention_kwargs={"p3s": injections} if injections else None,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
