"""Passes of models and steps of training as CUDA graphs (`sd/graphs.py`)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p3s_cli.sd import graphs, nested
from p3s_cli.sd.graphs import Record, Recording, record
from p3s_cli.sd.train import Computed


class Graphed:
    """A function of tensors, recorded once for each shape of its arguments. For use without gradients.

    Arguments and results may hold tensors in dataclasses, dicts, lists and tuples; whatever else is in them is part of the
    shape, models by who they are. Results are the caller's own: the function's while a recording proves itself, in its
    first calls, and then a replay's.
    """

    def __init__(self, function: Callable[..., Any], record: Record = record):
        self._function, self._record = function, record
        self._recorded: dict[Hashable, Recording] = {}
        self._refused = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._refused:
            try:
                return self._graphed(arguments, options)
            except RuntimeError as error:
                self._refused, self._recorded = True, {}
                graphs.told(error)
        return self._function(*arguments, **options)

    def _graphed(self, arguments: tuple, options: dict) -> Any:
        given: list[Tensor] = []
        shape = nested.shape((arguments, options), given)
        recording = self._recorded.get(shape)
        if recording is None:
            fixed = [t.clone() for t in given]
            arguments, options = nested.filled((arguments, options), iter(fixed))
            function = self._function
            work = lambda: function(*arguments, **options)  # noqa: E731
            recording = self._recorded[shape] = Recording(work, fixed, _one_by_one, self._record)
        proving = recording.proofs < graphs.PROOFS
        results = recording.proved(given) if proving else recording.replayed(given)
        return nested.filled(results, iter([t.clone() for t in nested.tensors(results)]))


class Stepwise(Protocol):
    """A loss in two halves: `draw`, all that is random, a dataclass of tensors on the device; and `compute`, all else.

    `compute` (drawn, model) gives the value and named numbers, 0-d tensors. `judge` (drawn) is the same as a loss of
    `sd.train` gives it, in its own precision.
    """

    def draw(self, step: int, generator: torch.Generator) -> Any: ...

    def compute(self, drawn: Any, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]: ...

    def judge(self, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclasses.dataclass
class _Step:
    """What a recorded step leaves behind: value and named numbers, gradients in the masters' precision, the value and
    the gradients' norm (2,)."""

    value: Tensor
    numbers: dict[str, Tensor]
    gradients: list[Tensor | None]
    size: Tensor

    def parts(self) -> list[list[Tensor]]:
        return [[self.value], [self.size], [g for g in self.gradients if g is not None]]


class CapturedLoss:
    """A loss for `sd.train` whose computation, backward pass included, is one graph for each shape of what is drawn.

    It is computed with a copy of `model` in `dtype`, which follows `model` at every step; where that is what sampling will use,
    half precision needs no casts one by one. The gradients end in float32 at `model`'s own parameters.

    The first step of a shape is eager, and the recording made at the second, when all that a run keeps has its place in memory.
    It is proved on the draws of both before it counts; a step that is not finite is made again by `judge`.
    """

    def __init__(self, loss: Stepwise, model: nn.Module, dtype: torch.dtype, record: Record = record):
        self._loss, self._model, self._dtype, self._record = loss, model, dtype, record
        self._recorded: dict[Hashable, Recording[_Step]] = {}
        self._earlier: tuple[Hashable, Any] = None, None  # the last draw, and its shape
        self._refused = False

    def __call__(self, step: int, generator: torch.Generator) -> Computed:
        drawn = self._loss.draw(step, generator)
        shape = nested.shape(drawn, [])
        earlier, self._earlier = self._earlier, (shape, drawn)
        if shape not in self._recorded and shape == earlier[0] and not self._refused:
            try:
                self._recorded[shape] = self._begun([earlier[1], drawn])
            except RuntimeError as error:
                self._drop(error)
        if shape not in self._recorded:
            return Computed(*self._loss.judge(drawn))
        made = self._recorded[shape].replayed(nested.tensors(drawn))
        if not all(map(math.isfinite, made.size.tolist())):  # the loop waits for it right after, anyway
            return self._doubted(drawn)
        self._give(made.gradients)
        return Computed(made.value, made.numbers, made.size[1], self._record)

    def _begun(self, draws: Sequence[Any]) -> Recording[_Step]:
        """A recording that holds on these draws. Raises RuntimeError."""
        masters, working = self._trained(), copy.deepcopy(self._model).to(self._dtype)
        weights = [p for p in working.parameters() if p.requires_grad]
        fixed = [t.clone() for t in nested.tensors(draws[0])]
        drawn, compute = nested.filled(draws[0], iter(fixed)), self._loss.compute

        def work() -> _Step:
            with torch.no_grad():
                graphs.copy(weights, masters)
            value, numbers = compute(drawn, working)
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
            wide = [None if g is None else torch.empty_like(m) for g, m in zip(gradients, masters, strict=True)]
            there = [w for w in wide if w is not None]
            graphs.copy(there, [g for g in gradients if g is not None])
            value = value.detach()
            return _Step(value, numbers, wide, torch.stack([value.float(), nn.utils.get_total_norm(there).float()]))

        recording = Recording(work, fixed, _Step.parts, self._record, weights)
        for one in draws:
            recording.proved(nested.tensors(one))
        return recording

    def _doubted(self, drawn: Any) -> Computed:
        """The eager step in the place of a recorded one that is not finite, and of all that follow if it is finite itself."""
        value, numbers = self._loss.judge(drawn)
        gradients = torch.autograd.grad(value, self._trained(), allow_unused=True)
        # laid out as the parameters are, as the optimiser's kernels take for granted
        pairs = zip(gradients, self._trained(), strict=True)
        gradients = [None if g is None else torch.empty_like(p).copy_(g) for g, p in pairs]
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        if math.isfinite(value.item()) and math.isfinite(norm.item()):
            self._drop(graphs.Untrue("a replay was not finite where its work is"))
        self._give(gradients)
        return Computed(value.detach(), numbers, norm)

    def _give(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._trained(), gradients, strict=True):
            parameter.grad = gradient  # the loop lets go of it after each step

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _drop(self, error: RuntimeError) -> None:
        self._recorded, self._refused = {}, True
        graphs.told(error)


def _one_by_one(results: Any) -> list[list[Tensor]]:
    return [[t] for t in nested.tensors(results)]
