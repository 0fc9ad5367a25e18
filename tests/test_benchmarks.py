"""The benchmarks as a whole: run by one command, judged by their bars, with what they were measured on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, benchmark_module, python

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def everything() -> Iterator[Any]:
    with benchmark_module("all") as module:
        yield module


@pytest.fixture(scope="module")
def bars() -> Iterator[Any]:
    with benchmark_module("bars") as module:
        yield module


WRITES = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
"""
FAKES = {
    "good": WRITES + "path.write_text(json.dumps({'date': 'today', 'quick': '--quick' in sys.argv, 'bars': "
    "[{'what': 'speed', 'value': 2, 'at least': 1, 'holds': True, 'on': '3 images'}]}))",
    "slow": WRITES + "path.write_text(json.dumps({'date': 'today', 'bars': "
    "[{'what': 'speed', 'value': 0.5, 'at least': 1, 'holds': False, 'on': '3 images'}]})); sys.exit(1)",
    "partial": WRITES + "path.write_text(json.dumps({'date': 'today'})); raise ValueError('in the middle')",
    "breaks": "raise ValueError('at once')",
    "contradicts": WRITES + "path.write_text(json.dumps({'date': 'today', 'bars': []})); sys.exit(1)",
}


def fakes(folder: Path, *names: str) -> dict[str, Path]:
    for name in names:
        (folder / f"{name}.py").write_text(FAKES[name])
    return {name: folder / f"{name}.py" for name in names}


