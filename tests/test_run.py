"""`advplug run`: work that cells share is done once, an allowance stops it, the same command goes on, status tells."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advplug import pipeline, work
from advplug.attacks.transfer import forget
from advplug.console import resuming
from advplug.train import Training
from cli_tools import CNN, TINY, Ran, nursery, run, stored, wait_for, without_times

MATRIX = f"""
title: what is shared
datasets: '{TINY}'
models: [{CNN}, 'cnn-a:epochs=1']
defenses: [jpeg, 'prune:epochs=1', 'jpeg:quality=50']
attacks:
- ifgsm:steps=4
- noise
- transfer: {{from: ({CNN}), attack: (ifgsm:steps=3)}}
eps: [4/255, 16/255]
n: 16
audit: none
"""
TRAININGS = 2 + 2
"""Both models, and the tuning of what was pruned of each; JPEG trains nothing."""
CELLS = 2 * 4 * 3 * 2


class Done:
    """What was computed: trainings, victims that answered without attack, and images crafted by (attack, budget)."""

    def __init__(self) -> None:
        self.trainings, self.clean = 0, Counter[str]()
        self.crafted: list[tuple[str, str, str, int]] = []


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    seen = Done()
    fit, clean, craft = Training.fit, work.clean_decisions, pipeline.craft

    def counted_fit(*arguments: Any, **rest: Any) -> Any:
        seen.trainings += 1
        return fit(*arguments, **rest)

    def counted_clean(victim: Any, *rest: Any) -> Any:
        seen.clean[victim.key] += 1
        return clean(victim, *rest)

    def counted_craft(attack: Any, victim: Any, batch: Any, threat: Any, *rest: Any) -> Any:
        seen.crafted.append((rest[-1], victim.key, str(threat.eps), len(batch)))
        return craft(attack, victim, batch, threat, *rest)

    monkeypatch.setattr(Training, "fit", counted_fit)
    monkeypatch.setattr(work, "clean_decisions", counted_clean)
    monkeypatch.setattr(pipeline, "craft", counted_craft)
    return seen


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path
    forget()


def go(text: str, *options: str, output: str = "out") -> Ran:
    Path("m.yaml").write_text(text)
    ran = run("run", "m.yaml", "-o", output, *options)
    assert ran.code == 0, ran.err
    return ran


# --- shared work ---


def test_shared_work_is_done_once(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    result = go(MATRIX, "--json").json
    assert Counter(c["status"] for c in result["cells"]) == {"ok": CELLS}
    assert done.trainings == TRAININGS
    # One clean prediction of each of the eight victims, though three attacks at two budgets ask for it.
    assert list(done.clean.values()) == [1] * 8
    # Eight victims are judged on what transfer crafts, each image of it once at a budget, by four forward passes.
    sent = [c["passes"]["forward"] for c in result["cells"] if c["attack"].startswith("transfer")]
    static = [c["metrics"]["static_robust_accuracy"] for c in result["cells"] if c["defense"] != "none"]
    assert all(value is not None for value in static)
    assert 0 < sum(sent) <= 16 * 2 * 4
    again = go(MATRIX, "--json").json
    assert without_times(again) == without_times(result)
    assert (done.trainings, sum(done.clean.values())) == (TRAININGS, 8)
    assert again["run"]["passes"] == 0


def test_static_images_are_crafted_once_for_all_defenses(done: Done) -> None:
    """One more wrap costs its own attacks, through it and around it, and nothing of the baseline's."""
    text = f"datasets: '{TINY}'\nmodels: {CNN}\nattacks: 'ifgsm:steps=4'\neps: 16/255\nn: 16\naudit: none\n"
    counts = []
    for k, defenses in enumerate(("jpeg", "jpeg, bit-depth", "jpeg, bit-depth, 'jpeg:quality=50'")):
        done.crafted.clear()
        go(f"{text}defenses: [{defenses}]\n", output=f"out{k}")
        counts.append(len(done.crafted))
    assert counts[1] - counts[0] == counts[2] - counts[1] == 2
    assert counts[0] == 2 + 2


def test_sweeps_are_warm_started(done: Done) -> None:
    """Images that are broken at a budget are not attacked at larger ones: each gets those that the last one left."""
    text = f"datasets: '{TINY}'\nmodels: {CNN}\nattacks: 'pgd:steps=6'\nn: 20\naudit: none\n"
    budgets = ["1/255", "4/255", "16/255", "48/255"]
    cells = go(f"{text}eps: [{', '.join(budgets)}]\n", "--json").json["cells"]
    robust = [round(c["metrics"]["robust_accuracy"]["value"] * 20) for c in cells]
    clean = round(cells[0]["metrics"]["clean_accuracy"]["value"] * 20)
    attacked = [n for *_, n in done.crafted]
    assert attacked == [n for n in (clean, *robust[:-1]) if n]
    assert attacked[-1] < attacked[0]
    cold = go(f"{text}eps: 48/255\n", "--json", output="cold").json["run"]["passes"]
    warm = sum(c["passes"]["forward"] + c["passes"]["backward"] for c in cells[1:])
    assert cells[-1]["passes"]["forward"] < cold
    assert warm < 3 * cold


