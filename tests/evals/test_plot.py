"""The trade-off plot shows what the table says."""

from PIL import Image, ImageChops

from p3s_cli.evals import plot
from p3s_cli.evals.protocols import protocol
from p3s_cli.evals.scores import Mean


def mean(value: float) -> Mean:
    return Mean(value, None, None, 1, 4)


def test_axes_are_reader_labels_where_there_are_some_and_clip_text_elsewhere():
    assert plot.axes(protocol("world")) == ("prompt", "identity")
    assert plot.axes(protocol("dreambooth")) == ("CLIP-T", "DINO")


def test_rows_without_both_numbers_are_left_out_and_the_rest_is_drawn(tmp_path):
    means = {
        "p3s x0.5": {"prompt": mean(0.9), "identity": mean(0.4)},
        "p3s x1": {"prompt": mean(0.6), "identity": mean(0.8)},
        "broken": {"prompt": mean(0.6)},
        "true pictures": {"identity": mean(0.95)},
    }
    curves = {"p3s x0.5": ("p3s", 0.5), "p3s x1": ("p3s", 1.0), "broken": ("broken", 1.0)}
    plot.trade_off(tmp_path / "with.png", means, protocol("world"), curves, ("true pictures",))
    plot.trade_off(tmp_path / "without.png", means, protocol("world"), {"broken": ("broken", 1.0)})
    first_curve = (31, 119, 180)  # the first colour of matplotlib's default cycle
    for name, there in (("with.png", True), ("without.png", False)):
        with Image.open(tmp_path / name) as picture:
            assert (first_curve in {colour for _, colour in picture.convert("RGB").getcolors(2**20)}) == there


def test_the_legend_of_every_method_at_both_budgets_is_inside_the_picture(tmp_path):
    names = [f"a-method-with-a-long-name-{k}, equal time" for k in range(14)]
    means = {name: {"prompt": mean(0.9), "identity": mean(0.4)} for name in names}
    plot.trade_off(tmp_path / "many.png", means, protocol("world"), {name: (name, 1.0) for name in names})
    with Image.open(tmp_path / "many.png") as picture:
        rim = ImageChops.invert(picture.convert("L")).getbbox()
        assert rim[0] > 0 and rim[1] > 0 and rim[2] < picture.width and rim[3] < picture.height
