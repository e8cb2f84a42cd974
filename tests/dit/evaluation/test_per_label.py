"""Nearest-class-mean classifier."""

import numpy as np
import pytest

from complexity_dit.evaluation.breakdown import class_means, nearest_class_mean_accuracy
from inl_core.run.errors import UserError


def test_missing_labels_are_left_out() -> None:
    x = np.array([[0.0, 0], [2, 0], [10, 0], [10, 4], [99, 99]])
    labels = np.array([0, 0, 3, 3, -1])
    means = class_means(x, labels)
    assert sorted(means) == [0, 3]
    np.testing.assert_array_equal(means[3], [10, 2])
    probe = np.array([[1.0, 1], [9, 1], [9, 0], [50, 50], [0, 0]])
    asked = np.array([0, 3, 0, -1, 7])
    # correct, correct, wrong, left out, wrong (a class without a mean)
    assert nearest_class_mean_accuracy(probe, asked, means) == 0.5
    with pytest.raises(UserError, match="no image has a label"):
        class_means(x, np.full(5, -1))
    with pytest.raises(UserError, match=r"labels \(2,\)"):
        class_means(x, np.array([0, 1]))
