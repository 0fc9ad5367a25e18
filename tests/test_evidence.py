"""Per-image accounting: what robust means, the worst case, and the archive."""

from __future__ import annotations

import numpy as np

from advplug.builtin.metrics import accuracy, attack_success, distance
from advplug.evidence import Evidence, ranges, worst_case


def evidence(**change):
    clean = np.array([[1], [1], [1], [0], [1]], dtype=bool)
    base = {
        "index": np.arange(5),
        "y": np.array([0, 1, 0, 1, 1]),
        "clean": clean,
        "attacked": clean[:, 0],
        "adaptive": np.array([[1], [0], [0], [0], [1]], dtype=bool),
        "static": np.array([[0], [1], [0], [1], [0]], dtype=bool),
        "rounded": np.array([[1], [0], [0], [0], [0]], dtype=bool),
        "linf": np.array([0.1, 0.1, 0.1, 0.0, 0.2]),
        "l2": np.array([1.0, 1.0, 1.0, 0.0, 2.0]),
    }
    return Evidence(**(base | change))


def test_robust_is_right_and_never_broken_by_any_origin():
    values = accuracy()(evidence())
    assert values["clean_accuracy"].value == 4 / 5
    assert values["adaptive_robust_accuracy"].value == 2 / 5
    assert values["static_robust_accuracy"].value == 3 / 5
    assert values["robust_accuracy"].value == 1 / 5
    assert values["robust_accuracy_8bit"].value == 3 / 5
    assert values["bare_robust_accuracy"] is None


def test_success_rate_is_over_images_that_were_right():
    rate = attack_success()(evidence())["attack_success_rate"]
    assert (rate.value, rate.n) == (3 / 4, 4)


def test_success_rate_of_no_image_is_none():
    nothing = evidence(attacked=np.zeros(5, dtype=bool), clean=np.zeros((5, 1), dtype=bool))
    assert attack_success()(nothing)["attack_success_rate"] is None


def test_distances_are_those_of_the_successes():
    values = distance()(evidence())
    assert values["l2_median"].value == 1.5
    assert values["linf_median"].value == np.median([0.1, 0.2])


def test_excluded_images_count_as_their_clean_answer():
    """A targeted attack on an image that is the target already has no success to count."""
    e = evidence(attacked=np.array([0, 1, 1, 0, 1], dtype=bool), adaptive=np.ones((5, 1), dtype=bool))
    assert e.robust(e.adaptive)[:, 0].tolist() == [True, False, False, False, False]


def test_archive_gives_back_what_was_put_in():
    e = evidence(violations=3, worst_violation=0.25, steps=np.arange(5))
    back = Evidence.from_bytes(e.to_bytes())
    for name in Evidence.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(back, name), getattr(e, name))


def test_worst_case_of_a_randomised_victim_does_not_profit_from_choosing():
    """Two attacks that do nothing but draw: picking the worse of two on the same draws would report 0.25."""
    draws = np.random.default_rng(1).random((2, 4000, 10)) < 0.5
    assert abs(worst_case(list(draws)).mean() - 0.5) < 0.02


def test_worst_case_of_a_randomised_victim_finds_the_stronger_attack_of_each_image():
    strong = np.zeros((50, 10), dtype=bool)
    weak = np.ones((50, 10), dtype=bool)
    strong[25:], weak[25:] = True, False
    assert worst_case([strong, weak]).mean() == 0


def test_the_worst_case_of_a_randomised_victim_is_never_above_a_single_attacks():
    """Few draws choose badly: by image, one attack at 40 % and two at 50 % were reported as 43 to 44 %."""
    draws = np.random.default_rng(2)
    for d in (4, 10):
        members = [draws.random((2000, d)) < p for p in (0.4, 0.5, 0.5)]
        assert worst_case(members).mean() <= min(m[:, 1::2].mean() for m in members)


def test_what_is_no_success_is_no_right_answer_where_answers_are_drawn():
    """An image that is right in one draw of four keeps a quarter, however often a target is missed."""
    clean = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    nothing = np.zeros((2, 4), dtype=bool)
    drawn = {"index": np.arange(2), "y": np.zeros(2), "clean": clean, "attacked": clean.any(axis=1)}
    capped = Evidence(**drawn, adaptive=nothing, capped=1)
    assert capped.robust(nothing).mean(axis=1).tolist() == [0.25, 1.0]
    assert capped.robust(np.array([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)).mean(axis=1).tolist() == [0.0, 0.5]


def test_indices_are_written_as_runs():
    assert ranges(np.array([12, 0, 1, 2, 7, 9, 10, 11])) == "0-2,7,9-12"
    assert ranges(np.array([5])) == "5"
    assert ranges(np.array([], dtype=int)) == ""
