"""The statistics of a page: t-tests by hand, Holm's correction and detectable differences as statsmodels has them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from utils.ablations.compare import PairedTest, differences, holm, marked, p_value, paired_tests, standard_errors
from utils.plots.summary import Estimate


def direction(gaps: list[float], n_tests: int = 1, looks: int = 1) -> int | None:
    """Of one difference among others that are far from being told from 0."""
    test = paired_tests([gaps, *[[1.0, -1.0]] * (n_tests - 1)], looks)[0]
    return test and test.direction


def test_paired_t_tests_by_hand() -> None:
    # differences 0.10, 0.08, 0.14: mean 0.1067, deviations -0.0067, -0.0267, 0.0333, standard error 0.0306 / sqrt 3 =
    # 0.0176, t = 6.05 above 4.303; taken as independent, t would be 0.1067 / hypot(0.0577, 0.0481) = 1.42
    a, b = {1: 0.70, 2: 0.80, 3: 0.90, 7: 0.0}, {3: 0.76, 2: 0.72, 1: 0.60, 9: 1.0}
    assert differences(a, b) == pytest.approx([0.10, 0.08, 0.14])
    assert direction(differences(a, b)) == 1
    assert direction(differences(b, a)) == -1
    assert direction([0.02, 0.05, 0.08]) == 0  # 0.05 / (0.03 / sqrt 3) = 2.89: beyond two standard errors, within 4.303
    assert direction([0.05, 0.06]) == 0  # 0.055 / 0.005 = 11, within 12.706
    assert direction([0.05, 0.058]) == 1  # 0.054 / 0.004 = 13.5
    assert direction([0.0, 0.0, 0.0]) == 0
    assert direction([0.1, 0.1, 0.1]) == 1  # without any spread
    assert [direction(few) for few in ([], [0.3])] == [None, None]
    # 41 differences of mean 1, half of them 1 + d, half 1 - d, one 1: standard error d / sqrt 41, t = 6.403 / d; the
    # table's 5 % point for 40 degrees of freedom is 2.021, so that d is significant up to 3.168
    assert [direction([1.0, *[1.0 + d, 1.0 - d] * 20]) for d in (3.15, 3.18)] == [1, 0]
    texts = [marked(gaps, *paired_tests([gaps])) for gaps in ([0.05, 0.058], [0.05, 0.06], [0.3], [])]
    assert texts == ["0.054 ± 0.004 \\*", "0.055 ± 0.005", "0.3", "–"]


def test_more_tests_or_looks_ask_for_more() -> None:
    # t = 0.11 / 0.004 = 27.5; with one degree of freedom p = 1 - 2 atan(27.5) / pi = 0.0231, of which twice is below
    # 5 % and three times is not
    gaps = [0.106, 0.114]
    assert p_value(gaps) == pytest.approx(0.0231, abs=1e-4)
    assert [direction(gaps, n) for n in (1, 2, 3)] == [1, 1, 0]
    assert [direction(gaps, 1, looks) for looks in (1, 2, 3)] == [1, 1, 0]
    test = paired_tests([gaps], looks=2)[0]
    assert (test.p, test.level) == (pytest.approx(0.0463, abs=1e-4), 0.025)
    assert standard_errors(test) == pytest.approx(27.5)


def test_holm_as_statsmodels() -> None:
    """multipletests(..., method="holm") of statsmodels 0.15 gives these p values."""
    corrected, levels = holm([0.01, 0.04, 0.03, 0.005, 0.5])
    assert corrected == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    # 0.005 < 5 % / 5, 0.01 < 5 % / 4, 0.03 > 5 % / 3: it and all after it fail
    assert levels == pytest.approx([0.05 / 4, 0.05 / 3, 0.05 / 3, 0.05 / 5, 0.05 / 3])
    assert holm([]) == ([], [])
    # a smaller p is never corrected to a larger one than what comes after it
    assert holm([0.02, 0.021, 0.02])[0] == pytest.approx([0.06, 0.06, 0.06])


@pytest.mark.parametrize(
    ("n", "level", "shift"),
    [(2, 0.05, 16.3340), (3, 0.05, 5.65349), (5, 0.05, 3.76106), (5, 0.01, 5.87856), (8, 0.025, 3.78774),
     (20, 0.05, 2.95358), (200, 0.05, 2.81520)],
)  # fmt: skip
def test_the_detectable_difference_as_statsmodels(n: int, level: float, shift: float) -> None:
    """TTestPower().solve_power(None, n, level, 0.8) of statsmodels 0.15, times sqrt n, gives these shifts."""
    assert PairedTest(Estimate(0.0, 0.5), n, 1.0, level).visible == pytest.approx(shift / 2, rel=1e-4)


def test_a_second_look_at_more_seeds_keeps_the_level() -> None:
    """Without any difference: five seeds, eight where unclear. Uncorrected, a look too many is a yes too many."""
    draws = np.random.default_rng(0).standard_normal((4000, 8))

    test, all_seeds = ttest_1samp(draws[:, :5], 0, axis=1), ttest_1samp(draws, 0, axis=1).pvalue
    first, t, share = test.pvalue, np.abs(test.statistic), {}
    for looks in (1, 2):
        is_unclear = (t >= 1) & ((t <= 3) | (looks * first >= 0.05))
        share[looks] = (looks * np.where(is_unclear, all_seeds, first) < 0.05).mean()
    assert share[2] < 0.05 < 0.065 < share[1] < 0.085
