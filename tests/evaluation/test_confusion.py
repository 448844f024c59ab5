"""Matching and scores of clusters, compared with all permutations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evaluation.confusion import confusion_matrix, match, score_grouping

confusions = hnp.arrays(
    np.int64,
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    elements=st.integers(0, 9),
).filter(lambda confusion: confusion.sum() > 0)


def best_matching(confusion: np.ndarray) -> int:
    """The largest number of pixels that a one-to-one matching of clusters and classes can match."""
    small = confusion if confusion.shape[0] >= confusion.shape[1] else confusion.T
    clusters, classes = small.shape
    return max(
        sum(int(small[k, c]) for c, k in enumerate(chosen))
        for chosen in itertools.permutations(range(clusters), classes)
    )


@given(confusions)
def test_matching_is_the_best_of_all_permutations(confusion: np.ndarray) -> None:
    """A greedy or minimising matching would report too low an accuracy."""
    scored = score_grouping(confusion)
    assert scored.accuracy == pytest.approx(best_matching(confusion) / confusion.sum())


@given(confusions)
def test_matching_is_one_to_one(confusion: np.ndarray) -> None:
    """If one cluster could match two classes, merging classes would cost nothing."""
    classes = match(confusion)
    used = classes[classes >= 0]
    assert len(set(used.tolist())) == len(used) == min(confusion.shape)


@given(confusions)
def test_iou_follows_from_the_matching(confusion: np.ndarray) -> None:
    """IoU from its definition, TP / (TP + FP + FN)."""
    scored = score_grouping(confusion)
    for c in range(confusion.shape[1]):
        of_class, truth = confusion[scored.classes == c], confusion[:, c].sum()
        hit, claimed = of_class[:, c].sum(), of_class.sum()
        if truth + claimed == 0:
            assert np.isnan(scored.iou[c])
            continue
        assert scored.iou[c] == pytest.approx(hit / (truth + claimed - hit))
    assert scored.miou == pytest.approx(np.nanmean(scored.iou))


@given(st.integers(0, 2**32 - 1))
def test_numbering_of_clusters_does_not_matter(seed: int) -> None:
    """Prototypes have no order, so the score must not depend on it (if the optimum is unique)."""
    generator = np.random.default_rng(seed)
    # Powers of two: no two matchings have the same sum, so the optimum is unique.
    confusion = 2 ** generator.permutation(20).reshape(5, 4).astype(np.int64)
    shuffled = confusion[generator.permutation(5)]
    first, second = score_grouping(confusion), score_grouping(shuffled)
    assert first.miou == second.miou
    assert first.accuracy == second.accuracy


def test_confusion_by_hand_leaves_void_out() -> None:
    """Without it unlabelled pixels would count as errors."""
    clusters = np.array([[0, 0, 1], [2, 1, 1]])
    labels = np.array([[0, 255, 1], [1, 1, 0]], np.uint8)
    expected = [[1, 0], [1, 2], [0, 1]]
    assert confusion_matrix(clusters, labels, 3, 2).tolist() == expected


def test_more_clusters_than_classes_count_against() -> None:
    """K > C: pixels of an unmatched cluster are errors of their class; IoU 6/10 and 5/5 by hand."""
    scored = score_grouping(np.array([[6, 0], [4, 0], [0, 5]]))
    assert scored.iou.tolist() == [0.6, 1.0]
    assert scored.miou == pytest.approx(0.8)
    assert scored.accuracy == pytest.approx(11 / 15)
    assert scored.used == 3


def test_fewer_clusters_than_classes_leave_classes_at_zero() -> None:
    """K < C: a single cluster is a bad grouping, so the unmatched classes must score 0."""
    scored = score_grouping(np.array([[6, 3, 1]]))
    assert scored.iou.tolist() == [0.6, 0.0, 0.0]
    assert scored.miou == pytest.approx(0.2)
    assert scored.classes.tolist() == [0]


def test_absent_class_counts_if_it_is_predicted() -> None:
    """PiCIE's rule: left out, an absent class would forgive pixels that are predicted as it. A
    class that is neither labelled nor predicted says nothing; Leopart's rule counts it as 0.
    """
    idle = np.array([[4, 0, 0], [0, 0, 0], [0, 0, 4]])
    assert score_grouping(idle).miou == 1.0
    assert np.isnan(score_grouping(idle).iou[1])
    assert score_grouping(idle, absent="zero").miou == pytest.approx(2 / 3)
    used = np.array([[4, 0, 0], [1, 0, 0], [0, 0, 4]])
    assert score_grouping(used).iou.tolist() == [0.8, 0.0, 1.0]


@given(st.integers(0, 2**32 - 1))
def test_spare_clusters_of_absent_classes_have_no_order(seed: int) -> None:
    """With more clusters than classes, the numbering would decide whether an absent class gets an
    idle cluster, and is left out, or a used one, and is 0.
    """
    generator = np.random.default_rng(seed)
    confusion = np.array([[8, 0, 0], [0, 0, 4], [2, 0, 0], [0, 0, 0], [1, 0, 1]])
    scored = score_grouping(confusion[generator.permutation(5)])
    assert scored.iou.tolist() == [8 / 11, 0.0, 4 / 5]


def test_nothing_labelled_is_refused() -> None:
    """Without labelled pixels there is no score."""
    with pytest.raises(ValueError, match="no labelled pixel"):
        score_grouping(np.zeros((2, 2), np.int64))
