"""Agreement, against values that were worked out by hand or published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmkit.labelling.agreement import Agreement, accuracy, calibration_error, cohen_kappa, krippendorff_alpha, macro_f1


def test_kappa_of_the_textbook_table() -> None:
    # 20 both yes, 5 yes/no, 10 no/yes, 15 both no: observed 0.7, by chance 0.5
    one = np.array([1] * 25 + [0] * 25)
    other = np.array([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert math.isnan(cohen_kappa(np.array([1, 1]), np.array([1, 1])))
    assert cohen_kappa(np.array([0, 1, -1]), np.array([0, 1, 1])) == 1


def test_alpha_of_krippendorffs_own_example_with_missing_values() -> None:
    # Krippendorff (2011), example C: four observers, twelve units, nominal alpha 0.743
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, -1, -1, -1]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, -1, 3]
    c = [-1, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, -1]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, -1]
    assert krippendorff_alpha(np.array([a, b, c, d]).T) == pytest.approx(0.743, abs=5e-4)
    assert math.isnan(krippendorff_alpha(np.array([[1, 1], [1, 1]])))


def test_abstaining_does_not_raise_f1() -> None:
    gold = np.array([0, 0, 1, 1, -1])
    assert accuracy(np.array([0, -1, 1, 1, 0]), gold) == 1
    assert macro_f1(np.array([0, -1, 1, 1, 0]), gold) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1(np.array([0, 0, 1, 1, 0]), gold) == 1


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    assert calibration_error(np.full(10, 0.85), np.array([True] * 6 + [False] * 4)) == pytest.approx(0.25)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    none = Agreement.measure(np.array([0]), np.array([-1]), np.array([0.5]))
    assert none.rows == 0
    assert math.isnan(none.accuracy)
