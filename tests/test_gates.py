"""Gates of `advplug compare`: exit code 1 and a line that names what fell, and what passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advplug.comparisons.gates import Gate, gate, gate_of
from advplug.comparisons.runs import compare
from advplug.errors import GateError, UsageError
from cli_tools import run
from run_folders import UNTRUSTED, cell, evidence, poisoned, poisoning, stored, threat

N = 200


def folder(path: Path, broken: int, **told: Any) -> Path:
    """One threat under which so many of 200 images are broken, the first of them."""
    seen = evidence(range(broken), n=N)
    return stored(path, (cell(seen), seen), threats=(threat(worst=1 - broken / N, n=N, **told),))


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return folder(tmp_path / "better", 65)


@pytest.fixture
def worse(tmp_path: Path) -> Path:
    return folder(tmp_path / "worse", 100)


def test_a_figure_below_its_floor_ends_with_1_and_is_named(better: Path, worse: Path) -> None:
    ran = run("compare", better, worse, "--fail-under", "robust_accuracy=0.51")
    assert ran.code == 1
    assert ran.err == "Error: cnn (none) on digits, linf 1/10: robust_accuracy is 0.500, at least 0.51 is asked for\n"
    assert "B is less robust" in ran.out  # the comparison is printed all the same
    assert run("compare", better, worse, "--fail-under", "robust_accuracy=0.5").code == 0
    # Only B has to reach it, and every floor has to be.
    assert run("compare", worse, better, "--fail-under", "robust_accuracy=0.6").code == 0
    both = run("compare", worse, better, "--fail-under", "clean_accuracy=1", "--fail-under", "worst_case_accuracy=0.9")
    assert (both.code, both.err.count("worst_case_accuracy is 0.675")) == (1, 1)


def test_of_several_threats_the_lowest_is_named(tmp_path: Path) -> None:
    seen = {eps: evidence(range(n), n=N) for eps, n in (("1/10", 20), ("1/5", 80))}
    a, b = (stored(tmp_path / name, *((cell(e, eps=eps), e) for eps, e in seen.items())) for name in "ab")
    with pytest.raises(
        GateError, match=r"cnn \(none\) on digits, linf 1/5: robust_accuracy is 0\.600, at least 0\.7 is"
    ):
        gate(compare(a, b), Gate({"robust_accuracy": 0.7}))


def test_a_regression_is_what_the_whole_interval_shows(better: Path, worse: Path) -> None:
    # 35 of 200 images are lost and none won: Bonett and Price's interval of their difference, by hand.
    up, down = 1 / 202, 36 / 202
    half = 1.959964 * np.sqrt((up + down - (up - down) ** 2) / 202)
    near = 100 * (down - up - half)  # 11.9
    ran = run("compare", better, worse, "--fail-on-regression")
    assert ran.code == 1
    assert f"worst-case accuracy fell by 17.5 points (95 % interval: {near:.1f} or more)" in ran.err
    told = run("compare", better, worse, "--fail-on-regression", "--tolerance", "11.5")
    assert told.code == 1
    assert "11.5 are allowed" in told.err
    assert run("compare", better, worse, "--fail-on-regression", "--tolerance", "12").code == 0
    assert run("compare", worse, better, "--fail-on-regression").code == 0


def test_a_loss_that_is_not_shown_is_no_regression(better: Path, tmp_path: Path) -> None:
    slightly = folder(tmp_path / "slightly", 67)
    assert compare(better, slightly).rows[0].worst_case_difference.value == pytest.approx(-0.01)
    assert run("compare", better, slightly, "--fail-on-regression").code == 0


def test_what_is_not_trustworthy_passes_no_gate(worse: Path, tmp_path: Path) -> None:
    high = folder(tmp_path / "high", 0, **UNTRUSTED)
    assert run("compare", worse, high).code == 0
    for rule in (("--fail-under", "robust_accuracy=0.4"), ("--fail-on-regression",)):
        ran = run("compare", worse, high, *rule)
        assert (ran.code, "its figure is not trustworthy: zero-gradients" in ran.err) == (1, True)
    # A doubted figure of A is no reason to stop B.
    assert run("compare", high, worse, "--fail-under", "robust_accuracy=0.4").code == 0


def test_what_failed_passes_no_gate(better: Path, tmp_path: Path) -> None:
    seen = evidence(range(10), n=N)
    failed = (cell(attack="square", status="failed", reason="out of memory"), None)
    b = stored(tmp_path / "b", (cell(seen), seen), failed)
    assert run("compare", better, b).code == 0
    ran = run("compare", better, b, "--fail-on-regression")
    assert ran.code == 1
    assert "square on cnn (none) on digits, linf 1/10: out of memory (of 1 that failed in B)" in ran.err


def test_runs_without_an_image_in_common_pass_no_gate(better: Path, tmp_path: Path) -> None:
    seen = replace(evidence([], n=N), index=np.arange(1000, 1000 + N))
    other = stored(tmp_path / "other", (cell(seen), seen))
    assert run("compare", better, other).code == 0
    ran = run("compare", better, other, "--fail-on-regression")
    assert (ran.code, "so nothing was compared" in ran.err) == (1, True)


def test_poisons_that_succeed_more_are_a_regression(tmp_path: Path) -> None:
    def made(name: str, hits: int) -> Path:
        seen = poisoned(hits)
        return stored(tmp_path / name, poisonings=[(poisoning(seen), seen)])

    low, high = made("low", 2), made("high", 30)
    ran = run("compare", low, high, "--fail-on-regression")
    assert ran.code == 1
    assert "cnn (none) on digits, ba:count=7: attack_success_rate rose by 70.0 points" in ran.err
    assert run("compare", high, low, "--fail-on-regression").code == 0
    assert run("compare", high, low, "--fail-under", "triggered_accuracy=0.95").code == 0
    fell = run("compare", low, high, "--fail-under", "triggered_accuracy=0.5")
    assert (fell.code, "triggered_accuracy is 0.250" in fell.err) == (1, True)


def test_a_floor_of_what_was_not_measured_is_no_pass(better: Path, worse: Path) -> None:
    ran = run("compare", worse, better, "--fail-under", "worst_case_similarity=0.1")
    assert ran.code == 2
    assert "nothing that was compared has a worst_case_similarity" in ran.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0.4", "--fail-under takes NAME=SHARE, not '0.4'"),
        ("robust_acuracy=0.4", "did you mean 'robust_accuracy'"),
        ("robust_accuracy=40", "takes a share from 0 to 1, like robust_accuracy=0.4, not '40'"),
        ("robust_accuracy=nan", "not 'nan'"),
        ("robust_accuracy", "not ''"),
    ],
)
def test_floors_that_mean_nothing(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        gate_of([text], False, None)
    assert told in str(caught.value)


def test_a_tolerance_is_of_regressions() -> None:
    with pytest.raises(UsageError, match="--tolerance goes with --fail-on-regression"):
        gate_of(["clean_accuracy=0.4"], False, 1.0)
    assert gate_of(["clean_accuracy=0.4"], True, 1.5) == Gate({"clean_accuracy": 0.4}, True, 1.5)
