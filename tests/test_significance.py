import pytest
from scipy.stats import chi2, ttest_1samp

from cifar import significance


def test_mcnemars_p_is_that_of_the_binomial_worked_by_hand():
    # 1 against 8: twice the chance of at most 1 head in 9 throws, 2 * (1 + 9) / 2**9.
    assert significance.mcnemar(1, 8) == significance.mcnemar(8, 1) == pytest.approx(20 / 512)
    assert significance.mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert significance.mcnemar(5, 5) == 1
    assert significance.mcnemar(0, 0) == 1


@pytest.mark.parametrize(("first", "second"), [(290, 253), (1605, 1400), (537, 620)])
def test_of_many_images_mcnemars_p_is_near_that_of_chi_square_with_continuity(first, second):
    statistic = (abs(first - second) - 1) ** 2 / (first + second)
    assert significance.mcnemar(first, second) == pytest.approx(chi2.sf(statistic, 1), rel=0.03)


def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order():
    # 0.01 * 3, then 0.02 * 2, then max(0.04, 0.03 * 1).
    assert significance.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert significance.holm([0.9, 0.6]) == [1, 1]
    assert significance.holm([0.2]) == [0.2]
    assert significance.holm([]) == []


def test_the_spread_is_that_of_students_distribution():
    # Student's t of 2 degrees of freedom at 97.5% is 4.302653 in any table.
    figure = significance.spread([0.93, 0.94, 0.95])
    assert figure["mean"] == pytest.approx(0.94)
    assert figure["standard_deviation"] == pytest.approx(0.01)
    assert figure["interval_95"] == pytest.approx([0.94 - 4.302653 * 0.01 / 3**0.5, 0.94 + 4.302653 * 0.01 / 3**0.5])
    assert significance.spread([1.0, 1.0])["interval_95"] == [1.0, 1.0]
    # Student's t of 1 degree of freedom is 12.7062: 0.95 +- 0.64 goes beyond 1.
    assert significance.spread([0.9, 1.0], 0, 1)["interval_95"] == pytest.approx([0.95 - 12.7062 * 0.05, 1])
    values = [0.1, 0.7, 0.2, 0.4]
    assert significance.spread(values)["interval_95"] == pytest.approx([*ttest_1samp(values, 0).confidence_interval()])
