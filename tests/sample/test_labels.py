"""Labels of a sample set, and the choice of classes by name or label."""

import numpy as np
import pytest

from rae_xla.data.class_names import imagenet_names
from rae_xla.errors import UserError
from rae_xla.sample.labels import choose_labels, make_labels


def test_equal_divides_the_images_among_the_classes():
    assert make_labels("equal", 6, 3, seed=0).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="request 6"):
        make_labels("equal", 7, 3, seed=0)


def test_random_is_a_function_of_the_seed():
    first, again, other = (make_labels("random", 100, 10, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == set(range(10))


def test_given_labels_repeat_in_turn():
    assert make_labels("7,3", 5, 10, seed=0).tolist() == [7, 3, 7, 3, 7]


@pytest.mark.parametrize("spec", ["10", "-1", "3,11"])
def test_label_out_of_range(spec):
    with pytest.raises(UserError, match=r"out of range.*0 to 9"):
        make_labels(spec, 4, 10, seed=0)


def test_unknown_spec():
    with pytest.raises(UserError, match="--labels cats"):
        make_labels("cats", 4, 10, seed=0)


def test_choose_labels_by_name_or_label():
    names = imagenet_names()
    assert choose_labels("tench", names, 2, 0) == choose_labels(0, names, 2, 0) == [0, 0]
    assert choose_labels(np.array([1, 2]), names, 3, 0) == [1, 2, 1]
    random = choose_labels([], names, 20, 3)
    assert random == choose_labels([], names, 20, 3) != choose_labels([], names, 20, 4)