def test_all_run_though_some_fail(everything: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "results"
    kept.mkdir()
    for name in ("slow", "partial", "breaks"):
        (kept / f"{name}.json").write_text('"older"')
    scripts = fakes(tmp_path, "partial", "breaks", "good", "contradicts", "slow")
    assert everything.run_all(scripts, kept, quick=False) == 1
    told = capsys.readouterr().out
    assert "2 of 5 benchmarks ran; failed: partial, breaks, contradicts" in told
    assert "1 of 2 bars missed" in told
    assert "speed: 2, at least 1: held (3 images)" in told
    assert "MISS speed: 0.5, at least 1: MISSED" in told
    assert json.loads((kept / "slow.json").read_text())["date"] == "today", "a missed bar is a result"
    assert json.loads((kept / "good.json").read_text())["quick"] is False
    assert (kept / "partial.json").read_text() == (kept / "breaks.json").read_text() == '"older"'
    assert (kept / "partial.part").exists()
    assert not (kept / "good.part").exists()


@pytest.mark.parametrize(("names", "quick", "code"), [
    (["good"], False, 0), (["good", "slow"], False, 1), (["good", "slow"], True, 0), (["good", "breaks"], True, 1),
])  # fmt: skip
def test_exit_codes(everything: Any, tmp_path: Path, names: list[str], quick: bool, code: int) -> None:
    assert everything.run_all(fakes(tmp_path, *names), tmp_path / "results", quick) == code


def test_what_the_same_code_measured_is_not_measured_again(
    everything: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = fakes(tmp_path, "good", "slow")
    head = everything.kept.header()
    bar = {"what": "accuracy", "value": 3, "at least": 4, "holds": False, "on": "5 images"}
    for name, other in (("good", {}), ("slow", {"code": "another"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(head | other | {"bars": [bar]}))
    assert everything.run_all(scripts, tmp_path, quick=False, resume=True) == 1
    told = capsys.readouterr().out
    assert "good, measured before\n  MISS accuracy: 3" in told
    assert "MISS speed: 0.5" in told, "other code measured it"
    assert "2 of 2 benchmarks ran, 1 of them before\n2 of 2 bars missed" in told
    everything.run_all(scripts, tmp_path, quick=False)
    assert "before" not in capsys.readouterr().out


def test_a_result_tells_the_code_that_measured_it(
    everything: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = everything.kept
    for path in (
        "src/advplug/a.py",
        "plugins/b/src/b/c.py",
        "plugins/b/tests/t.py",
        "benchmarks/d.py",
        "benchmarks/bars.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    monkeypatch.setattr(kept, "HERE", tmp_path / "benchmarks")
    seen = [kept.code()]
    for path in ("src/advplug/a.py", "plugins/b/src/b/c.py", "benchmarks/d.py"):
        (tmp_path / path).write_text("1")
        seen.append(kept.code())
    assert len(set(seen)) == 4
    for path in ("plugins/b/tests/t.py", "benchmarks/bars.py"):
        (tmp_path / path).write_text("1")
    assert kept.code() == seen[-1]
    whole = kept.header() | {"bars": []}
    assert kept.same(whole)
    assert kept.same(whole | {"threads": 7, "load": 3})
    assert not any(map(kept.same, (whole | {"cpu": "x"}, whole | {"torch": "1"}, kept.header())))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert not kept.same(whole)


def test_a_quick_run_keeps_nothing(everything: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "SCRIPTS", fakes(tmp_path, "good", "slow"))
    monkeypatch.setattr(everything.kept, "RESULTS", tmp_path / "kept")
    assert everything.main(["good", "--quick"]) == 0
    assert not (tmp_path / "kept").exists()


def test_an_unknown_name_is_answered_with_the_known_ones(everything: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        everything.main(["engin"])
    assert stop.value.code == 2
    assert "no benchmark is called engin; there are startup, engine," in capsys.readouterr().err


def test_every_benchmark_has_the_common_options_header_and_bars(everything: Any, bars: Any) -> None:
    assert list(everything.SCRIPTS) == list(bars.JUDGES)
    for name, script in everything.SCRIPTS.items():
        text = script.read_text()
        assert f'kept.parser(__doc__, "{name}"' in text, name
        assert f'kept.finish("{name}"' in text, name
        assert "kept.header(" in text, name
        assert "[--quick]" in text, name


def test_the_header_says_when_and_on_what(everything: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/engine.py", "--images", "4", "--output", "x.json"])
    head = everything.kept.header(3)
    assert head["command"] == "python benchmarks/engine.py --images 4"
    assert (head["threads"], len(head["date"]), head["advplug"]) == (3, 10, "0.1.0")
    assert head["cpu"]
    assert head["cores"] >= 1
    assert head["torch"].startswith("2.")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert everything.kept.header()["threads"] == 2


def test_a_part_or_other_settings_do_not_replace_a_result(everything: Any, tmp_path: Path) -> None:
    kept = everything.kept
    parser = kept.parser("", "engine", "few")
    parser.add_argument("--only")
    parser.add_argument("--images", type=int)
    lines = ("", "--quick", "--only pgd", "--images 4")
    found = [kept.place("engine", parser.parse_args(line.split())) for line in lines]
    assert found == [kept.RESULTS / "engine.json", None, None, None]
    given = parser.parse_args(["--quick", "--output", str(tmp_path / "x")])
    assert kept.place("engine", given) == tmp_path / "x"


# --- bars ------------------------------------------------------------------------------------------


def stored(name: str) -> Any:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{name} was not measured yet")
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ["startup", "engine", "backends", "autoattack", "broken_defenses", "executors",
                                  "poisoning", "clip", "load", "forecast", "report"])  # fmt: skip
def test_what_is_stored_is_judged_again(bars: Any, name: str) -> None:
    result = stored(name)
    judged = bars.of(name, result)
    assert judged
    for bar in judged:
        (side,) = {"at most", "at least"} & set(bar)
        held = bar["value"] <= bar[side] if side == "at most" else bar["value"] >= bar[side]
        assert bar["holds"] is held
        assert bar["on"]
    if "date" in result:
        assert result["bars"] == judged


def missed(bars: Any, name: str, result: Any) -> list[str]:
    return [bar["what"] for bar in bars.of(name, result) if not bar["holds"]]


def test_a_slower_or_weaker_engine_misses_its_bars(bars: Any) -> None:
    result = stored("engine")
    worse = copy.deepcopy(result)
    for row in worse["trained"]:
        if row["variant"] == "advplug float32":
            row["seconds"], row["robust accuracy"] = 2 * row["seconds"], row["robust accuracy"] + 0.01
    worse["memory"]["difference"] = 300.0
    assert set(missed(bars, "engine", worse)) - set(missed(bars, "engine", result)) == {
        "PGD-20, times as fast as torchattacks", "PGD-20, robust accuracy above torchattacks'",
        "MB more for 5,000 images than for 500",
    }  # fmt: skip
    part = {k: v for k, v in result.items() if k not in ("pgd", "trained", "memory", "overhead")}
    assert all("curve" in bar["what"] for bar in bars.of("engine", part))


def test_the_bars_of_speed_are_higher_where_the_processor_has_bfloat16(bars: Any) -> None:
    result = stored("engine") | {"cpu flags": ["avx2", "avx512_bf16"]}
    told = [bar for bar in bars.of("engine", result) if bar["what"].endswith("in bfloat16")]
    assert [bar["at least"] for bar in told] == [12.0, 5.0, 2.5]
    plain = [b for b in bars.of("engine", stored("engine")) if b["what"].endswith("times as fast as torchattacks")]
    assert [bar["at least"] for bar in plain if "leaving" not in bar["what"]] == [6.0, 2.5, 2.5]


def test_a_weaker_backend_is_seen_and_wrapped_ones_are_not_judged(bars: Any) -> None:
    group: dict[str, Any] = {"group": "PGD", "norm": "linf", "eps": "1/255", "images": 40, "rows": [
        {"attack": "pgd:steps=5", "robust accuracy": 0.3}, {"attack": "ta.pgd", "robust accuracy": 0.25},
        {"attack": "art.pgd", "failed": "no art"}]}  # fmt: skip
    result = {"model": "net", "groups": [group, group | {"rows": group["rows"][1:]}]}
    (bar,) = bars.of("backends", result)
    assert (bar["value"], bar["holds"]) == (pytest.approx(0.05), False)
    assert "1 other backends" in bar["what"]


def test_a_hidden_fault_is_seen(bars: Any) -> None:
    result = stored("broken_defenses")
    exposed, sound = (bar["value"] for bar in bars.of("broken_defenses", result))
    result["rows"][0] |= {"reported": 0.9, "broken": 0.1, "verdict": "trusted"}
    result["rows"][1] |= {"twin_flags": ["weak"]}
    assert [bar["value"] for bar in bars.of("broken_defenses", result)] == [exposed - 1, sound - 1]


def test_safeclip_is_judged_by_its_worst_seed(bars: Any) -> None:
    def row(seed: int, defense: str, accuracy: float, triggered: float, taken: float) -> dict[str, Any]:
        rates = {"clean_accuracy": accuracy, "attack_success_rate": triggered, "poison_success_rate": taken}
        return {"seed": seed, "defense": defense, **{k: {"value": v, "n": 8} for k, v in rates.items()}}

    rows = [row(s, "none", 0.9, 1.0, 1.0) for s in (0, 1)]
    rows += [row(0, "safeclip", 0.88, 0.01, 0.0), row(1, "safeclip:epochs=8", 0.8, 0.06, 0.25)]
    found = {bar["what"].partition(", ")[2]: bar for bar in bars.of("poisoning", {"rows": rows})}
    assert [round(bar["value"], 6) for bar in found.values()] == [0.06, 0.125, 0.1]
    assert [bar["holds"] for bar in found.values()] == [False, True, False]
    assert bars.of("poisoning", {"rows": rows[:2]}) == []


def test_a_forecast_may_be_off_in_both_directions(bars: Any) -> None:
    result = {"matrix": "m.yaml", "cells": 2, "passes": {"ratio": 0.4}, "seconds": {"ratio": 1.9}}
    assert [(bar["value"], bar["holds"]) for bar in bars.of("forecast", result)] == [(2.5, False), (1.9, True)]


# --- the quick runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["startup", pytest.param("report", marks=pytest.mark.slow)])
def test_a_benchmark_runs_quickly(name: str, tmp_path: Path) -> None:
    done = python(str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--output", str(tmp_path / "out.json"))
    result = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == int(not all(bar["holds"] for bar in result["bars"])), done.stderr
    assert result["command"] == f"python benchmarks/{name}.py --quick"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_benchmarks_run(tmp_path: Path) -> None:
    done = python(str(ROOT / "benchmarks" / "all.py"), "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
