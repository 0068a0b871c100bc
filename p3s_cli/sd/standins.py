"""What stands in a diffusers pipeline in the place of its U-Net, to draw with any `eps`, and of its VAE."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from p3s_cli.sd.sample import Control, Eps, Guided, passes


class GuidedUNet(nn.Module):
    """A U-Net as the pipeline calls it, whose noise is `eps`'s, guidance already done.

    `scale` tells s_t, None without guidance; `empty` are the states of no text (1, 77, D), for that case;
    `control` tells what ControlNets add at a step, counted from 0; `reuse` is that of `Guided`.
    """

    def __init__(
        self,
        unet: nn.Module,
        eps: Eps,
        scale: Callable[[], float | None],
        subject_guidance: float,
        empty: Tensor,
        control: Callable[[int], Control | None],
        reuse: int = 1,
    ):
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self._guided, self._scale, self._subject_guidance, self._empty = (
            Guided(eps, reuse),
            scale,
            subject_guidance,
            empty,
        )
        self._control, self._step = control, itertools.count()

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
        made, control = passes(text, empty, s_t, self._subject_guidance), self._control(next(self._step))
        guided = self._guided(x, times, made, control)
        return (guided.to(sample.dtype).repeat(halves, 1, 1, 1),)


class Autoencoder:
    """A VAE as a pipeline calls it, in its own precision: SD's overflows in fp16 and stays in fp32."""

    def __init__(self, vae: AutoencoderKL):
        self.config, self._vae = vae.config, vae

    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        found = self._vae.encode(pixels.to(self._vae.dtype)).latent_dist
        return AutoencoderKLOutput(DiagonalGaussianDistribution(found.parameters.to(pixels.dtype)))

    def decode(self, latents: Tensor, **options: Any) -> Any:
        return self._vae.decode(latents.to(self._vae.dtype), **options)
