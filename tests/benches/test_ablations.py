"""Every row of the ablation table switches what it names, and nothing else does."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from p3s_cli import stages
from p3s_cli.atomic import sha256
from p3s_cli.benches import world as bench
from p3s_cli.benches.cases import Case
from p3s_cli.benches.entries import Entry, ablations
from p3s_cli.config import ControlConfig, FinetuneConfig, GenerateConfig, WeightSchedule
from p3s_cli.errors import InputError
from p3s_cli.evals.metrics import intersection_over_union
from p3s_cli.evals.truth import Truth
from p3s_cli.methods.base import Learnt, Lesson, SubjectPart
from p3s_cli.methods.p3s import P3S
from p3s_cli.methods.photos import mask_tensors, read_originals, read_photos
from p3s_cli.sd.family import load
from p3s_cli.sd.profile import find
from p3s_cli.sd.weights import load_tensors
from p3s_cli.subject import Subject
from p3s_cli.world import seeds
from p3s_cli.world.render import render
from p3s_cli.world.scenes import PHOTO_SIZE, lookalike_scene


@pytest.mark.parametrize("family", ["world", "sd15"])
def test_no_two_rows_are_the_same_thing_under_two_names(family):
    profile = find(family)
    rows = ablations(profile)
    default = {"subject_guidance": profile.subject_guidance, "schedule": profile.schedule, "references": 1}
    what = [(e.control or ControlConfig(), {**default, **e.sampling}, e.references) for e in rows]
    assert len({e.name for e in rows}) == len({repr(w) for w in what}) == len(rows) and rows[0] == Entry("p3s")


def test_rows_share_a_tuned_subject_exactly_where_they_differ_in_sampling_only():
    rows = {e.name: e for e in ablations(find("world"))}
    assert rows["weight fixed"].tuning == rows["p3s"].tuning == Entry("p3s").at_strength(0.5).tuning
    assert rows["three references"].tuning == rows["three references, all shown"].tuning
    tuned = [(e.control, e.references) for e in rows.values()]
    assert len({e.tuning for e in rows.values()}) == len({repr(t) for t in tuned})


@pytest.fixture(scope="module")
def tiny_family(tiny_folder):
    """The tiny family without its slow inpainter, which is not the question here."""
    return load(str(tiny_folder), device="cpu", inpainter="classical")


@pytest.fixture(scope="module")
def case(tmp_path_factory, tiny_family):
    """The first held-out scene and its true masks."""
    (made,) = bench.cases(tmp_path_factory.mktemp("cases"), tiny_family, [0], quick=True)
    assert made.name == "00-dog"
    return made, render([lookalike_scene(seeds.BENCH, "dog")], size=PHOTO_SIZE)[1][0]


def test_a_case_whose_photo_is_drawn_otherwise_by_now_is_refused(case, tmp_path, tiny_family, monkeypatch):
    """A second reference of another photo would be a subject of two looks, and a benchmark of two renderers."""
    folder = shutil.copytree(case[0].subject.parent, tmp_path / "cases")
    assert len(Subject.open(folder / "00-dog").manifest.references) == 1
    monkeypatch.setattr(bench, "render", lambda *a, **k: tuple(t.flip(-1) for t in render(*a, **k)))
    with pytest.raises(InputError, match="00-dog has a photo that this version of p3s draws otherwise; remove"):
        bench.cases(folder, tiny_family, [0], quick=True)
    assert len(Subject.open(folder / "00-dog").manifest.references) == 1
    shutil.rmtree(folder / "00-dog")
    assert len(bench.cases(folder, tiny_family, [0], quick=True)) == 1


def test_true_pictures_of_a_quick_and_a_full_run_lie_beside_each_other(tmp_path):
    """The second prompt of the one is the fourth of the other; a row's picture has the row's sha256 for good."""
    asked, truth = bench.prompts("dog"), Truth("00-dog", ())
    cases = [Case(tmp_path, chosen, truth) for chosen in (asked[::3], asked, asked[::3])]
    quick, full, again = (bench.calibration(case, 0, 0, tmp_path) for case in cases)
    drawn = [result for lines in (quick, full) for results in lines.values() for result in results]
    assert [r.prompt for r in drawn[:2]] == ["a dog on the beach", "a dog on a wooden floor"]
    assert all(sha256(r.path) == r.sha256 for r in drawn)
    assert again == quick and {r.path for r in drawn} == set(tmp_path.rglob("*.png"))


@pytest.fixture(scope="module")
def shown(case):
    """name -> the opened subject of each way in which the ablations show references."""
    ways = {e.references.name: e.references for e in ablations(find("world"))}
    return {name: Subject.open(case[0].shown(references)) for name, references in ways.items()}


def test_true_masks_are_the_worlds_truth_and_the_points_masks_are_not(case, shown):
    for name, exact in (("true", True), ("", False)):
        found = mask_tensors(shown[name], shown[name].manifest.references[0])
        for kind, truth in zip(("subject", "negative"), case[1], strict=False):
            assert (intersection_over_union(found[kind].bool(), truth) == 1.0) == exact


def test_without_inpainting_the_look_alike_stays_and_the_masks_are_the_same(shown):
    plain, unpainted = (mask_tensors(shown[n], shown[n].manifest.references[0]) for n in ("", "unpainted"))
    for kind in ("subject", "negative"):
        assert torch.equal(plain[kind], unpainted[kind])
    photo = read_originals(shown["unpainted"])[0].pixels
    assert torch.equal(unpainted["inpainted"], photo) and not torch.equal(plain["inpainted"], photo)
    assert shown["unpainted"].manifest.references[0].mask.result["filler"] == "none"


def test_eq_2_is_tried_on_raw_and_on_rescaled_similarities(shown):
    told = {n: shown[n].manifest.references[0].mask.settings for n in ("", "eq2-raw", "eq2-rescaled")}
    assert [told[n]["recipe"] for n in told] == ["prototypes", "paper", "paper"]
    assert [told[n]["similarity"] for n in told] == ["raw", "raw", "rescaled"]


def test_three_references_show_the_same_two_in_other_places(case, shown):
    photos = read_photos(shown["three"])
    assert len(photos) == 3 and len(read_photos(shown[""])) == 1
    assert len({hash(p.pixels.numpy().tobytes()) for p in photos}) == 3
    assert torch.equal(photos[0].pixels, read_photos(shown[""])[0].pixels)


ROWS = [e for e in ablations(find("world")) if e.control is not None]


@pytest.fixture(scope="module")
def fitted(case, tiny_family):
    """What two steps of sixteen samples teach a control with these settings."""
    subject = Subject.open(case[0].subject)

    def fit(control):
        return P3S().fit(Lesson(tiny_family, subject, FinetuneConfig(control, steps=2, lr=1e-3, batch=16)))

    return fit


def test_every_row_that_is_tuned_in_another_way_learns_something_else(fitted):
    """From one seed two runs part only by their settings, so a setting that nothing heeds gives the same control."""
    plain = fitted(ControlConfig())
    assert same(plain, fitted(ControlConfig()))
    assert [row.name for row in ROWS if same(plain, fitted(row.control))] == []


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", ["weight learned", "without RNGR", "paper preset"])
def test_a_row_is_tuned_as_it_says(name, case, tiny_family, tmp_path):
    entry = next(e for e in ablations(find("world")) if e.name == name)
    made = tuned(case, tiny_family, tmp_path / "dog", entry.control)
    recorded = Subject.open(made).manifest.finetune.settings["config"]["control"]
    assert recorded == json.loads(json.dumps(entry.control.__dict__))


def tuned(case, family, directory, control):
    stages.mask(next(case[0].subject.parent.glob("*.png")), ["0.5,0.5"], [], directory, "dog", family=family)
    return stages.finetune(directory, steps=1, family=family, control=control).subject


def test_a_learned_weight_is_what_sampling_by_it_injects_with(case, tiny_family, tmp_path):
    made = Subject.open(tuned(case, tiny_family, tmp_path / "dog", replace(ControlConfig(), learned_weight=True)))
    tensors, _ = load_tensors(made.path("control/control.safetensors"))
    generator = torch.Generator().manual_seed(0)
    for key in [k for k in tensors if k.startswith("zero_")]:  # a single step left them too small to see
        tensors[key] = torch.randn(tensors[key].shape, generator=generator) * 0.2
    x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([700])

    def noise(kind: str, bias: float) -> torch.Tensor:
        moved = tensors | {k: torch.zeros_like(v) for k, v in tensors.items() if k.startswith("weighting.mlp.2")}
        moved["weighting.mlp.2.bias"] = torch.tensor([bias])
        sampling = GenerateConfig(schedule=WeightSchedule(kind))
        part = SubjectPart(Learnt(made, moved, {"control": asdict(ControlConfig(learned_weight=True))}))
        with P3S().bind_many(tiny_family, [part], sampling) as bound, torch.no_grad():
            return bound.eps(x, t, bound.encode(["a [V] dog"]), True)

    torch.testing.assert_close(noise("learned", 0.0), noise("fixed", 0.0), rtol=0, atol=0)
    assert (noise("learned", 2.0) - noise("learned", 0.0)).abs().max() > 1e-4
    assert torch.equal(noise("fixed", 2.0), noise("fixed", 0.0))


def test_a_control_without_a_learned_weight_is_not_sampled_by_one(case, tiny_family, tmp_path):
    made = tuned(case, tiny_family, tmp_path / "dog", None)
    with pytest.raises(InputError, match="tuned without a learned weight; choose another --schedule"):
        stages.generate(made, "a [V] dog", n=1, steps=1, schedule="learned", family=tiny_family)


def test_another_seed_of_the_world_is_another_case(tmp_path, world):
    (one,), (other,) = (bench.cases(tmp_path, world, [0], seed, quick=True) for seed in (0, 1))
    assert one.name != other.name and one.truth.digest != other.truth.digest
    assert [len(Subject.open(c.subject).manifest.references) for c in (one, other)] == [1, 1]
