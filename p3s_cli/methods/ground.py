"""What the frozen U-Net itself predicts, which P3S's training keeps outside the subject (`ControlConfig.preserve`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from p3s_cli.paper.model import controlled_noise
from p3s_cli.sd import graphs


class KeptGround:
    """The frozen U-Net's own prediction for each draw of a training, made when the draw is first met.

    A forward pass in four, which draws that come again (`ControlConfig.rounds`) do without. `frozen` is P3S eq. 9 with no
    injection, perhaps recorded; what is kept is used again, so a replay that is not finite is made anew by the pass itself.
    Nothing is kept where draws do not come `again`.
    """

    def __init__(self, unet: nn.Module, frozen: Callable[..., Tensor], again: bool):
        self._unet, self._frozen, self._again = unet, frozen, again
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, draw: int, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """x_t (B, 4, h, w), t (B,), text states (B, 77, D) of draw number `draw` -> noise (B, 4, h, w)."""
        if draw in self._kept:
            return self._kept[draw]
        made = self._made(x_t, t, states)
        if self._again:
            self._kept[draw] = made
        return made

    def _made(self, *given: Tensor) -> Tensor:
        made = self._frozen(self._unet, *given)
        if self._frozen is controlled_noise or torch.isfinite(made).all():
            return made
        made = controlled_noise(self._unet, *given)
        if torch.isfinite(made).all():
            self._frozen = controlled_noise
            graphs.told(graphs.Untrue("a replay was not finite where its work is"))
        return made
