"""Export and import: sizes at SD v1-5's exact shape, exactness where it is due, and bases that do not fit."""

import copy
import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from p3s_cli import stages
from p3s_cli.cli import app
from p3s_cli.config import ControlConfig
from p3s_cli.errors import InputError, P3SError
from p3s_cli.lock import writing
from p3s_cli.methods import lowrank
from p3s_cli.paper.model import P3SControl
from p3s_cli.sd import family, images, single_file
from p3s_cli.sd.family import load
from p3s_cli.sd.weights import load_metadata, load_tensors, save_tensors
from p3s_cli.stages import sharing
from p3s_cli.stages.exported import FORMAT
from p3s_cli.subject import CONTROL, Subject, hashes

GOLDEN = Path(__file__).parent / "golden"


def test_sizes_at_the_exact_shape_of_sd15():
    """fp16: two bytes a parameter, 579.4 M of the copy and 2 x 12.4 M of zero convolutions; the default rank
    stays under 100 MB, and a matrix (m, n) takes r (m + n + 4) bytes."""
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


def test_an_import_takes_the_place_of_no_subject_made_meanwhile(tuned, world, monkeypatch):
    """Another process may make the directory while this one reads its models."""
    out = stages.export_subject(tuned / "pet", tuned / "late.p3s.safetensors", 4, family=world)
    joined = sharing._joined

    def meanwhile(*given):
        shutil.copytree(tuned / "pet", tuned / "late")
        return joined(*given)

    monkeypatch.setattr(sharing, "_joined", meanwhile)
    with pytest.raises(InputError, match="late exists already"):
        stages.import_subject(out.file, family=world, output=tuned / "late")
    same = [(tuned / name / "subject.json").read_bytes() for name in ("pet", "late")]
    assert same[0] == same[1]


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


def test_eight_bits_round_each_direction_to_half_a_step_of_its_own():
    """|U V - U_q s V_q| <= sum_k (a_k |V| / 2 + b_k |U| / 2 + a_k b_k / 4), a and b a 127th of the largest of each."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 6, generator=g) * torch.tensor([1e4, 1, 1e-2, 1, 1, 0]) @ torch.randn(6, 90, generator=g)
    u, v = lowrank.factors(matrix, 6)
    parts = {f"x.{n}": t for n, t in lowrank._in_eight_bits(matrix, 6).items()}
    a, b = u.abs().amax(0) / 127, v.abs().amax(1) / 127
    bound = (a * 0.5) @ v.abs() + u.abs() @ (b[:, None] * 0.5) + (a * b / 4).sum()
    difference = (lowrank._product(parts, "x") - u @ v).abs()
    assert (difference <= 1.001 * bound).all() and difference.max() > 0
    assert parts["x.u"].dtype == torch.int8 and {int(parts[f"x.{n}"].abs().max()) for n in "uv"} == {127}
    zero = {f"x.{n}": t for n, t in lowrank._in_eight_bits(torch.zeros(4, 9), 2).items()}
    assert (lowrank._product(zero, "x") == 0).all()


def test_another_base_and_another_file_are_refused(tuned, world, tmp_path):
    out = stages.export_subject(tuned / "pet", tuned / "x.p3s.safetensors", family=world)
    other = load("world", device="cpu")
    other.fingerprint = "f" * 64
    with pytest.raises(InputError, match="another base model .*not ffffffffffff"):
        stages.import_subject(out.file, tmp_path / "y", family=other)
    assert not (tmp_path / "y").exists()
    with pytest.raises(InputError, match="is not a subject that p3s export wrote"):
        stages.import_subject(tuned / "pet/control/control.safetensors", tmp_path / "z", family=world)


@pytest.fixture
def exported(tmp_path, tiny_family):
    """(tensors, description) of an export, and where one that was changed may be written."""
    photo = tiny.photo(tmp_path / "two.png")
    stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "thing", "thing", family=tiny_family)
    stages.finetune(tmp_path / "thing", steps=1, family=tiny_family)
    out = stages.export_subject(tmp_path / "thing", tmp_path / "good.p3s.safetensors", 2, family=tiny_family)
    return *load_tensors(out.file), tmp_path / "bad.p3s.safetensors"


def bomb(side):
    """A PNG of a few bytes that says it has side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return torch.frombuffer(bytearray(start + struct.pack(">I", 0) + b"IDAT"), dtype=torch.uint8)


