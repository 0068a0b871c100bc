"""Export and import: sizes at SD v1-5's exact shape, exactness where it is due, and bases that do not fit."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from p3s_cli import stages
from p3s_cli.config import ControlConfig
from p3s_cli.errors import InputError
from p3s_cli.methods import lowrank
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd import images, single_file
from p3s_cli.sd.family import load
from p3s_cli.sd.weights import load_tensors


def test_sizes_at_the_exact_shape_of_sd15():
    """fp16: two bytes a parameter, 579.4 M of the copy and 2 x 12.4 M of zero convolutions; the default rank
    stays under 100 MB, and a matrix (m, n) takes r (m + n) numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(single_file.CONFIGS / "unet"))
        control = P3SControl(unet, 1024, ControlConfig())
    shapes = {n: p.shape for n, p in control.named_parameters()}
    assert lowrank.size(shapes, None) == 2 * sum(p.numel() for p in control.parameters())
    assert lowrank.size(shapes, None) / 1e9 == pytest.approx(1.21, abs=0.01)
    assert 70e6 < lowrank.size(shapes, lowrank.RANK) < 75e6
    steps = [lowrank.size(shapes, r) for r in (4, 8, 12)]
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1], rel=0.01)


def test_a_difference_of_low_rank_comes_back_exactly_and_one_of_high_rank_as_its_best_approximation():
    """Eckart-Young: what rank r leaves is the root of the sum of the squared singular values behind r."""
    g = torch.Generator().manual_seed(0)
    low = torch.randn(90, 3, generator=g) @ torch.randn(3, 200, generator=g)
    u, v = lowrank.factors(low, 4)
    torch.testing.assert_close(u @ v, low, rtol=1e-4, atol=1e-4)
    orthogonal = [torch.linalg.qr(torch.randn(n, 60, generator=g))[0] for n in (90, 200)]
    values = 0.8 ** torch.arange(60)
    full = orthogonal[0] * values @ orthogonal[1].T
    u, v = lowrank.factors(full, 8)
    assert (full - u @ v).norm().item() == pytest.approx(values[8:].square().sum().sqrt().item(), rel=0.02)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, pair, world):
    folder = tmp_path_factory.mktemp("share")
    images.save_png(folder / "two.png", pair[0])
    stages.mask(folder / "two.png", [pair[2][0]], [pair[2][1]], folder / "pet", "pet", family=world)
    stages.finetune(folder / "pet", steps=2, family=world)
    return folder


def test_a_subject_exported_whole_draws_the_same_image_elsewhere(tuned, world):
    out = stages.export_subject(tuned / "pet", tuned / "pet.p3s.safetensors", full=True, family=world)
    made = stages.import_subject(out.file, tuned / "copy", family=world)
    drawn = [
        stages.generate(r, "a [V] pet", n=1, steps=1, family=world).images[0] for r in (tuned / "pet", made.subject)
    ]
    assert images.load_image(drawn[0]).tobytes() == images.load_image(drawn[1]).tobytes()
    assert out.error == 0 and not list(made.subject.rglob("photo.png"))
    with pytest.raises(InputError, match="copy exists already"):
        stages.import_subject(out.file, tuned / "copy", family=world)


def test_a_low_rank_export_is_smaller_and_says_how_much_it_leaves_out(tuned, world):
    whole, _ = load_tensors(tuned / "pet/control/control.safetensors")
    sizes, errors = [], []
    for rank in (4, 16):
        out = stages.export_subject(tuned / "pet", tuned / f"{rank}.p3s.safetensors", rank, family=world)
        stages.import_subject(out.file, tuned / f"r{rank}", device="cpu")  # models not loaded before
        again, _ = load_tensors(tuned / f"r{rank}/control/control.safetensors")
        start = P3SControl(world.unet, world.vision.width, ControlConfig()).state_dict()
        trained = [n for n in whole if not n.startswith(("rngr", "gates"))]  # which begin at random, or not at zero
        left = sum((again[n].float() - whole[n].float()).square().sum() for n in trained)
        total = sum((start[n] - whole[n].float()).square().sum() for n in trained)
        errors.append((left / total).sqrt().item())
        sizes.append(out.bytes)
        assert again.keys() == whole.keys() and out.rank == rank
    assert sizes[0] < sizes[1] < (tuned / "pet/control/control.safetensors").stat().st_size
    assert errors[1] < errors[0] < 1


def test_another_base_and_another_file_are_refused(tuned, world, tmp_path):
    out = stages.export_subject(tuned / "pet", tuned / "x.p3s.safetensors", family=world)
    other = load("world", device="cpu")
    other.fingerprint = lambda: "f" * 64
    with pytest.raises(InputError, match="another base model .*not ffffffffffff"):
        stages.import_subject(out.file, tmp_path / "y", family=other)
    assert not (tmp_path / "y").exists()
    with pytest.raises(InputError, match="is not a subject that p3s export wrote"):
        stages.import_subject(tuned / "pet/control/control.safetensors", tmp_path / "z", family=world)
