import pytest

from rae_xla.sample.labels import make_labels


def test_equal_gives_every_class_its_share():
    assert make_labels("equal", 6, 3, seed=0).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="ask for 6"):
        make_labels("equal", 7, 3, seed=0)


def test_random_depends_on_the_seed_alone():
    first, again, other = (make_labels("random", 100, 10, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == set(range(10))


def test_named_classes_are_repeated_in_turn():
    assert make_labels("7,3", 5, 10, seed=0).tolist() == [7, 3, 7, 3, 7]


@pytest.mark.parametrize("spec", ["10", "-1", "3,11"])
def test_a_label_out_of_range_is_refused(spec):
    with pytest.raises(ValueError, match="out of range; the model knows classes 0 to 9"):
        make_labels(spec, 4, 10, seed=0)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="say equal, random, or class numbers"):
        make_labels("cats", 4, 10, seed=0)