MASK = "reference/0/subject"
HOSTILE = {
    "of a later format": (lambda t, d: d.update(format=FORMAT + 1), f"its format is {FORMAT + 1}"),
    "without a description": (lambda t, d: d.clear(), "its format is None"),
    "no rank": (lambda t, d: d.update(rank="many"), "rank"),
    "no base": (lambda t, d: d["finetune"].pop("base"), "names no base"),
    "no settings": (lambda t, d: d["finetune"].update(config={}), "settings of the control cannot be read"),
    "no settings at all": (lambda t, d: d["finetune"].pop("config"), "settings of the control cannot be read"),
    "a CLIP pair without a name": (lambda t, d: d["finetune"].update(vision=5), "names no CLIP pair"),
    "a class word with a place": (
        lambda t, d: d.update(class_word="[V2] dog"),
        "its class word is none: '.V2. dog'",
    ),
    "a class word that writes to the screen": (
        lambda t, d: d.update(class_word="d\x1b[31mog"),
        "its class word is none",
    ),
    "an identifier that fills a prompt": (lambda t, d: d.update(identifier="sks " * 600), "its identifier is none"),
    "no references": (lambda t, d: d.update(references=[]), "references"),
    "a reference elsewhere": (lambda t, d: d["references"][0].update(folder="../../x"), "folder"),
    "a reference of another size": (lambda t, d: d["references"][0].update(width=65), "RGB of 64 x 64|L of 64 x 64"),
    "a tensor too few": (lambda t, d: t.pop(MASK), f"{MASK} is missing"),
    "a tensor too many": (lambda t, d: t.update({"../x": torch.ones(1)}), "../x is not expected"),
    "a factor of another shape": (
        lambda t, d: t.update({name(t): torch.zeros(3, 2).half()}),
        r"F16\[3, 2\] instead of I8",
    ),
    "no picture": (lambda t, d: t.update({MASK: torch.zeros(9, dtype=torch.uint8)}), "no readable picture"),
    "a bomb": (lambda t, d: t.update({MASK: bomb(2**30)}), "no readable picture"),
    "a bomb that was announced": (
        lambda t, d: (t.update({MASK: bomb(20_000)}), d["references"][0].update(width=20_000, height=20_000)),
        "no readable picture",
    ),
}


def name(tensors):
    return next(n for n in tensors if n.endswith(".u"))


@pytest.mark.parametrize("change", HOSTILE)
def test_an_export_that_p3s_did_not_write_is_refused_and_leaves_nothing(exported, tmp_path, tiny_family, change):
    tensors, described, path = exported
    how, words = HOSTILE[change]
    how(tensors, described)
    described.pop("schema", None)
    save_tensors(path, tensors, described)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        stages.import_subject(path, tmp_path / "in", family=tiny_family)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_export_of_every_format_is_read(tmp_path, tiny_family):
    """`tests/golden/export-<n>.p3s.safetensors` was written in the days of that format from `tests/golden/schema-1`."""
    for number in range(1, FORMAT + 1):
        file = GOLDEN / f"export-{number}.p3s.safetensors"
        family = copy.copy(tiny_family)  # its weights may be drawn in another way some day; shapes and names may not
        family.fingerprint = load_tensors(file)[1]["finetune"]["base_fingerprint"]
        root = stages.import_subject(file, tmp_path / str(number), family=family).subject
        images_ = [load_tensors(r / "references/00/mask.safetensors")[0] for r in (root, GOLDEN / "schema-1")]
        assert all(torch.equal(images_[0][n], images_[1][n]) for n in ("subject", "negative", "inpainted"))
        stages.generate(root, "a [V] thing", n=1, steps=1, family=family)


@pytest.fixture
def moved(exported, tmp_path, tiny_folder):
    """An export, and its base where the importer has it."""
    return tmp_path / "good.p3s.safetensors", shutil.copytree(tiny_folder, tmp_path / "here/base")


