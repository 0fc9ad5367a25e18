"""Attacks on training data as pictures: what is on the lines."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from advplug.errors import UsageError
from advplug.estimate import rate
from advplug.plans import Bound
from advplug.plots.curves import draw, panels
from advplug.plots.poisons import axis_of_poisons
from advplug.results import Poisoning, RunInfo, RunResult


def plan(label: str, **params: Any) -> Any:
    entry = SimpleNamespace(name="ba")
    return SimpleNamespace(attack=Bound(label, {}, None, None, entry, params))  # type: ignore[arg-type]


def made(attack: str, defense: str, hits: int, **facts: Any) -> Poisoning:
    metrics = {
        "clean_accuracy": rate(95, 100), "attack_success_rate": rate(hits, 100),
        "clean_model_success_rate": rate(1, 100), "poison_success_rate": None,
    }  # fmt: skip
    return Poisoning(f"{attack}/{defense}", "digits", "cnn", defense, attack, 0, "ok", metrics=metrics, poisons=50,
                     training_images=1000, verdict="trusted", provenance={"facts": facts})  # fmt: skip


def result(*poisonings: Poisoning) -> RunResult:
    return RunResult(RunInfo({}, 0, "cpu", ""), (), (), (), poisonings)


def test_success_along_the_number_of_poisons(tmp_path: Path) -> None:
    axis = axis_of_poisons([plan("ba:count=70", count=70, size=3), plan("ba:count=7", count=7, size=3)])
    shown = result(made("ba:count=70", "none", 96), made("ba:count=7", "none", 26), made("ba:count=7", "sift", 2))
    (panel,) = panels(shown, axis)
    lines = {line.label: [(p.x, p.y.value) for p in line.points] for line in panel.lines}
    assert axis.name == "ba count"
    assert lines["triggered as wanted, undefended"] == [(7, 0.26), (70, 0.96)]
    assert lines["triggered as wanted, sift"] == [(7, 0.02)]
    assert lines["triggered as wanted, clean model"] == [(7, 0.01), (70, 0.01)]
    assert lines["clean accuracy, undefended"] == [(7, 0.95), (70, 0.95)]
    draw(shown, axis, tmp_path / "a.svg")
    assert "share, %" in (tmp_path / "a.svg").read_text()


def test_what_was_trusted_by_round(tmp_path: Path) -> None:
    rounds = [
        {"trusted": 100, "poisons": 5, "precision": 0.95, "recall": 0.1},
        {"trusted": 0, "poisons": 0, "precision": None, "recall": 0.0},
        {"trusted": 500, "poisons": 10, "precision": 0.98, "recall": 0.5},
    ]
    axis = axis_of_poisons([plan("ba", count=50)])
    shown = result(made("ba", "none", 96), made("ba", "safeclip", 2, safeclip={"rounds": rounds}))
    (panel,) = panels(shown, axis)
    lines = {line.label: [(p.x, p.y.value) for p in line.points] for line in panel.lines}
    assert lines == {
        "clean share of the trusted": [(1, 0.95), (3, 0.98)],
        "trusted share of the clean": [(1, 0.1), (2, 0.0), (3, 0.5)],
        "trusted share of the poisons": [(1, 0.1), (2, 0.0), (3, 0.2)],
    }
    draw(shown, axis, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_attacks_that_differ_otherwise_have_no_axis() -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        axis_of_poisons([plan("ba:trigger=sig", trigger="sig"), plan("ba:trigger=wanet", trigger="wanet")])
    axis = axis_of_poisons([plan("ba:rate=1/10", rate=Fraction(1, 10)), plan("ba:rate=1/5", rate=Fraction(1, 5))])
    assert axis.values == {"ba:rate=1/10": 0.1, "ba:rate=1/5": 0.2}
