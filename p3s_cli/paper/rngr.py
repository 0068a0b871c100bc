"""P3S eq. 4-5: the RNGR encoder, which biases the copy's input towards the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RNGREncoder(nn.Module):
    """P3S eq. 4-5: I'' = I' + softmax(Q K^T / sqrt(d)) V, with Q = W_Q Z(I'), K = W_K c_s, V = W_V c_s.

    Z is a zero-initialised 1x1 convolution and W_V starts at zero, so that I'' = I' before training.
    """

    def __init__(self, latent_channels: int, vision_width: int, width: int = 64):
        super().__init__()
        self.zero_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.to_q = nn.Linear(latent_channels, width, bias=False)
        self.to_k = nn.Linear(vision_width, width, bias=False)
        self.to_v = nn.Linear(vision_width, latent_channels, bias=False)
        for parameter in (*self.zero_conv.parameters(), self.to_v.weight):
            nn.init.zeros_(parameter)

    def forward(self, latent: Tensor, vision: Tensor) -> Tensor:
        """latent I' (B, C, h, w), vision tower's last hidden state c_s (B, M, D) -> I'' (B, C, h, w)."""
        batch, channels, height, width = latent.shape
        tokens = self.zero_conv(latent).flatten(2).transpose(1, 2)  # (B, hw, C)
        query, key, value = self.to_q(tokens), self.to_k(vision), self.to_v(vision)  # (B, hw, d), (B, M, d), (B, M, C)
        bias = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1) @ value
        return latent + bias.transpose(1, 2).reshape(batch, channels, height, width)
