"""A recorded update moves everything to the bits of one that is not: here recorded by making it again, on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from p3s_cli.sd.train import Checkpoint, Computed, Recipe, train

TARGET = torch.linspace(-2, 2, 7)
RECIPE = Recipe(steps=12, lr=0.05, warmup=3, decay="cosine", weight_decay=0.1, ema=0.9, lr_scale=(("gates", 3.0),))


class Quadratic:
    """Noisy |w - target|^2 of two tensors; its gradients are left with them, in the same place at every step, as a recorded loss leaves them."""

    def __init__(self, record=None, moves_at=None, longer=1.0):
        self.parameters = {n: nn.Parameter(torch.zeros(7)) for n in ("gates.a", "b")}
        self.record, self.moves_at, self.longer = record, moves_at, longer
        self.places = [torch.zeros(7) for _ in self.parameters]

    def __call__(self, step, generator):
        wanted = [TARGET + 0.1 * torch.randn(7, generator=generator) for _ in self.places]
        apart = [p.detach() - w for p, w in zip(self.parameters.values(), wanted, strict=True)]
        if step == self.moves_at:
            self.places = [p.clone() for p in self.places]
        for parameter, place, d in zip(self.parameters.values(), self.places, apart, strict=True):
            parameter.grad = place.copy_(2 * d)
        norm = self.longer * nn.utils.get_total_norm(self.places)
        return Computed(sum(d.square().sum() for d in apart), {}, norm, self.record)


def learnt(loss, recipe=RECIPE, **options):
    weights = train(loss.parameters, loss, recipe, **options)
    return torch.cat([*weights.values(), *(p.detach() for p in loss.parameters.values())])


def recorder(replays, change=lambda work: work()):
    """A recording whose replays, which are counted, do `change` of the work."""

    def record(work):
        work(), work()  # as CUDA's, for what libraries set up at their first call

        def replay():
            replays.append(1)
            change(work)

        return replay, None

    return record


def test_gradients_that_are_there_already_are_what_a_backward_pass_would_leave():
    def loss(step, generator):
        wanted = [TARGET + 0.1 * torch.randn(7, generator=generator) for _ in range(2)]
        pairs = zip(parameters.values(), wanted, strict=True)
        return sum((p - w).square().sum() for p, w in pairs), {}

    given = Quadratic()
    parameters = {n: nn.Parameter(p.detach().clone()) for n, p in given.parameters.items()}
    train(parameters, loss, RECIPE)
    train(given.parameters, given, RECIPE)
    for name, parameter in parameters.items():
        torch.testing.assert_close(given.parameters[name], parameter)


def test_a_recorded_update_moves_everything_to_the_same_bits():
    """At rates that change at every step, with decay and a running average; the first update is the optimiser's own."""
    plain = learnt(Quadratic())
    assert torch.equal(learnt(Quadratic(recorder(replays := []))), plain)
    assert len(replays) == RECIPE.steps  # one to prove it, then all but the first


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda work: None, "a replay moved the weights to another place than the optimiser does"),
        (lambda work: (work(), work()), "a replay moved the weights to another place than the optimiser does"),
        (None, "operation not permitted when stream is capturing"),
    ],
    ids=["nothing", "twice", "refused"],
)
def test_an_update_recorded_wrongly_is_made_by_the_optimiser(caplog, change, why):
    """Its replays never count, nothing of them stays, it is tried once, and the log says so in a line."""

    def refuse(work):
        work()
        raise RuntimeError(f"{why}\nand more")

    replays: list[int] = []
    record = recorder(replays, change) if change else refuse
    assert torch.equal(learnt(Quadratic(record)), learnt(Quadratic()))
    assert len(replays) == bool(change)
    assert [r.message for r in caplog.records] == [f"no CUDA graph of the optimiser's step, going on without: {why}"]


def test_a_replay_reads_the_gradients_it_was_recorded_with_and_no_others():
    """A graph knows addresses: where the gradients have moved, the optimiser itself makes the step, and it is recorded anew."""
    moved = Quadratic(recorder(replays := []), moves_at=5)
    assert torch.equal(learnt(moved), learnt(Quadratic()))
    assert len(replays) == RECIPE.steps  # two to prove both, and all steps but the first and the sixth


def test_a_run_with_recorded_updates_goes_on_from_its_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    learnt(Quadratic(recorder([])), until=5, checkpoint=checkpoint)
    pieces = learnt(Quadratic(recorder([])), checkpoint=checkpoint)
    assert torch.equal(pieces, learnt(Quadratic()))


def test_gradients_are_clipped_by_the_norm_that_came_with_them():
    """Told that they are a billion times as long, they are cut as if the limit were a billionth: to where Adam's epsilon is what counts."""
    told, short, free = (
        learnt(Quadratic(recorder([]), longer=longer), replace(RECIPE, clip=clip))
        for longer, clip in ((1e9, 1.0), (1.0, 1e-9), (1.0, 1.0))
    )
    torch.testing.assert_close(told, short, rtol=1e-4, atol=1e-6)
    assert (told - free).abs().max() > 0.01


def test_moments_come_back_as_the_weights_lie(tmp_path):
    """A fused optimiser goes through memory: moments in another order would be those of other weights."""

    def problem():
        weight = nn.Parameter(torch.zeros(3, 4, 2, 2).to(memory_format=torch.channels_last))
        wanted = torch.linspace(-2, 2, 48).view(3, 4, 2, 2)
        return {"w": weight}, lambda step, generator: ((weight - wanted).square().sum(), {})

    recipe, checkpoint = Recipe(steps=12, lr=0.05), Checkpoint(tmp_path / "run")
    whole = train(*problem(), recipe)["w"]
    train(*problem(), recipe, checkpoint=checkpoint, until=5)
    assert torch.equal(train(*problem(), recipe, checkpoint=checkpoint)["w"], whole)
