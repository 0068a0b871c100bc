"""Points from files, boxes, and the pictures that help to choose them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from p3s_cli import pictures, stages
from p3s_cli.errors import InputError
from p3s_cli.manifest import Reference, mask_command
from p3s_cli.sd import images
from p3s_cli.sd.weights import load_tensors
from p3s_cli.stages.clicks import read_clicks, resolve_box, resolve_points
from p3s_cli.stages.reference import Clicks
from p3s_cli.subject import Subject
from p3s_cli.world import seeds
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import lookalike_scene


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def test_one_photo_or_many_by_name(tmp_path):
    one = write(tmp_path / "p.json", {"positive": [[12, 8]], "negative": ["0.5,0.5"]})
    assert read_clicks(one, [Path("a.jpg")])[0].positive == [(12, 8)]
    many = write(
        tmp_path / "m.json", {"a.jpg": {"positive": ["1,2"]}, "b.jpg": {"box": [1, 2, 30, 40], "class": "dog"}}
    )
    a, b = read_clicks(many, [Path("x/a.jpg"), Path("x/b.jpg")])
    assert a.positive == ["1,2"] and b.box == (1, 2, 30, 40) and b.class_word == "dog"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "no JSON object"),
        ("{", "is not JSON"),
        ('{"c.jpg": {}}', "says nothing of a.jpg"),
        ('{"a.jpg": {"positives": []}, "b.jpg": {}}', "positives"),
    ],
)
def test_files_that_say_something_else(tmp_path, content, words):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_clicks(tmp_path / "p.json", [Path("a.jpg"), Path("b.jpg")])


def test_a_box_stands_for_its_middle_and_bounds_the_mask(world, tmp_path):
    """On a scene whose chosen one is masked whole by a click in the box's middle, a loose box has nothing to cut off."""
    pixels, truth = render([lookalike_scene(seeds.SINGLE + 9)])
    images.save_png(tmp_path / "two.png", images.to_pil(pixels[0]))
    rows, columns = (v.tolist() for v in truth[0, 0].nonzero(as_tuple=True))
    box = (min(columns) - 4, min(rows) - 4, max(columns) + 4, max(rows) + 4)  # as roughly as one draws it
    options = {"negative": [click(truth[0, 1])], "class_word": "x", "family": world}
    made = stages.mask(tmp_path / "two.png", box=box, output=tmp_path / "s", maps=True, **options)
    mask = load_tensors(tmp_path / "s/references/00/mask.safetensors")[0]["subject"].bool()
    outside = mask.clone()
    outside[box[1] : box[3] + 1, box[0] : box[2] + 1] = False
    assert mask.any() and not outside.any()
    assert made.pictures[-1].name == "maps.png" and made.pictures[-1].is_file()
    assert not any("box" in w for w in made.warnings)
    stages.mask(tmp_path / "two.png", box=box, output=tmp_path / "s", **options)
    assert made.pictures[-1].is_file()  # nothing has changed
    half = (box[0], box[1], sum(box[::2]) // 2, box[3])
    made = stages.mask(tmp_path / "two.png", box=half, output=tmp_path / "h", **options)
    assert any("the box cuts" in w and "widen it" in w for w in made.warnings)
    shutil.copy(tmp_path / "s/references/00/maps.png", tmp_path / "h/references/00")
    stages.mask(tmp_path / "two.png", box=box, output=tmp_path / "h", **options)
    assert not (tmp_path / "h/references/00/maps.png").exists()  # those were of the former clicks


def test_fractions_as_numbers_are_not_taken_for_pixels_of_the_corner(tmp_path):
    (read,) = read_clicks(write(tmp_path / "p.json", {"positive": [[0.3, 0.5]]}), [Path("a.jpg")])
    for points in (read.positive, [(1.0, 0.5)], [[0, 0.5]]):
        with pytest.raises(
            InputError, match=r"numbers are pixels, and .* reads as fractions; write those as text, '\d"
        ):
            resolve_points(points, 100, 100)
    assert resolve_points([(0, 1), (1.0, 0.0), (0.5, 7), (33.0, 76.0)], 100, 100) == [
        (0, 1),
        (1, 0),
        (0.5, 7),
        (33, 76),
    ]


def test_boxes_that_are_none():
    assert resolve_box("10,20,30,40", 100, 100) == (10, 20, 30, 40)
    assert resolve_box("0.1,0.2,0.5,1.0", 101, 101) == (10, 20, 50, 100)
    for box, words in (("1,2,3", "not a box"), ("30,20,10,40", "is empty"), ("1,1,200,50", "outside the image")):
        with pytest.raises(InputError, match=words):
            resolve_box(box, 100, 100)
    assert resolve_box((0.5, 0.5, 30, 40), 100, 100) == (0.5, 0.5, 30, 40)
    with pytest.raises(InputError, match=r"reads as fractions; write those as text, '0.0,0.0,0.9,0.9'$"):
        resolve_box([0, 0, 0.9, 0.9], 100, 100)
    with pytest.raises(InputError, match="outside the box"):
        Clicks.read([(90, 90)], [], "1,1,50,50", 100, 100)
    with pytest.raises(InputError, match="no positive point"):
        Clicks.read([], [(5, 5)], None, 100, 100)


def test_many_photos_in_one_call(pair, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images.save_png(tmp_path / "a.png", pair[0])
    images.save_png(tmp_path / "b.png", pair[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    (x, y), _ = pair[2]
    clicks = write(tmp_path / "c.json", {"a.png": {"positive": [[x, y]]}, "b.png": {"positive": [[127 - x, y]]}})
    apart = stages.mask_many(["a.png", "b.png"], clicks, class_word="x", family=world)
    assert [str(r.subject) for r in apart] == ["a", "b"]
    together = stages.mask_many(["a.png", "b.png"], clicks, output="both", class_word="x", family=world)
    assert [r.reference for r in together] == ["references/00", "references/01"]
    with pytest.raises(InputError, match="--points"):
        stages.mask_many(["a.png", "b.png"], family=world)
    again = stages.mask_many(
        ["a.png", "b.png"], clicks, output="both"
    )  # on the subject's own base, whatever the default
    assert all(r.unchanged for r in again) and Subject.open(tmp_path / "both").manifest.model == "world"


def test_two_photos_never_become_one_subject_or_get_each_others_clicks(pair, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clicks = write(tmp_path / "c.json", {"a.png": {"positive": [[1, 1]]}, "a.webp": {"positive": [[9, 9]]}})
    with pytest.raises(InputError, match="two of the photos would be the subject a"):
        stages.mask_many(["a.png", "a.webp"], clicks, family=world)
    with pytest.raises(InputError, match="two photos are called a.png"):
        stages.mask_many(["x/a.png", "y/a.png"], clicks, output="both", family=world)


def test_grid_keeps_the_photo_and_labels_its_pixels(tmp_path, pair, monkeypatch):
    images.save_png(tmp_path / "two.png", pair[0])
    path = stages.grid(tmp_path / "two.png", tmp_path / "g.png")
    drawn = images.load_image(path)
    with pytest.raises(InputError, match="would take the place of .*two.png itself"):
        stages.grid(tmp_path / "two.png", tmp_path / "two.png")
    for name in ("a.png", "a-grid.png"):
        images.save_png(tmp_path / name, pair[0])
    before = (tmp_path / "a-grid.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="would take the place of a-grid.png itself"):
        stages.grid_many(["a.png", "a-grid.png"])
    with pytest.raises(InputError, match="a-grid.png is there already and is no grid"):
        stages.grid("a.png")
    assert (tmp_path / "a-grid.png").read_bytes() == before
    assert stages.grid(tmp_path / "two.png", path) == path  # a grid may take a grid's place
    assert drawn.width == 5 * 128  # enlarged by a whole number, so a line stands exactly on its pixel
    assert pictures.coordinate_grid(Image.new("RGB", (900, 600))).size == (900, 600)


@pytest.mark.parametrize(
    "point", [(0.0, 0.0), (1.0, 0.0), (0.127, 0.127), (0.5, 1.0), (0.999, 0.0), (64.25, 0.5), (3.0, 200.0)]
)
def test_the_command_that_refreshes_a_mask_says_the_points_it_has(point):
    """A pixel of the first row and column is written as a fraction, for as pixels its numbers would be read as one."""
    photo = {"folder": "references/00", "photo_sha256": "", "width": 256, "height": 300}
    reference = Reference(**photo, positive=[point], box=(*point, 250.0, 280.5))
    words = mask_command(Path("a.png"), reference, Path("a")).split()
    (again,) = resolve_points([words[words.index("--pos") + 1]], 256, 300)
    box = resolve_box(words[words.index("--box") + 1], 256, 300)
    assert again == pytest.approx(point, abs=1e-4) and box == pytest.approx((*point, 250, 280.5), abs=1e-4)