# --- an allowance ---

LIMITED = f"""
datasets: '{TINY}'
models: {CNN}
defenses: jpeg
attacks: [noise, fgsm, 'ifgsm:steps=4', 'pgd:steps=8']
eps: 16/255
n: 16
seeds: [0, 1]
audit: none
"""
"""16 cells of four victims."""


def states(output: str = "out") -> dict[tuple[str, str, str, int], str]:
    rows = run("status", output, "--json").json["cells"]
    return {(r["model"], r["defense"], r["attack"], r["seed"]): r["state"] for r in rows}


def test_what_tells_most_comes_first_and_the_rest_is_pending() -> None:
    whole = go(LIMITED, "--json", output="whole").json
    ran = go(LIMITED, "--max-passes", "2", "-q")
    assert ran.out.splitlines()[-1] == "15 of 16 cells pending; run the same command to go on"
    (first,) = (cell for cell, state in states().items() if state == "done")
    assert first == (CNN, "none", "ifgsm:steps=4", 0)  # the cheapest attack that iterates, on the bare model

    go(LIMITED, "--max-passes", "600", "-q")
    found = states()
    done = {cell for cell, state in found.items() if state == "done"}
    assert first in done
    assert set(found.values()) == {"done", "pending"}
    # Every victim has met an attack that iterates before any meets noise, and all that before another seed.
    attacks = {a for _, _, a, _ in done}
    assert "noise" not in attacks or {("ifgsm:steps=4", 0), ("pgd:steps=8", 0)} <= {(a, s) for _, _, a, s in done}
    assert {s for *_, s in done} == {0} or len([c for c in done if c[3] == 0]) == 8

    last = go(LIMITED, "--json").json
    assert set(states().values()) == {"done"}
    assert without_times(last) == without_times(whole)


def test_a_time_that_is_over_at_once() -> None:
    ran = run("run", "m.yaml", "--budget", "soon")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    ran = go(LIMITED, "--budget", "0.01s", "--json", "-q")
    assert ran.err.endswith("of 16 cells pending; run the same command to go on\n")
    assert len(json.loads(ran.out)["cells"]) < 16
    text = run("status", "out").out
    assert text.startswith("16 cells: ")
    assert " pending" in text.splitlines()[0]
    assert "pending: about " in text


def test_the_same_command_makes_use_of_what_is_left() -> None:
    """Each run is allowed a few passes; enough of them complete the matrix."""
    small = LIMITED.replace("seeds: [0, 1]\naudit: none", "audit: quick").replace("noise, fgsm, ", "")
    whole = go(small, "--json", output="whole").json
    runs = 1
    while "pending" in go(small, "--max-passes", "200", "-q").out.splitlines()[-1]:
        runs += 1
    assert 1 < runs < 14
    assert without_times(go(small, "--json").json) == without_times(whole)


def test_checks_that_a_limit_left_out_are_pending() -> None:
    one = LIMITED.replace("seeds: [0, 1]\naudit: none\n", "").replace("defenses: jpeg\n", "")
    one = one.replace("[noise, fgsm, 'ifgsm:steps=4', 'pgd:steps=8']", "'ifgsm:steps=4'")
    ran = go(one, "--max-passes", "2", "-q")
    assert ran.out.splitlines()[-1] == (
        "the health checks of 1 of 1 threats are pending; run the same command to go on"
    )
    assert "pending" not in go(one, "--max-passes", "2", "-q").out
    assert all(t["audit"] is not None for t in go(one, "--json").json["threats"])


def test_a_run_that_begins_anew_goes_on_without_that() -> None:
    ran = go(LIMITED, "--fresh", "--max-passes", "2")
    assert ran.out.splitlines()[-1].endswith(" cells pending; run the same command without --fresh to go on")
    assert "kept in out: the same command without --fresh again computes only what is missing\n" in ran.err
    assert resuming("advplug run m.yaml --fresh -o 'a b'") == "advplug run m.yaml -o 'a b'"


# --- status ---