def test_an_import_remembers_where_the_base_and_its_clip_pair_lie_here(moved, tmp_path, tiny_folder):
    """So that every later command finds them, and a tuning that is done is not done again."""
    file, base = moved
    root = stages.import_subject(
        file, tmp_path / "in", model=str(base), vision=str(base / "clip"), device="cpu"
    ).subject
    manifest = Subject.open(root).manifest
    assert (manifest.model, manifest.finetune.settings["base"]) == (str(base), str(base))
    assert manifest.finetune.settings["vision"] == str(base / "clip")
    assert stages.generate(root, "a [V] thing", n=1, steps=1, device="cpu").images
    again = stages.finetune(root, steps=1, vision=str(base / "clip"), device="cpu")
    assert again.unchanged
    result = CliRunner().invoke(
        app, ["import", str(file), "-o", str(tmp_path / "x"), "--model", str(base), "--vision", "nowhere"]
    )
    assert result.exit_code == 2 and "no CLIP tower is called 'nowhere'" in result.stderr


def test_an_import_is_refused_another_clip_pair(moved, tmp_path, monkeypatch):
    """Of the right width; the pictures would be wrong, and nothing would say so."""
    file, base = moved
    weights = base / "clip/model.safetensors"
    tensors, metadata = load_tensors(weights)
    save_tensors(weights, {name: 0.9 * t for name, t in tensors.items()}, metadata)
    paths = dict(model=str(base), vision=str(base / "clip"), device="cpu")
    with pytest.raises(InputError, match="tuned through another CLIP pair .*; name that one with --vision"):
        stages.import_subject(file, tmp_path / "in", **paths)
    assert not (tmp_path / "in").exists()
    # one that the hub has yet to bring has no fingerprint before it is loaded
    shapes, known, there = sharing._shapes, sharing.fingerprint, []
    monkeypatch.setattr(sharing, "_shapes", lambda *a: (shapes(*a), there.append(True))[0])
    monkeypatch.setattr(sharing, "fingerprint", lambda *a: known(*a) if there else None)
    with pytest.raises(InputError, match="tuned through another CLIP pair"):
        stages.import_subject(file, tmp_path / "in", **paths)


def test_drawing_and_export_are_refused_once_the_clip_pair_has_changed(moved, tmp_path):
    """Its name is the recorded one; what the control was taught to see is no longer what it would be shown."""
    file, base = moved
    root = stages.import_subject(
        file, tmp_path / "in", model=str(base), vision=str(base / "clip"), device="cpu"
    ).subject
    weights = base / "clip/model.safetensors"
    tensors, metadata = load_tensors(weights)
    save_tensors(weights, {name: 0.9 * t for name, t in tensors.items()}, metadata)
    for command in (
        lambda: stages.generate(root, "a [V] thing", n=1, steps=1, device="cpu"),
        lambda: stages.export_subject(root, tmp_path / "again.p3s.safetensors", device="cpu"),
    ):
        with pytest.raises(
            InputError, match="tuned through another CLIP pair: .* has changed since; .* or run: p3s finetune"
        ):
            command()


def test_an_export_names_no_folder_of_its_maker_and_an_import_says_which_base_is_wanted(
    exported, tmp_path, tiny_folder, monkeypatch
):
    file = tmp_path / "good.p3s.safetensors"
    said = json.dumps(load_metadata(file))
    assert str(tiny_folder.parent) not in said and f'"./{tiny_folder.name}"' in said
    with pytest.raises(InputError, match=f"exporter's, {tiny_folder.name}, which is not here; name it with --model"):
        stages.import_subject(file, tmp_path / "in", device="cpu")
    monkeypatch.chdir(tiny_folder.parent)  # where it lies beside
    made = stages.import_subject(file, tmp_path / "in", device="cpu")
    assert Subject.open(made.subject).manifest.model == made.model == str(tiny_folder)


