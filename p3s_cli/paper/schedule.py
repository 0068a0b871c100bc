"""P3S eq. 10: how strongly the subject is injected at each timestep."""

from __future__ import annotations

from p3s_cli.config import WeightSchedule


def injection_weight(t: float, schedule: WeightSchedule) -> float:
    """P3S eq. 10: eps_t = 1 - alpha (t / T)^k + beta, weak early (t near T), strong late.

    The variants of Fig. 5 and Table III, as we read them: `fixed` is 1 at every t; `decreasing` falls
    in t along a straight line (k = 1); `increasing` is eq. 10 mirrored in time; `off` injects nothing.
    """
    u = t / schedule.T
    if schedule.kind == "off":
        return 0.0
    if schedule.kind == "fixed":
        return 1.0
    fall = {"quadratic": u**schedule.k, "decreasing": u, "increasing": (1 - u) ** schedule.k}[schedule.kind]
    return 1 - schedule.alpha * fall + schedule.beta