def test_status_tells_done_failed_refused_and_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREEDY", "0")
    flaky = "py:usernets:Greedy"
    text = (
        f"title: a bad day\ndatasets: '{TINY}'\nmodels: [{CNN}, '{flaky}']\nattacks: [fgsm, noise]\nn: 8\naudit: none\n"
    )
    Path("m.yaml").write_text(text)
    ran = run("run", "m.yaml", "-o", "out", "-q")
    assert ran.code == 3
    shown = run("status", "out")
    assert shown.code == 0
    found = run("status", "out", "--json").json
    assert found["counts"] == {"done": 2, "failed": 2, "refused": 0, "pending": 0}
    assert found["title"] == "a bad day"
    failed = [c for c in found["cells"] if c["state"] == "failed"]
    assert all("memory" in c["reason"] for c in failed)
    first, *_ = shown.out.splitlines()
    assert first == "a bad day: 4 cells: 2 done, 2 failed"
    assert f"failed: fgsm on {flaky} (none), linf " in shown.out

    Path("m.yaml").write_text(text.replace("[fgsm, noise]", "[fgsm, noise, ifgsm]"))
    assert run("run", "m.yaml", "-o", "out", "--max-passes", "1", "-q").code in (0, 3)
    found = run("status", "out", "--json").json
    assert found["counts"]["pending"] + found["counts"]["failed"] + found["counts"]["done"] == 6
    assert found["pending_passes"] > 0


def test_status_tells_what_is_refused_and_why() -> None:
    ran = go(f"datasets: '{TINY}'\nmodels: {CNN}\nattacks: ifgsm\neps: [8/255, 'l1:2']\naudit: none\n", "-q")
    assert "pending" not in ran.out
    found = run("status", "out", "--json").json
    assert found["counts"] == {"done": 1, "failed": 0, "refused": 1, "pending": 0}
    reason = "ifgsm has no l1 version; it works in l2, linf"
    assert f"refused: ifgsm on {CNN} (none), l1 2: {reason}\n" in run("status", "out").out


def test_status_of_an_evaluation_and_of_cells_that_are_not_asked_for() -> None:
    evaluate = ("eval", "-m", CNN, "--dataset", TINY, "--audit", "none", "-o", "out", "-q")
    assert run(*evaluate, "-a", "fgsm").code == 0
    assert run(*evaluate, "-a", "noise").code == 0
    text = run("status", "out").out
    assert text.startswith("1 cells: 1 done")
    assert "1 further cells in this folder are of other runs" in text
    Path("out/spec.yaml").unlink()
    assert run("status", "out").out == "2 done; this folder has no spec.yaml, so that what is pending is not known\n"


def test_status_of_what_is_no_run() -> None:
    Path("empty").mkdir()
    for name in ("empty", "none"):
        ran = run("status", name)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == f"Error: {name} holds no results.sqlite; give the folder of a run, the one named with -o\n"
    Path("results/mine").mkdir(parents=True)
    Path("results/mine/results.sqlite").touch()
    assert run("status", "results").err.endswith("named with -o; results/mine is one\n")
    Path("mine.yaml").touch()
    wanted = "give the folder of a run, the one named with -o, or advplug-results/mine"
    for command in (("status",), ("export", "-f", "json")):
        assert run(*command, "mine.yaml").err == f"Error: mine.yaml is a file; {wanted}\n"


def test_a_folders_spec_goes_on_in_it() -> None:
    go(LIMITED, "--max-passes", "1", "-q", "--seed", "0", "-a", "fgsm", "-a", "noise")
    ran = run("run", "out/spec.yaml", "--json", "-q")
    assert ran.code == 0
    assert len(ran.json["cells"]) == 4
    assert set(states().values()) == {"done"}


# --- interruptions ---


def test_ctrl_c_in_the_middle_says_how_to_go_on(folder: Path) -> None:
    model = "py:usernets:Slow#epochs=1"
    text = f"datasets: '{TINY}'\nmodels: [{CNN}, '{model}']\nattacks: [noise, fgsm]\naudit: none\n"
    Path("m.yaml").write_text(text)
    here = {"ADVPLUG_CACHE": str(folder / "cache")}
    child = nursery().start(folder, "run", "m.yaml", SLOW="attack", **here)
    wait_for((folder / "attack").exists)
    child.send(signal.SIGINT)
    ran = child.wait()
    assert (ran.code, ran.out) == (130, "")
    kept = "finished cells are kept in advplug-results/m"
    assert ran.err == f"interrupted: {kept}; to go on: advplug run m.yaml\n"
    before = stored("advplug-results/m")
    assert len(before) == 3
    found = nursery().start(folder, "status", "advplug-results/m").wait()
    assert found.out.startswith("4 cells: 3 done, 1 pending\n")
    again = nursery().start(folder, "run", "m.yaml", "--json", **here).wait()
    assert again.code == 0, again.err
    whole = nursery().start(folder, "run", "m.yaml", "--json", "-o", "whole", **here).wait()
    assert without_times(json.loads(again.out)) == without_times(json.loads(whole.out))
    after = stored("advplug-results/m")
    assert {k: after[k] for k in before} == before
