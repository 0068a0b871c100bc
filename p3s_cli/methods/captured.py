"""P3S's passes and its training step as CUDA graphs: thousands of small launches recorded once and then sent as one.

A fast card is done with a kernel sooner than Python can launch the next one, and every step launches the same ones with
the same shapes. What a graph reads lies at fixed addresses, so it is copied there before each replay; nothing in it
may wait for the card or depend on a number read from it. Where a card will not have it, all goes on without, and the log says so.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")
# work without arguments -> what does it again, and its results, which are always these very tensors
Record = Callable[[Callable[[], R]], tuple[Callable[[], None], R]]

LEAST_STEPS = 10  # recording costs about as much as three steps
_log = logging.getLogger(__name__)


def possible(device: str, steps: int) -> bool:
    """Whether passes that come this often on this device are worth a recording."""
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return cuda and torch.device(device).index in (None, torch.cuda.current_device()) and steps >= LEAST_STEPS


def record(work: Callable[[], R]) -> tuple[Callable[[], None], R]:
    """A CUDA graph of `work`, which runs twice before, for what libraries set up at their first call."""
    own, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(own)
    with torch.cuda.stream(aside):
        for _ in range(2):
            work()
    own.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = work()
    except RuntimeError:
        torch.cuda.set_stream(own)  # a recording that breaks off leaves its own stream in this one's place
        torch.cuda.synchronize()
        raise
    return graph.replay, result


class Graphed:
    """A function of tensors, recorded once for each shape of its arguments. For use without gradients.

    Arguments and results may hold tensors in dataclasses, dicts, lists and tuples; whatever else is in them is part of the
    shape, models by who they are. Results are the caller's own.
    """

    def __init__(self, function: Callable[..., Any], record: Record = record):
        self._function, self._record = function, record
        self._recorded: dict[Hashable, tuple[list[Tensor], Callable[[], None], Any]] = {}
        self._refused = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        given: list[Tensor] = []
        shape = _shape((arguments, options), given)
        if not self._refused and shape not in self._recorded:
            try:
                self._recorded[shape] = self._first(arguments, options, given)
            except RuntimeError as error:
                self._refused = True
                _told(error)
        if self._refused:
            return self._function(*arguments, **options)
        fixed, replay, results = self._recorded[shape]
        _copy(fixed, given)
        replay()
        found: list[Tensor] = []
        _shape(results, found)
        return _filled(results, iter([t.clone() for t in found]))

    def _first(self, arguments: tuple, options: dict, given: list[Tensor]) -> tuple[list[Tensor], Callable, Any]:
        fixed = [t.clone() for t in given]
        arguments, options = _filled((arguments, options), iter(fixed))
        return fixed, *self._record(lambda: self._function(*arguments, **options))


class Stepwise(Protocol):
    """A loss in two halves: `draw`, all that is random, a dataclass of tensors on the device; and `compute`, all else.

    `compute` (drawn, model, beside) gives the value and named numbers, 0-d tensors, where `beside` may run some of it
    at the same time. `judge` (drawn) is the same as a loss of `sd.train` gives it, in its own precision.
    """

    def draw(self, generator: torch.Generator) -> Any: ...

    def compute(self, drawn: Any, model: nn.Module, beside: Any) -> tuple[Tensor, dict[str, Tensor]]: ...

    def judge(self, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]: ...


class CapturedLoss:
    """A loss for `sd.train` whose computation, backward pass included, is one graph.

    It is computed with a copy of `model` in `dtype`, which follows `model` at every step and is what sampling will use,
    so that half precision needs no casts one by one; the gradients end in float32 at `model`'s own parameters.
    """

    def __init__(self, loss: Stepwise, model: nn.Module, dtype: torch.dtype, record: Record = record):
        self._loss, self._model, self._dtype, self._record = loss, model, dtype, record
        self._replay: Callable[[], None] | None = None
        self._refused = False

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = self._loss.draw(generator)
        if self._replay is None and not self._refused:
            try:
                self._begin(drawn)
            except RuntimeError as error:
                self._refused = True
                self._given = self._gradients = self._told = None
                _told(error)
        if self._refused:
            return self._loss.judge(drawn)
        _copy(_tensors(self._given), _tensors(drawn))
        self._replay()
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient  # the loop lets go of it after each step
        return self._told

    def _begin(self, drawn: Any) -> None:
        masters = list(self._model.parameters())
        working = copy.deepcopy(self._model).to(self._dtype)
        weights = list(working.parameters())
        self._given = _filled(drawn, iter([t.clone() for t in _tensors(drawn)]))
        beside = Beside() if masters[0].is_cuda else Inline()

        def work() -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
            with torch.no_grad():
                _copy(weights, masters)
            value, numbers = self._loss.compute(self._given, working, beside)
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
            wide = [None if g is None else torch.empty_like(m) for g, m in zip(gradients, masters, strict=True)]
            _copy([w for w in wide if w is not None], [g for g in gradients if g is not None])
            return value.detach(), numbers, wide

        self._replay, (value, numbers, self._gradients) = self._record(work)
        self._told = value, numbers


class Inline:
    """Where there is nothing to run at the same time: `begun` runs its body, `joined` waits for nothing."""

    def begun(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def joined(self) -> None:
        pass


class Beside(Inline):
    """Runs the body of `begun` on a stream of its own until `joined`: small kernels leave most of a card free."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def joined(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)


def _told(error: RuntimeError) -> None:
    _log.warning("no CUDA graph here, going on without: %s", str(error).split("\n")[0])


def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_(list(into), list(source))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _shape(value, found)
    return found


def _shape(value: Any, found: list[Tensor]) -> Hashable:
    """What must be the same for a recording to serve; the tensors in `value` are added to `found`, in order."""
    if isinstance(value, Tensor):
        found.append(value)
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return "dict", *((k, _shape(v, found)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(_shape(v, found) for v in value)
    if dataclasses.is_dataclass(value):
        return type(value), *(_shape(getattr(value, f.name), found) for f in dataclasses.fields(value))
    return value if isinstance(value, (int, float, str, bool, frozenset, type(None))) else id(value)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with other tensors in it, in the order of `_shape`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {k: _filled(v, tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_filled(v, tensors) for v in value])
    if dataclasses.is_dataclass(value):
        fields = {f.name: _filled(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
