"""Rows survive a kill, means are derived from them, and each number is one that can be had by hand."""

import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from p3s_cli.errors import InputError
from p3s_cli.evals import report
from p3s_cli.evals.metrics import roc_auc
from p3s_cli.evals.protocols import PROTOCOLS, protocol
from p3s_cli.evals.scores import Row, Rows, summary, table

ROW = Row("p3s", "dog", "a dog", 0, "a.png", "ff", "2 pictures", "CLIP-I", "dreambooth", 0.5, "clip", "ab", "resize")


def test_auc_is_the_share_of_pairs_in_the_right_order():
    # pairs (same, different): (3, 2) right, (3, 1) right, (1, 2) wrong, (1, 1) a tie counting half
    assert roc_auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])) == pytest.approx(2.5 / 4)


def test_rows_are_read_back_and_not_made_twice(tmp_path):
    rows = Rows(tmp_path / "scores.jsonl")
    rows.add([ROW, replace(ROW, seed=1)])
    again = Rows(tmp_path / "scores.jsonl")
    assert list(again) == list(rows) and ROW.key in again
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


def test_the_page_escapes_what_it_is_told_and_needs_no_other_file(tmp_path):
    hostile = replace(ROW, prompt="<script>alert(1)</script>", method="<b>", file=str(tmp_path / "gone.png"))
    means = table([hostile], protocol("dreambooth"))
    page = report.html([hostile], means, protocol("dreambooth"), 'a "title" & more')
    assert "<script" not in page and "<b>" not in page and "gone.png is gone" in page
    assert "src=" not in page.replace('src="data:', "") and "href" not in page
