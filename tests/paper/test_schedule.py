"""P3S eq. 10 against numbers worked by hand."""

import pytest

from p3s_cli.config import WeightSchedule
from p3s_cli.paper.schedule import injection_weight


def test_paper_values_at_both_ends_and_in_the_middle():
    s = WeightSchedule()
    assert injection_weight(1000, s) == pytest.approx(0.7)  # 1 - 0.5 + 0.2
    assert injection_weight(500, s) == pytest.approx(1.075)  # 1 - 0.5 / 4 + 0.2
    assert injection_weight(0, s) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("kind", "early", "late"),
    [("fixed", 1.0, 1.0), ("off", 0.0, 0.0), ("decreasing", 0.7, 1.2), ("increasing", 1.2, 0.7)],
)
def test_variants_early_and_late_in_denoising(kind, early, late):
    s = WeightSchedule(kind=kind)
    assert injection_weight(1000, s) == pytest.approx(early)
    assert injection_weight(0, s) == pytest.approx(late)


def test_decreasing_is_the_straight_line_and_increasing_mirrors_eq_10():
    assert injection_weight(500, WeightSchedule(kind="decreasing")) == pytest.approx(0.95)
    for t in (0, 130, 720, 1000):
        assert injection_weight(t, WeightSchedule(kind="increasing")) == pytest.approx(
            injection_weight(1000 - t, WeightSchedule())
        )
