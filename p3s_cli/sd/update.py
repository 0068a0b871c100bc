"""What a training step does with its gradients: AdamW, as a CUDA graph where the gradients keep their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from p3s_cli.config import Optimizer
from p3s_cli.sd import graphs
from p3s_cli.sd.adamw8 import AdamW8
from p3s_cli.sd.graphs import Record, Untrue

_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "root", "root_scale")


class Update:
    """An optimiser over named parameters, each with a rate of its own.

    Its Python alone takes as long as a fast card's mathematics. So where gradients keep their place a step is recorded, replayed for
    as long as they lie there, and counts once a replay has moved everything to the very bits that the optimiser moves it to; that takes twice the
    memory of weights and moments, for a moment, and where there is not so much all goes on without.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        kind: Optimizer,
        seed: int,
        **options: Any,
    ):
        self._parameters = dict(parameters)
        device = next(iter(self._parameters.values())).device
        cuda = device.type == "cuda" and kind == "adamw"
        self._rates = list(dict.fromkeys(rates.values()))
        # one group a rate, for the optimiser works on a group at once; a graph knows no number but those on the card
        groups = [
            {
                "params": [p for n, p in self._parameters.items() if rates[n] == rate],
                "lr": torch.tensor(rate, device=device) if cuda else rate,
            }
            for rate in self._rates
        ]
        if kind == "adamw8":
            self.optimizer: torch.optim.Optimizer = AdamW8(groups, **options, seed=seed)
        else:
            fused = device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.AdamW(groups, **options, fused=fused, capturable=cuda)
        self._work = self.optimizer.step  # held: a graph keeps nothing alive
        self._replay: Callable[[], None] | None = None
        self._gradients: list[Tensor] = []  # what it reads
        self._refused = False
        self.clear()

    def step(self, factor: float, record: Record | None = None) -> None:
        """Move the parameters by their gradients, at `factor` of every rate.

        `record`: the gradients will lie where they lie now, so the next steps can be recorded, in this way.
        """
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        if self._replay is not None and _places(self._given()) == _places(self._gradients):
            self._replay()
            return
        self._replay, self._gradients = None, []  # they lie elsewhere now
        self._work()
        if record is not None and not self._refused:
            try:
                self._replay, self._gradients = self._recorded(record), self._given()
            except RuntimeError as error:
                self._refused = True
                graphs.told(error, "of the optimiser's step")

    def clear(self) -> None:
        """Let go of the gradients."""
        self.optimizer.zero_grad()

    def moments(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by what it is and whose: for `restore`."""
        return {
            f"{key}/{name}": torch.as_tensor(value)
            for name, parameter in self._parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        fused = self.optimizer.defaults.get("fused")
        for name, parameter in self._parameters.items():
            moments = {key: kept[f"{key}/{name}"] for key in _MOMENTS if f"{key}/{name}" in kept}
            if moments:  # a fused optimiser reads its count on the device, the others on the CPU
                self.optimizer.state[parameter] = {
                    k: v if k == "step" and not fused else _beside(parameter, v) for k, v in moments.items()
                }

    def _given(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    @torch.no_grad()
    def _recorded(self, record: Record) -> Callable[[], None]:
        """A step as a recording that does what a step does; all is then as it was. Raises RuntimeError."""
        state = [*self._parameters.values(), *self.moments().values()]
        kept, truth = ([t.clone() for t in state] for _ in range(2))
        try:
            replay, _ = record(self._work)
            graphs.copy(state, kept)
            self._work()
            graphs.copy(truth, state)
            graphs.copy(state, kept)
            replay()
            if not all(map(torch.equal, state, truth)):
                raise Untrue("a replay moved the weights to another place than the optimiser does")
        finally:
            graphs.copy(state, kept)
        return replay


def _beside(parameter: Tensor, moment: Tensor) -> Tensor:
    """The moment where the parameter is, and laid out like it: a fused optimiser goes by places and looks at no strides."""
    if moment.shape != parameter.shape:  # packed, or a count
        return moment.to(parameter.device)
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _places(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
