"""What a matrix will cost, before it is run and against what it then took."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from advplug.contracts import DatasetCaps, DatasetInfo
from advplug.costs.forecast import audit_cost, cost_of, forecast, images_of
from advplug.matrix import Sweep
from advplug.plans import Bound
from advplug.registry import registry
from advplug.session import Request, certificates, execute, plan
from advplug.tables.plan import forecast_json, forecast_text, plan_rows
from cli_tools import CNN, TINY, run
from conftest import benchmark_module


def planned(attack: str, defense: str | None = None, *budgets: str, n: int | None = 100, **rest: Any) -> list[Sweep]:
    defenses = (defense,) if defense else ()
    return plan(Request(("cnn",), (attack,), defenses, budgets or ("8/255",), limit=n, **rest))


@pytest.mark.parametrize(
    ("attack", "forward", "backward"),
    [
        ("fgsm", 2, 1),
        ("ifgsm:steps=10", 11, 10),
        ("pgd:steps=20,restarts=2", 42, 40),
        ("square:queries=500", 500, 0),
        ("noise", 1, 0),
    ],
)
def test_the_most_passes_of_an_image(attack: str, forward: int, backward: int) -> None:
    """By hand: a pass at the start and one a step, back as often as there are steps, all of it for every restart."""
    from advplug.costs.forecast import effort_of

    (sweep,) = planned(attack)
    found = effort_of(sweep.attack, sweep.victim)
    assert (found.forward, found.backward, found.known) == (forward, backward, True)


def test_the_cost_of_a_sweep() -> None:
    (sweep,) = planned("ifgsm:steps=10", None, "4/255", "8/255")
    cost = cost_of(sweep)
    assert (cost.forward, cost.backward) == (11 * 100, 10 * 100)  # half of the most, at two budgets
    assert cost.decisions == 3 * 2 * 100
    assert cost.most == 2 * (11 + 10) * 100 + cost.decisions
    (patient,) = planned("ifgsm:steps=10,keep_going=true", None, "4/255", "8/255")
    assert cost_of(patient).forward == 2 * 11 * 100


def test_images() -> None:
    assert images_of(planned("fgsm", n=17)[0]) == 17
    assert images_of(planned("fgsm", n=None, datasets=(TINY,))[0]) == 20
    assert images_of(planned("fgsm", n=None)[0]) == 360


def test_more_images_than_there_are_are_not_counted() -> None:
    (sweep,) = planned("fgsm", n=5000, datasets=(TINY,))
    assert images_of(sweep) == 20
    assert cost_of(sweep) == cost_of(planned("fgsm", n=20, datasets=(TINY,))[0])
    (row,) = plan_rows([sweep], {})
    assert row["images"] == 20
    assert "fewer" not in forecast_text(forecast([sweep], [], {}, "none"), None)


def test_where_it_is_not_known_how_many_images_there_are_a_forecast_is_of_the_most() -> None:
    class Unsized:
        def info(self) -> DatasetInfo:
            return DatasetInfo(("a", "b"), 1, (8, 8), {"linf": Fraction(1, 10)}, evaluate=50)

        def fingerprint(self) -> str:
            return "photos"

    data = Bound("photos", {"object": "photos"}, DatasetCaps(), Unsized())
    (sweep,) = planned("fgsm", n=5000, datasets=(data,))
    assert images_of(sweep) == 5000
    told = "fewer, should there be fewer test images than are asked for: photos"
    assert told in forecast_text(forecast([sweep], [], {}, "none"), None).splitlines()
    (usual,) = planned("fgsm", n=None, datasets=(data,))
    assert "fewer" not in forecast_text(forecast([usual], [], {}, "none"), None)


@pytest.mark.parametrize(("attack", "twice"), [("ifgsm:steps=10", 2), ("square:queries=50", 1)])
def test_both_stand_ins_of_a_defense_without_a_gradient_are_attacked(attack: str, twice: int) -> None:
    from advplug.costs.forecast import effort_of

    plain, behind = planned(attack, "jpeg")
    once, found = (effort_of(sweep.attack, sweep.victim) for sweep in (plain, behind))
    assert (found.forward, found.backward) == (twice * once.forward, twice * once.backward)


def test_stand_ins_are_as_many_as_are_declared() -> None:
    from advplug.contracts import Gradient, Wrap
    from advplug.parse import parse_reference

    names = [name for name in registry().tables["defense"] if name != "denoise"]
    checked = 0
    for text in (*names, *(f"denoise:method={m}" for m in ("bilateral", "gaussian", "median", "nlm", "tv"))):
        entry = registry().get("defense", parse_reference(text).name)
        params = entry.bind(parse_reference(text))
        caps = entry.spec.caps_of(params)
        for wrap in (stage for stage in entry.make(params) if isinstance(stage, Wrap)):
            assert (wrap.gradient is Gradient.BPDA) == (caps.gradient is Gradient.BPDA), text
            assert caps.gradient is not Gradient.BPDA or (caps.stand_ins or 2) == max(1, len(wrap.surrogates)), text
            checked += 1
    assert checked > 15


def test_a_randomised_victim_costs_its_draws() -> None:
    plain, noisy = planned("ifgsm:steps=10", "dropout", baseline=True)
    assert cost_of(noisy).forward > 5 * cost_of(plain).forward


def test_what_does_not_tell_is_named_as_guessed() -> None:
    sweeps = [s for s in planned("deepfool") + planned("fgsm") if s.refused is None]
    known = {s.attack.label: cost_of(s).known for s in sweeps}
    guessed = [label for label, k in known.items() if not k]
    told = forecast_json(forecast(sweeps, [], {}, "none"), None)
    assert told["guessed"] == guessed
    assert "fgsm" not in guessed


def test_what_is_done_or_refused_costs_nothing() -> None:
    sweeps = planned("ifgsm", "jpeg", "4/255", "8/255")
    keys = [[s.cell_key(eps) for eps in s.budgets] for s in sweeps]
    everything = forecast(sweeps, [], {}, "quick").total.passes
    one = forecast(sweeps, [], dict.fromkeys(keys[0], "ok"), "quick").total.passes
    again = forecast(sweeps, [], dict.fromkeys(keys[0], "failed"), "quick").total.passes
    nothing = forecast(sweeps, [], dict.fromkeys(keys[0] + keys[1], "ok"), "quick")
    assert again == everything > one > 0
    assert nothing.total.passes == 0
    assert forecast_text(nothing, None) == "nothing is left to compute"


def test_an_audit_is_counted_once_a_threat() -> None:
    (sweep,) = planned("ifgsm")
    assert audit_cost(sweep.victim, "none", 100, 3).most == 0
    quick = audit_cost(sweep.victim, "quick", 100, 1)
    assert quick.most == 64 * 200
    assert audit_cost(sweep.victim, "quick", 10, 2).most == 2 * 10 * 200
    assert audit_cost(sweep.victim, "full", 100, 1).most == 100 * 200
    two = [*sweep_pair(), *planned("pgd")]
    with_audit, without = (forecast(two, [], {}, level).total.passes for level in ("quick", "none"))
    assert with_audit - without == quick.passes


def sweep_pair() -> list[Sweep]:
    return planned("ifgsm")


# --- against what it took ---

ATTACKS = [
    name for name, entry in registry().tables["attack"].items()
    if entry.source.distribution == "advplug" and name not in ("transfer", "autoattack", "fab-t", "square")
]  # fmt: skip
EARLY = ("deepfool", "spatial")
"""They stop at the first step that fools, which most often is one of the first."""


@pytest.mark.parametrize("attack", [*ATTACKS, "square:queries=200", f"transfer:from={CNN},attack=(pgd:steps=10)"])
def test_no_attack_takes_more_than_the_most(attack: str) -> None:
    request = Request((CNN,), (attack,), datasets=(TINY,), audit="none", output=None)
    sweeps = [s for s in plan(request) if s.refused is None]
    if not sweeps:
        pytest.skip("it is refused on this model")
    cost = forecast(sweeps, certificates(request, sweeps), {}, "none").total
    spent = execute(request, sweeps).run.passes
    assert 0 < spent <= cost.most
    if attack not in EARLY:
        assert cost.passes / 2 <= spent <= 2 * cost.passes


@pytest.mark.parametrize(
    ("attack", "defense"),
    [
        ("pgd:steps=5", "noise-vote:votes=2,draws=3"),
        ("autoattack:steps=3", "noise-vote:votes=2,draws=20"),
        ("eot-pgd:steps=5,draws=20", "noise-vote:votes=2,draws=20"),
        ("eot-pgd:steps=5,draws=20", "dropout:draws=6"),
        ("square:queries=100", "noise-vote:votes=2,draws=20"),
        ("square:queries=100", "dropout:draws=6"),
    ],
)
def test_no_attack_on_a_randomised_victim_takes_more_than_the_most(attack: str, defense: str) -> None:
    """A pass through a vote is one of several copies, however many an attack draws by itself."""
    request = Request((CNN,), (attack,), (defense,), baseline=False, datasets=(TINY,), audit="none", output=None)
    sweeps = plan(request)
    cost = forecast(sweeps, [], {}, "none").total
    spent = execute(request, sweeps).run.passes
    assert cost.most / 6 < spent <= cost.most


def test_a_dry_run_says_what_is_done_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.yaml").write_text(f"datasets: '{TINY}'\nmodels: {CNN}\nattacks: [fgsm, 'ifgsm:steps=4']\naudit: none\n")
    before = run("run", "m.yaml", "-o", "out", "--dry-run", "--json").json
    assert [c["state"] for c in before["cells"]] == ["to do", "to do"]
    assert not Path("out").exists()
    assert run("run", "m.yaml", "-o", "out", "-a", "fgsm", "-q").code == 0
    after = run("run", "m.yaml", "-o", "out", "--dry-run", "--json").json
    assert [c["state"] for c in after["cells"]] == ["done", "to do"]
    assert 0 < after["forecast"]["passes"] < before["forecast"]["passes"]
    assert run("run", "m.yaml", "-o", "out", "-q").code == 0
    text = run("run", "m.yaml", "-o", "out", "--dry-run").out
    assert "2 cells, 0 to compute" in text
    assert text.endswith("nothing is left to compute\n")
    fresh = run("run", "m.yaml", "-o", "out", "--fresh", "--dry-run", "--json").json
    assert fresh["forecast"] == before["forecast"]


def test_seconds_of_trainings_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    text = f"datasets: '{TINY}'\nmodels: {CNN}\ndefenses: 'prune:epochs=1'\nattacks: fgsm\naudit: none\n"
    Path("m.yaml").write_text(text)
    cold = run("run", "m.yaml", "-o", "out", "--dry-run", "--calibrate", "--json").json["forecast"]
    assert cold["trainings"] == 2
    assert cold["seconds"]["passes"] > 0
    assert cold["not_timed"] == []
    assert not (tmp_path / "cache" / "artifacts").exists() or not list((tmp_path / "cache" / "artifacts").glob("[!.]*"))
    assert run("run", "m.yaml", "-o", "out", "-q").code == 0
    warm = run("run", "m.yaml", "-o", "out", "--fresh", "--dry-run", "--calibrate", "--json").json["forecast"]
    assert warm["trainings"] == 0
    assert warm["seconds"]["training"] == 0
    shown = run("run", "m.yaml", "-o", "new", "--dry-run", "--calibrate").out.splitlines()[-1]
    assert shown.startswith("forecast: about ")
    assert " here" in shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_matrix_costs_what_was_forecast(tmp_path: Path) -> None:
    """Passes, and seconds of CPU, within a factor 2."""
    with benchmark_module("forecast") as module:
        found = module.measured(tmp_path)
    assert 0.5 <= found["passes"]["ratio"] <= 2
    assert 0.5 <= found["seconds"]["ratio"] <= 2
