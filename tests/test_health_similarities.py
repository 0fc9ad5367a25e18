"""The checks of attacks that lower similarities, on hand-made evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from advplug.estimate import Estimate
from advplug.health import CHECKS, Outcome
from test_health import N, audit, bits, black_box, finding, group

PASSED, UNCHECKED, INAPPLICABLE = Outcome("passed"), Outcome("unchecked"), Outcome("inapplicable")
LOWER = "7 of 64 images against 0 (p = 0.0078)"


def run(name, of):
    return CHECKS[name].run(of)


def level(first, then, count, n=N):
    """(n,): `first` on the first `count` images, `then` on the others."""
    return np.where(np.arange(n) < count, first, then)


def texts(left, **origins):
    """An attack that lowers the cosine of each image and its own text from 0.8 to `left` (N,), and what `static` and
    `bare` images reached; the column of another text says nothing."""
    cosine = {f"cosine_{origin}": np.stack([cosines, np.full(N, -1.0)], 1) for origin, cosines in origins.items()}
    cosine |= {"cosine": np.full((N, 2), 0.8), "cosine_adaptive": np.stack([left, np.full(N, -1.0)], 1)}
    success = dict.fromkeys(origins, bits(0)[:, None])
    return finding(0, own=np.tile([True, False], (N, 1)), minimised=1, **cosine, **success)


FLAT = np.full(N, 0.5)


def cosines(**change):
    """An audit whose probes all reach what the attack reached."""
    flat = FLAT[:64]
    same = {"noise": flat, "one_step": flat, "cold_half": flat, "cold_full": flat, "longer": flat}
    return audit(**(same | {"unbounded": None, "saturated": bits(64, 64)} | change))


@pytest.mark.parametrize(
    ("name", "probe", "said"),
    [
        ("one-step-beats-iterative", "one_step", "one gradient step beats the iterative attacks"),
        ("noise-beats-attack", "noise", "random noise beats the attacks"),
        ("rises-with-budget", "cold_half", "half the budget breaks more than the full one"),
    ],
)
def test_a_similarity_is_lower_by_a_hundredth(name, probe, said):
    for depth, count, state in ((0.48, 7, "tripped"), (0.48, 6, "passed"), (0.491, 64, "passed")):
        found = run(name, group(texts(FLAT), audit=cosines(**{probe: level(depth, 0.5, count, 64)})))
        assert found == (Outcome("tripped", f"{said}: {LOWER}") if state == "tripped" else PASSED)
    both = np.concatenate([level(0.4, 0.6, 20, 40), np.full(24, 0.5)])
    assert run(name, group(texts(FLAT), audit=cosines(**{probe: both}))) == PASSED, "as often higher as lower"
    if probe != "cold_half":
        deep = texts(level(0.4, 0.5, 64))
        found = run(name, group(texts(FLAT), deep, audit=cosines(**{probe: level(0.48, 0.5, 7, 64)})))
        assert found == PASSED, "the lowest of the attacks counts"


def test_transfer_that_goes_lower():
    name = "static-beats-adaptive"
    for origin in ("static", "bare"):
        assert run(name, group(texts(FLAT, **{origin: level(0.4, 0.5, 6)}), defended=True)) == PASSED
        assert run(name, group(texts(FLAT, **{origin: level(0.4, 0.5, 30)}), defended=True)).detail == (
            f"{origin} attack goes lower than the adaptive attacks: 30 of 100 images against 0 (p = 9.3e-10)"
        )
    lowest = texts(level(0.4, 0.5, 30), static=FLAT)
    assert run(name, group(texts(FLAT, static=level(0.4, 0.5, 30)), lowest, defended=True)) == PASSED
    assert run(name, group(lowest, texts(FLAT, static=level(0.3, 0.5, 30)), defended=True)).state == "tripped"


def test_twice_the_steps_that_go_on_falling():
    name = "not-converged"
    every = {"probed": bits(64, 64)}
    assert run(name, group(texts(FLAT), audit=cosines(longer=np.full(64, 0.489), **every))).detail == (
        "40 steps lower the mean similarity by another 0.011"
    )
    assert run(name, group(texts(FLAT), audit=cosines(longer=np.full(64, 0.491), **every))) == PASSED
    assert run(name, group(texts(FLAT), audit=cosines(longer=FLAT[:64], probed=bits(0, 64)))) == UNCHECKED
    some = cosines(longer=level(0.4, 0.5, 8, 64), probed=bits(16, 64))
    assert run(name, group(texts(FLAT), audit=some)).detail == "40 steps lower the mean similarity by another 0.050"


def test_what_makes_no_sense_of_similarities_is_left_out():
    of = group(texts(FLAT), black_box(90), audit=cosines(margin=bits(60, 64)))
    for name in ("black-box-beats-white-box", "unbounded-attack-fails", "saturated-logits", "silent-success"):
        assert run(name, of) == INAPPLICABLE
    assert run("one-step-beats-iterative", replace(of, audit=None)) == UNCHECKED
    found = run("defense-adds-nothing", replace(of, defended=True, difference=Estimate(0.05, -0.01, 0.1, N)))
    assert found.detail == "no difference to the undefended model is shown: +0.050 cosine [-0.010, +0.100]"
    worse = run("defense-adds-nothing", replace(of, defended=True, difference=Estimate(-0.05, -0.1, -0.01, N)))
    assert worse.detail == "the defense lowers similarity under attack: -0.050 cosine [-0.100, -0.010]"
