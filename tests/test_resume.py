"""The same command again computes what is missing and nothing else; processes share what they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from advplug import audit
from advplug import work as pieces
from advplug.train import Training
from cli_tools import CNN, QUICK, TINY, evaluate, nursery, run, stored, without_times
from usernets import Linear

PRUNE = "prune:epochs=1"
LINEAR = "py:usernets:Linear#weights=linear.safetensors"


class Work:
    """What was computed: trainings, and sweeps as (model, defense, attack)."""

    def __init__(self) -> None:
        self.fits, self.sweeps, self.audits = 0, [], 0

    def take(self) -> tuple[int, list[tuple[str, str, str]], int]:
        """Since the last time."""
        done = self.fits, self.sweeps, self.audits
        self.__init__()
        return done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    seen = Work()
    fit, run_sweep, run_audit = Training.fit, pieces.run_sweep, audit.run_audit

    def counted_fit(*arguments: Any, **rest: Any) -> Any:
        seen.fits += 1
        return fit(*arguments, **rest)

    def counted_sweep(sweep: Any, *rest: Any) -> Any:
        seen.sweeps.append((sweep.victim.model.label, sweep.victim.defense_label, sweep.attack.label))
        return run_sweep(sweep, *rest)

    def counted_audit(*arguments: Any) -> Any:
        seen.audits += 1
        return run_audit(*arguments)

    monkeypatch.setattr(Training, "fit", counted_fit)
    monkeypatch.setattr(pieces, "run_sweep", counted_sweep)
    monkeypatch.setattr(audit, "run_audit", counted_audit)
    return seen


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    save_file(Linear().state_dict(), "linear.safetensors")
    return tmp_path


def test_a_matrix_that_grows_computes_what_is_new(work: Work) -> None:
    first = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE)
    assert work.take() == (2, [(CNN, "none", "fgsm"), (CNN, PRUNE, "fgsm")], 2)
    rows = stored("out")

    again = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE)
    assert work.take() == (0, [], 0)
    assert {**again, "run": first["run"]} == first

    more_attacks = evaluate("-m", CNN, "-a", "fgsm", "-a", "noise", "-d", PRUNE)
    assert work.take() == (0, [(CNN, "none", "noise"), (CNN, PRUNE, "noise")], 2)  # audits look at the group's attacks

    evaluate("-m", CNN, "-m", LINEAR, "-a", "fgsm", "-a", "noise")
    label = "py:usernets:Linear,weights=linear.safetensors"
    assert work.take() == (0, [(label, "none", "fgsm"), (label, "none", "noise")], 1)

    fewer = evaluate("-m", CNN, "-a", "noise")
    assert work.take() == (0, [], 1)
    assert fewer["cells"] == [c for c in more_attacks["cells"] if (c["attack"], c["defense"]) == ("noise", "none")]
    after = stored("out")
    assert len(after) == 6
    assert {k: after[k] for k in rows} == rows


def test_a_larger_budget_leaves_the_cells_of_the_smaller_as_they_are(work: Work) -> None:
    """It starts from where they ended, so it runs them once more, and must come out the same as in one go."""
    pgd = ("-m", LINEAR, "-a", "pgd:steps=5", *QUICK)
    small = evaluate(*pgd, "-e", "1/255")
    rows = stored("out")
    ran = run("eval", "--dataset", TINY, *pgd, "-e", "1/255", "-e", "2/255", "-o", "out", "--dry-run", "--json")
    assert [(c["eps"], c["state"]) for c in ran.json["cells"]] == [("1/255", "done"), ("2/255", "to do")]
    both = evaluate(*pgd, "-e", "2/255", "-e", "1/255")
    assert both["cells"][0] == small["cells"][0]
    after = stored("out")
    assert len(after) == 2
    assert {k: after[k] for k in rows} == rows
    work.take()
    assert without_times(evaluate(*pgd, "-e", "1/255", "-e", "2/255", output="other")) == without_times(both)


def test_a_smaller_budget_in_front_makes_another_chain() -> None:
    pgd = ("-m", LINEAR, "-a", "pgd:steps=5", *QUICK)
    cold = evaluate(*pgd, "-e", "2/255")["cells"][0]
    warm = evaluate(*pgd, "-e", "1/255", "-e", "2/255")["cells"][1]
    assert cold["key"] != warm["key"]


def test_the_baseline_adds_the_static_attack_later(work: Work) -> None:
    command = ("-m", CNN, "-a", "fgsm", "-d", PRUNE, *QUICK)
    alone = evaluate(*command, "--no-baseline")["cells"][0]
    work.take()
    _, beside = evaluate(*command)["cells"]
    assert alone["metrics"]["static_robust_accuracy"] is None
    assert beside["metrics"]["static_robust_accuracy"] is not None
    assert work.take()[:2] == (0, [(CNN, "none", "fgsm"), (CNN, PRUNE, "fgsm")])
    assert evaluate(*command, "--no-baseline")["cells"] == [alone]


def test_spelling_does_not_matter(work: Work) -> None:
    evaluate("-m", CNN, "-a", "pgd:steps=5,loss=ce", "-e", "8/255", *QUICK)
    work.take()
    again = evaluate("-m", "cnn:lr=none,epochs=1", "-a", "pgd:loss=ce,steps=5", "-e", "16/510", *QUICK)
    assert work.take() == (0, [], 0)
    assert (again["cells"][0]["model"], again["cells"][0]["attack"]) == ("cnn:lr=none,epochs=1", "pgd:loss=ce,steps=5")


def test_what_a_cell_depends_on_makes_it_a_new_one(work: Work) -> None:
    command = ("-m", LINEAR, "-a", "pgd:steps=5", *QUICK)
    evaluate(*command)
    work.take()
    for change in (("--seed", "1"), ("-n", "10"), ("-e", "7/255")):
        evaluate(*command, *change)
        assert len(work.take()[1]) == 1, change
    evaluate(*command, dataset=TINY.replace("n=20", "n=19"))
    assert len(work.take()[1]) == 1
    save_file({"weight": Linear().weight + 1}, "linear.safetensors")
    evaluate(*command)
    assert len(work.take()[1]) == 1
    for same in (("--batch-size", "3"), ("--device", "cpu")):
        evaluate(*command, *same)
        assert work.take()[1] == []


def test_failed_cells_are_retried_alone(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = "py:usernets:Greedy#weights=linear.safetensors"
    command = ("eval", "-m", LINEAR, "-m", flaky, "-a", "fgsm", "--dataset", TINY, *QUICK, "-o", "out", "-q", "--json")
    monkeypatch.setenv("GREEDY", "0")
    first = run(*command)
    assert first.code == 3
    assert [c["status"] for c in first.json["cells"]] == ["ok", "failed"]
    work.take()
    dry = run(*command, "--dry-run").json["cells"]
    assert [c["state"] for c in dry] == ["done", "again"]
    monkeypatch.setenv("GREEDY", "1000")
    second = run(*command)
    assert second.code == 0
    assert [c["status"] for c in second.json["cells"]] == ["ok", "ok"]
    assert second.json["cells"][0] == first.json["cells"][0]
    assert second.json["cells"][1]["reason"] is None
    assert len(work.take()[1]) == 1


def test_an_audit_is_run_when_it_is_asked_for(work: Work) -> None:
    none = evaluate("-m", CNN, "-a", "ifgsm", *QUICK)
    assert work.take()[2] == 0
    assert none["threats"][0]["unchecked"]
    quick = evaluate("-m", CNN, "-a", "ifgsm")
    assert (work.take()[1:], quick["threats"][0]["unchecked"]) == (([], 1), ["black-box-beats-white-box"])
    full = evaluate("-m", CNN, "-a", "ifgsm", "--audit", "full")
    assert work.take()[1:] == ([], 1)
    assert full["cells"] == none["cells"]
    evaluate("-m", CNN, "-a", "ifgsm")
    assert work.take() == (0, [], 0)  # a full audit answers for a quick one


def test_trained_weights_are_shared_between_output_folders(work: Work) -> None:
    one = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE, *QUICK, output="one")
    assert work.take()[0] == 2
    two = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE, *QUICK, output="two")
    assert work.take()[0] == 0
    assert without_times(two) == without_times(one)


def test_two_processes_share_one_weight_cache_and_train_once(folder: Path) -> None:
    command = ("eval", "-m", "py:usernets:Told#epochs=1", "-a", "fgsm", "--dataset", TINY, *QUICK, "--json")
    children = [nursery().start(folder / name, *command, ADVPLUG_CACHE=str(folder / "cache"), TOLD=str(folder / "told"))
                for name in ("one", "two") if (folder / name).mkdir() is None]  # fmt: skip
    ran = [child.wait() for child in children]
    assert [r.code for r in ran] == [0, 0], ran[0].err + ran[1].err
    one, two = (json.loads(r.out) for r in ran)
    assert without_times(one) == without_times(two)
    assert len(set((folder / "told").read_text().split())) == 1
    assert len([p for p in (folder / "cache" / "artifacts").iterdir() if not p.name.startswith(".")]) == 1