@pytest.fixture(params=[("bfloat16", "float32"), ("float32", "bfloat16")], ids=" to ".join)
def apart(request, tmp_path, tiny_folder):
    """A subject whose control is the base, as its maker has that, and a difference of rank 2; both sides' families."""
    theirs, ours = (load(str(tiny_folder), "cpu", dtype) for dtype in request.param)
    root = tmp_path / "thing"
    stages.mask(tiny.photo(tmp_path / "two.png"), [(18, 32)], [(46, 32)], root, "thing", family=theirs)
    stages.finetune(root, steps=1, family=theirs)
    (tensors, described), g = load_tensors(root / CONTROL), torch.Generator().manual_seed(0)
    for n, tensor in tensors.items():
        if lowrank.worthwhile(n, tensor.shape, 2):
            rows, columns = tensor.flatten(1).shape
            low = 0.01 * torch.randn(rows, 2, generator=g) @ torch.randn(2, columns, generator=g)
            tensors[n] = (lowrank._start(n, tensor, theirs.unet) + low.view(tensor.shape)).half()
    save_tensors(root / CONTROL, tensors, {k: v for k, v in described.items() if k != "schema"})
    subject = Subject.open(root)
    subject.manifest.finetune.artifacts = hashes(root, CONTROL)
    with subject.changing():
        pass
    return root, theirs, ours


@pytest.mark.parametrize("given", [True, False])
def test_what_an_import_has_differs_by_the_error_that_the_export_told(apart, tmp_path, given, monkeypatch):
    """Whatever precision each side has the base in: its rounding is no part of the difference."""
    root, theirs, ours = apart
    out = stages.export_subject(root, tmp_path / "x.p3s.safetensors", 2, family=theirs)
    usual = str(ours.dtype).removeprefix("torch.")  # as if on a device of this precision
    monkeypatch.setattr(family, "resolve_dtype", lambda n, d, f=family.resolve_dtype: f(usual if n == "auto" else n, d))
    options = {"family": ours} if given else {"model": theirs.source, "device": "cpu"}
    made = stages.import_subject(out.file, tmp_path / "in", **options).subject
    (before, after), parts = (load_tensors(r / CONTROL)[0] for r in (root, made)), load_tensors(out.file)[0]
    left = total = 0.0
    for n, tensor in before.items():
        if f"{n}.u" in parts:
            left += (after[n].float() - tensor.float()).square().sum().item()
            total += (tensor.float() - lowrank._start(n, tensor, theirs.unet)).square().sum().item()
    assert (left / total) ** 0.5 == pytest.approx(out.error, rel=0.1) and out.error < 0.01


def test_an_archive_is_no_subject(tmp_path, tiny_family):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.p3s.safetensors", "w") as archive:
        archive.writestr("../../escaped", "x")
    with pytest.raises(InputError, match="x.p3s.safetensors is damaged or not made by p3s"):
        stages.import_subject(tmp_path / "x.p3s.safetensors", tmp_path / "in", family=tiny_family)
    assert [p.name for p in tmp_path.iterdir()] == ["x.p3s.safetensors"]


@pytest.mark.parametrize("left", ["a temporary", "a decided commit"])
def test_an_import_that_was_killed_is_made_again_and_not_beside_another(exported, tmp_path, tiny_family, left):
    good, root = tmp_path / "good.p3s.safetensors", tmp_path / "in"
    whole = stages.import_subject(good, tmp_path / "whole", family=tiny_family).subject
    rest = root / (".p3s-commit" if left == "a decided commit" else ".1-00.p3s-tmp") / "control"
    rest.mkdir(parents=True)
    (rest / "control.safetensors").write_bytes(b"half")
    stages.import_subject(good, root, family=tiny_family)
    files = [
        {str(p.relative_to(r)): p.read_bytes() for p in r.rglob("*") if p.is_file() and p.name != ".lock"}
        for r in (whole, root)
    ]
    assert files[0] == files[1]


def test_an_import_beside_another_writer_stops_at_once(exported, tmp_path, tiny_family):
    with writing(tmp_path / "in", "p3s import"), pytest.raises(P3SError, match="is being written by p3s import"):
        stages.import_subject(tmp_path / "good.p3s.safetensors", tmp_path / "in", family=tiny_family)
