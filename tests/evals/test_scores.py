"""Rows survive a kill, means are derived from them, and each number is one that can be had by hand."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from statistics import fmean

import pytest
import torch
from PIL import Image

from p3s_cli.errors import InputError
from p3s_cli.evals import report
from p3s_cli.evals.metrics import roc_auc
from p3s_cli.evals.protocols import PROTOCOLS, protocol
from p3s_cli.evals.scores import Row, Rows, differences, summary, table

ROW = Row("p3s", "dog", "a dog", 0, "a.png", "ff", "2 pictures", "CLIP-I", "dreambooth", 0.5, "clip", "ab", "resize")


def test_auc_is_the_share_of_pairs_in_the_right_order():
    # pairs (same, different): (3, 2) right, (3, 1) right, (1, 2) wrong, (1, 1) a tie counting half
    assert roc_auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])) == pytest.approx(2.5 / 4)


def test_rows_are_read_back_and_not_made_twice(tmp_path):
    rows = Rows(tmp_path / "scores.jsonl")
    rows.add([ROW, replace(ROW, seed=1)])
    again = Rows(tmp_path / "scores.jsonl")
    assert list(again) == list(rows) and ROW.key in again
    assert replace(ROW, preprocessing="another").key not in again
    again.add([replace(ROW, score=0.9)])  # the key says what a score is a function of: this one is known
    assert [r.score for r in Rows(tmp_path / "scores.jsonl")] == [0.5, 0.5]


def test_a_row_cut_short_by_a_kill_is_made_again_and_spoils_no_other(tmp_path):
    path = tmp_path / "scores.jsonl"
    Rows(path).add([ROW, replace(ROW, seed=1), replace(ROW, seed=2)])
    whole = path.read_text()
    path.write_text(whole[: whole.rindex("{") + 40])
    rows = Rows(path)
    assert [r.seed for r in rows] == [0, 1]
    rows.add([replace(ROW, seed=2)])
    assert path.read_text() == whole and all(json.loads(line) for line in whole.splitlines())


@pytest.mark.parametrize(
    "line",
    [
        b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"method": "p3s"}',
        json.dumps(asdict(ROW) | {"score": "0.5"}).encode(), json.dumps(asdict(ROW) | {"score": float("nan")}).encode(),
        json.dumps(asdict(ROW) | {"seed": None}).encode(), json.dumps(asdict(ROW) | {"more": 1}).encode(),
    ],
)  # fmt: skip
def test_a_line_that_is_no_row_is_passed_over(tmp_path, line):
    Rows(tmp_path / "s.jsonl").add([ROW])
    (tmp_path / "s.jsonl").write_bytes(line + b"\n" + (tmp_path / "s.jsonl").read_bytes())
    assert list(Rows(tmp_path / "s.jsonl")) == [ROW]


def test_every_mean_weighs_subjects_alike_whatever_their_number_of_images():
    rows = [replace(ROW, seed=s, score=v) for s, v in enumerate((0.0, 0.0, 0.0, 1.0))]
    rows.append(replace(ROW, subject="cat", score=0.75))
    mean = table(rows, protocol("dreambooth"))["p3s"]["CLIP-I"]
    assert mean.value == pytest.approx((0.25 + 0.75) / 2) and (mean.subjects, mean.images) == (2, 5)


def test_variance_columns_are_population_variances_within_subjects():
    rows = [replace(ROW, protocol="p3s", seed=s, score=v) for s, v in enumerate((0.2, 0.4))]
    found = table(rows, protocol("p3s"))["p3s"]
    assert found["CLIP-Iv"].value == pytest.approx(0.01)  # ((0.1)^2 + (0.1)^2) / 2
    assert "DINO-v" not in found


def test_differences_are_of_the_same_image_and_weigh_subjects_alike():
    own = {("dog", 0): 0.5, ("dog", 1): 0.9, ("cat", 0): 0.4, ("cat", 7): 1.0}
    other = {("dog", 0): 0.2, ("dog", 1): 0.8, ("cat", 0): 0.6}  # no image of the cat's seed 7
    rows = [replace(ROW, subject=who, seed=seed, score=v) for (who, seed), v in own.items()]
    rows += [replace(ROW, method="lora", subject=who, seed=seed, score=v) for (who, seed), v in other.items()]
    rows += [replace(ROW, protocol="kosmos-g", method="lora", score=0.0)]
    found = differences(rows, protocol("dreambooth"), "p3s")
    gap = found["lora"]["CLIP-I"]
    assert found.keys() == {"lora"} and gap.value == pytest.approx(((0.3 + 0.1) / 2 - 0.2) / 2)
    assert (gap.low, gap.high) == (pytest.approx(-0.2), pytest.approx(0.2))  # of two subjects, either one twice
    assert differences(rows, protocol("dreambooth"), "nobody") == {}


def test_the_bootstrap_interval_holds_the_mean_and_shrinks_to_it():
    wide = summary({str(k): [k / 10] for k in range(10)}, fmean)
    assert wide.low < wide.value < wide.high
    same = summary({str(k): [0.3] for k in range(10)}, fmean)
    assert same.low == pytest.approx(0.3) and same.high == pytest.approx(0.3)
    assert summary({"only": [0.1, 0.2]}, fmean).low is None


def test_two_protocols_never_share_a_column():
    rows = [ROW, replace(ROW, protocol="kosmos-g", score=0.9)]
    assert table(rows, protocol("dreambooth"))["p3s"]["CLIP-I"].value == 0.5
    assert table(rows, protocol("kosmos-g"))["p3s"]["CLIP-I"].value == 0.9


def test_protocols_quote_models_that_they_have():
    for one in PROTOCOLS.values():
        assert {m.model for m in one.metrics} <= set(one.models)
        assert set(one.variances.values()) <= {m.name for m in one.metrics}
    with pytest.raises(InputError, match="dreambooth"):
        protocol("mine")


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; collects the addresses a page asks for."""

    def __init__(self):
        super().__init__()
        self.open, self.asked = [], []

    def handle_starttag(self, tag, attributes):
        self.asked += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_escapes_what_it_is_told_and_needs_no_other_file(tmp_path):
    Image.new("RGB", (300, 200), (9, 90, 200)).save(tmp_path / "a.png")
    bad = "<script>alert(1)</script>"
    hostile = replace(ROW, prompt=bad, method="<b>", subject='"><i>', file=str(tmp_path / "gone.png"))
    rows = [hostile, replace(hostile, file=str(tmp_path / "a.png"), seed=1)]
    means = table(rows, protocol("dreambooth"))
    picture = tmp_path / "a.png"
    less = ("<i>", {"<b>": means["<b>"]})
    extras = report.Extras({"<b>": (12.34, None)}, [f"a note {bad}"], picture, {'"><i>': picture}, less)
    page = report.html(rows, means, protocol("dreambooth"), 'a "title" & more', extras)
    assert not re.search("<(script|b|i)>", page) and "gone.png is gone" in page and "<td>12.3</td>" in page
    assert page.count("<td>&lt;b&gt;</td>") == 1 + 1 + 1 and "<th>&lt;i&gt; less</th>" in page  # tables, pictures
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and len(parser.asked) == 3  # the result, what was asked for, the plot
    assert all(address.startswith("data:image/jpeg;base64,") for address in parser.asked)


def test_a_page_of_bare_rows_has_no_times_and_no_plot():
    page = report.html([ROW], table([ROW], protocol("dreambooth")), protocol("dreambooth"), "title")
    assert "tuning, s" not in page and "<img" not in page and "0.500" in page
