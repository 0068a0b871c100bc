"""P3S eq. 10: how strongly the subject is injected at each timestep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p3s_cli.config import WeightSchedule

_HIDDEN = 16


def injection_weight(t: float, schedule: WeightSchedule) -> float:
    """P3S eq. 10: eps_t = 1 - alpha (t / T)^k + beta, weak early (t near T), strong late.

    The variants of Fig. 5 and Table III, as we read them: `fixed` is 1 at every t; `decreasing` falls
    in t along a straight line (k = 1); `increasing` is eq. 10 mirrored in time; `off` injects nothing;
    `learned` leaves eps_t to each control's own LearnedWeight, which is what multiplies the 1 given here.
    """
    u = t / schedule.T
    if schedule.kind == "off":
        return 0.0
    if schedule.kind in ("fixed", "learned"):
        return 1.0
    fall = {"quadratic": u**schedule.k, "decreasing": u, "increasing": (1 - u) ** schedule.k}[schedule.kind]
    return 1 - schedule.alpha * fall + schedule.beta


class LearnedWeight(nn.Module):
    """The learned weight of Fig. 5, in the place of eq. 10: eps_t = 2 sigmoid(MLP(t / T)), between 0 and 2.

    The paper says no more than "a trainable MLP"; that it sees t alone, and its bounds, are our reading. Its
    last layer starts at zero, so that eps_t = 1 at every t before training, which is `fixed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, 1))
        for parameter in self.mlp[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (B,) -> eps_t (B,)."""
        u = (t / WeightSchedule.T)[:, None].to(self.mlp[0].weight.dtype)
        return 2 * torch.sigmoid(self.mlp(u))[:, 0]
