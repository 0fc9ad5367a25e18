"""A matrix file to its cells: what is crossed, left out, added and overridden, and what a dry run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from advplug.errors import UsageError
from advplug.session import Request
from advplug.studies.plan import Flags, Planned, plan_file, spec_of, spec_text
from cli_tools import CNN, TINY, run
from conftest import ROOT, python

Cells = set[tuple[str, str, str, str, int]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(text: str, flags: Flags | None = None, name: str = "m.yaml") -> Planned:
    Path(name).write_text(text)
    return plan_file(Path(name), Request(models=()), flags=flags)


def cells(planned: Planned) -> Cells:
    """(model, defense, attack, budget, seed) of every cell."""
    return {
        (s.victim.model.label, s.victim.defense_label, s.attack.label, str(eps), s.victim.seed)
        for s in planned.sweeps
        for eps in s.budgets
    }


def test_axes_are_crossed_and_the_undefended_model_stands_beside() -> None:
    found = cells(
        plan("models: [cnn, resnet18]\ndefenses: jpeg\nattacks: [fgsm, pgd]\neps: [1/255, 2/255]\nseeds: [0, 3]\n")
    )
    assert found == {
        (m, d, a, e, s)
        for m in ("cnn", "resnet18") for d in ("none", "jpeg") for a in ("fgsm", "pgd")
        for e in ("1/255", "2/255") for s in (0, 3)
    }  # fmt: skip


def test_without_the_baseline() -> None:
    found = plan("models: cnn\ndefenses: [jpeg, prune]\nattacks: fgsm\nbaseline: no\n")
    assert {d for _, d, *_ in cells(found)} == {"jpeg", "prune"}


def test_what_is_left_out_has_its_customary_value() -> None:
    assert cells(plan("models: cnn\n")) == {("cnn", "none", "autoattack", "1/10", 0)}


BASE = "models: [cnn, resnet18]\ndefenses: [jpeg, jpeg+prune]\nattacks: [fgsm, 'pgd:steps=40']\neps: [1/255, 2/255]\n"


@pytest.mark.parametrize(
    ("entry", "gone"),
    [
        ("model: resnet18", lambda m, d, a, e: m == "resnet18"),
        ("attack: pgd", lambda m, d, a, e: a == "pgd:steps=40"),
        ("attack: 'pgd:steps=40'", lambda m, d, a, e: a == "pgd:steps=40"),
        ("attack: {pgd: {steps: 40}}", None),
        ("attack: 'pgd:steps=4'", lambda m, d, a, e: False),
        ("attack: 'pgd:*'", lambda m, d, a, e: a == "pgd:steps=40"),
        ("attack: '?gsm'", lambda m, d, a, e: a == "fgsm"),
        ("defense: jpeg", lambda m, d, a, e: d == "jpeg"),
        ("defense: 'jpeg+*'", lambda m, d, a, e: d == "jpeg+prune"),
        ("defense: none", lambda m, d, a, e: d == "none"),
        ("defense: [none, 'jpeg+prune']", lambda m, d, a, e: d != "jpeg"),
        ("eps: 2/255", lambda m, d, a, e: e == "2/255"),
        ("eps: 'l2:2/255'", lambda m, d, a, e: False),
        ("{model: resnet18, attack: fgsm, eps: 4/510}", lambda m, d, a, e: (m, a, e) == ("resnet18", "fgsm", "2/255")),
        ("{dataset: digits, seed: 0, model: 'c*'}", lambda m, d, a, e: m == "cnn"),
        ("{seed: 1}", lambda m, d, a, e: False),
    ],
)
def test_exclude(entry: str, gone: Any) -> None:
    everything = cells(plan(BASE))
    text = f"{BASE}exclude:\n- {entry}\n"
    if gone is None:
        with pytest.raises(UsageError, match=r"m\.yaml:6: "):
            plan(text)
        return
    left = plan(text)
    assert cells(left) == {cell for cell in everything if not gone(*cell[:4])}
    nothing = "m.yaml:6: this excludes nothing"
    assert left.notes == (() if cells(left) != everything else (nothing,))


def test_an_attack_with_a_threat_is_excluded_with_it() -> None:
    """By its name, or as it is written; the attack itself under another threat stays."""
    text = "models: [cnn, resnet18]\nvariants: {far: 'pgd:eps=1/5', third: 'fgsm:target=3'}\n"
    text += "attacks: [pgd, far, fgsm, third]\neps: 1/10\nexclude:\n- {model: cnn, attack: [far, third]}\n"
    planned = plan(text)
    assert planned.notes == ()
    left = [(s.attack.label, str(s.goal), str(s.budgets[0])) for s in planned.sweeps if s.victim.model.label == "cnn"]
    assert left == [("pgd", "untargeted", "1/10"), ("fgsm", "untargeted", "1/10")]
    assert len(planned.sweeps) == 2 + 4
    assert len(plan(text.replace("[far, third]", "'fgsm:target=3'")).sweeps) == 3 + 4
    assert len(plan(text.replace("[far, third]", "'fgsm:target=4'")).sweeps) == 8


def test_an_excluded_budget_leaves_the_others_of_its_sweep() -> None:
    (sweep,) = plan("models: cnn\nattacks: pgd\neps: [1/255, 2/255, 3/255]\nexclude: {eps: 2/255}\n").sweeps
    assert list(map(str, sweep.budgets)) == ["1/255", "1/85"]


def test_include_adds_blocks_that_take_the_rest_from_the_file() -> None:
    text = "models: cnn\nattacks: fgsm\neps: 1/255\ninclude:\n- {attacks: pgd, eps: [2/255, 1/255]}\n"
    text += "- {models: resnet18}\n"
    assert cells(plan(text)) == {
        ("cnn", "none", "fgsm", "1/255", 0),
        ("cnn", "none", "pgd", "1/255", 0),
        ("cnn", "none", "pgd", "2/255", 0),
        ("resnet18", "none", "fgsm", "1/255", 0),
    }


def test_what_is_excluded_can_be_included_again() -> None:
    text = (
        "models: cnn\nattacks: [fgsm, pgd]\neps: 1/255\nexclude: {attack: pgd}\ninclude: {attacks: pgd, eps: 2/255}\n"
    )
    assert {(a, e) for _, _, a, e, _ in cells(plan(text))} == {("fgsm", "1/255"), ("pgd", "2/255")}


def test_a_file_of_blocks_only() -> None:
    found = cells(plan("attacks: fgsm\ninclude:\n- models: cnn\n- {models: resnet18, attacks: pgd}\n"))
    assert {(m, a) for m, _, a, *_ in found} == {("cnn", "fgsm"), ("resnet18", "pgd")}


def test_the_same_cell_is_there_once_and_a_victims_sweeps_stand_together() -> None:
    text = "models: [cnn, resnet18]\nattacks: fgsm\ninclude:\n- {models: cnn, attacks: [fgsm, pgd]}\n"
    text += "- {models: resnet18}\n"
    sweeps = plan(text).sweeps
    assert [(s.victim.model.label, s.attack.label) for s in sweeps] == [
        ("cnn", "fgsm"),
        ("cnn", "pgd"),
        ("resnet18", "fgsm"),
    ]


def test_a_cell_that_is_included_again_with_other_budgets_is_there_once() -> None:
    text = "models: cnn\nattacks: [fgsm, pgd]\neps: [1/255, 2/255, 3/255]\ninclude:\n- {attacks: pgd, eps: 3/255}\n"
    assert [len(s.budgets) for s in plan(text).sweeps] == [3, 3]
    assert run("run", "m.yaml", "--dry-run").out.startswith("6 cells, ")
    # Overlapping budgets are one sweep, in which each starts from the smaller ones.
    plan("models: cnn\nattacks: pgd\neps: [1/255, 2/255]\ninclude:\n- {eps: [1/255, 3/255]}\n")
    rows = run("run", "m.yaml", "--dry-run", "--json").json["cells"]
    assert [r["eps"] for r in rows] == ["1/255", "2/255", "1/85"]


def test_images_that_static_attacks_want_are_those_of_the_whole_curve() -> None:
    text = "models: cnn\nattacks: pgd\neps: [1/255, 3/255]\ninclude:\n- {defenses: jpeg, eps: 3/255}\n"
    sweeps = plan(text).sweeps
    assert [(s.victim.defense_label, len(s.budgets)) for s in sweeps] == [("none", 2), ("jpeg", 1)]
    assert sweeps[1].baseline is not None
    assert sweeps[1].baseline.key == sweeps[0].key
    both = text.replace("attacks: pgd\n", "attacks: pgd\ndefenses: jpeg\n")
    assert [len(s.budgets) for s in plan(both).sweeps] == [2, 2]
    alone = plan("models: cnn\nattacks: pgd\neps: 3/255\ndefenses: jpeg\n").sweeps[1]
    assert alone.cell_key(alone.budgets[0]) != sweeps[1].cell_key(alone.budgets[0])
    excluded = plan(both.split("include")[0] + "exclude: {defense: jpeg, eps: 3/255}\n").sweeps
    assert excluded[1].baseline is not None
    assert excluded[1].baseline.key == excluded[0].key


def test_the_undefended_model_is_attacked_once_at_each_budget_of_overlapping_blocks() -> None:
    text = f"datasets: '{TINY}'\nmodels: {CNN}\ndefenses: jpeg\nattacks: pgd:steps=2\neps: [1/20, 1/10]\naudit: none\n"
    text += "include:\n- {defenses: bit-depth, eps: [1/10, 1/5]}\n- {defenses: prune, eps: 1/5}\n"
    planned = plan(text)
    assert [(s.victim.defense_label, [str(e) for e in s.budgets]) for s in planned.sweeps] == [
        ("none", ["1/20", "1/10", "1/5"]),
        ("jpeg", ["1/20", "1/10"]),
        ("bit-depth", ["1/10", "1/5"]),
        ("prune", ["1/5"]),
    ]
    ran = run("run", "m.yaml", "-o", "out", "-q", "--json")
    assert ran.code == 0, ran.err
    made = ran.json["cells"]
    assert len({(c["defense"], c["eps"]) for c in made}) == len(made) == 8
    static = {c["defense"]: c["metrics"]["static_robust_accuracy"] for c in made}
    assert static.pop("none") is None
    assert None not in static.values()
    assert {threat["attacks"] == ["pgd:steps=2"] for threat in ran.json["threats"]} == {True}


def test_variants_are_the_references_they_name() -> None:
    text = "variants: {weak: 'cnn:epochs=1', hard: 'pgd:steps=9'}\nmodels: weak\nattacks: hard\n"
    assert {(m, a) for m, _, a, *_ in cells(plan(text))} == {("cnn:epochs=1", "pgd:steps=9")}


def test_variants_stand_in_what_is_excluded_too_in_stacks_and_beside_patterns() -> None:
    text = "variants: {squash: 'jpeg:quality=50'}\nmodels: cnn\nattacks: fgsm\ndefenses: [squash, squash+prune]\n"
    for pattern, left in (("squash+prune", {"none", "jpeg:quality=50"}), ("squash+*", {"none", "jpeg:quality=50"}),
                          ("squash", {"none", "jpeg:quality=50+prune"})):  # fmt: skip
        assert {d for _, d, *_ in cells(plan(f"{text}exclude: {{defense: '{pattern}'}}\n"))} == left


# --- flags ---


def test_flags_take_the_place_of_keys_everywhere() -> None:
    text = "models: cnn\nattacks: fgsm\nn: 5\nseeds: 4\ninclude:\n- {attacks: pgd, models: resnet18, seeds: 7}\n"
    found = plan(text, Flags({"models": ("cnn-a",), "seeds": (2,), "eps": ("1/255",)}, n=9, audit="none"))
    assert cells(found) == {("cnn-a", "none", "fgsm", "1/255", 2), ("cnn-a", "none", "pgd", "1/255", 2)}
    assert {s.limit for s in found.sweeps} == {9}
    assert found.request.audit == "none"


def test_a_flag_in_place_of_what_is_wrong_in_the_file() -> None:
    assert cells(plan("models: cnn\nattacks: zzz\n", Flags({"attacks": ("fgsm",)})))
    with pytest.raises(UsageError, match=r"m\.yaml:2: no attack is called 'zzz'"):
        plan("models: cnn\nattacks: zzz\n", Flags({"models": ("resnet18",)}))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (Flags({"eps": ("8",)}), "eps '8': pixels lie in"),
        (Flags({"eps": ("far",)}), "eps 'far' is not a number"),
        (Flags({"models": ("cnnn",)}), "no model is called 'cnnn'; did you mean 'cnn'?"),
        (Flags({"defenses": ("jpeg+squahs",)}), "no defense is called 'squahs'; did you mean the variant 'squash'?"),
        (Flags({"attacks": ("fgsm:foo=1",)}), "attack 'fgsm' has no parameter 'foo'"),
        (Flags({"attacks": ("fgsm:target=99",)}), "fgsm:target=99: target 99 is no class"),
        (Flags({"seeds": (-1,)}), "--seed must be"),
        (Flags(n=0), "-n must be"),
    ],
)
@pytest.mark.parametrize("more", ["", "include: {models: resnet18, attacks: pgd}\n"])
def test_what_is_wrong_with_a_flag_is_not_said_of_the_file(flags: Flags, told: str, more: str) -> None:
    text = "variants: {squash: jpeg}\nmodels: cnn\nattacks: fgsm\neps: 1/255\n"
    with pytest.raises(UsageError) as error:
        plan(text + more, flags)
    assert str(error.value).startswith(told)


def test_an_entry_for_what_a_flag_replaced_need_exclude_nothing() -> None:
    text = "models: cnn\ndefenses: jpeg\nattacks: [fgsm, pgd]\nexclude:\n- {attack: pgd}\n- {defense: none, seed: 0}\n"
    assert plan(text).notes == ()
    for flags in ({"attacks": ("fgsm",)}, {"attacks": ("fgsm",), "seeds": (1,)}):
        assert plan(text, Flags(flags)).notes == ()
    assert plan(text, Flags(baseline=False)).notes == ()
    nothing = text.replace("attack: pgd", "attack: noise")
    assert plan(nothing, Flags({"models": ("cnn-a",)})).notes == ("m.yaml:5: this excludes nothing",)


def test_flags_on_the_command_line() -> None:
    Path("m.yaml").write_text("models: resnet18\ndefenses: jpeg\nattacks: pgd\nn: 7\n")
    flags = ("-m", CNN, "-d", "prune", "-a", "fgsm", "-a", "noise", "-e", "1/255", "-n", "6", "--seed", "5",
             "--dataset", TINY, "--no-baseline")  # fmt: skip
    rows = run("run", "m.yaml", *flags, "--dry-run", "--json").json["cells"]
    assert [(c["attack"], c["defense"], c["model"], c["eps"], c["images"], c["seed"]) for c in rows] == [
        (a, "prune", CNN, "1/255", 6, 5) for a in ("fgsm", "noise")
    ]
    assert {c["dataset"] for c in rows} == {TINY}
    baselines = run("run", "m.yaml", "--baseline", "--dry-run", "--json").json["cells"]
    assert [c["defense"] for c in baselines] == ["none", "jpeg"]


# --- spec.yaml ---


def test_the_spec_reads_back_as_the_same_matrix() -> None:
    text = """
title: a study
variants: {hard: 'pgd:steps=9'}
models: [cnn, resnet18]
defenses: [jpeg+prune, none]
attacks: [hard, 'transfer:from=(cnn+jpeg),attack=(pgd:steps=3)']
eps: [8/255, 1e-3, l2:0.5]
seeds: [3, 1]
n: 12
exclude: [{attack: hard, eps: 8/255}, {model: cnn, seed: 1}]
include: {models: cnn-a, attacks: fgsm}
baseline: no
audit: full
certify: no
"""
    first = plan(text)
    again = plan(spec_text(first.matrix, "advplug run\nm.yaml"), name="spec.yaml")
    assert cells(again) == cells(first)
    assert [s.key for s in again.sweeps] == [s.key for s in first.sweeps]
    assert again.request == first.request
    assert Path("spec.yaml").read_text().startswith("# advplug run m.yaml\ntitle: a study\n")


def test_an_evaluation_has_a_spec_too() -> None:
    request = Request(
        ("cnn",), ("fgsm",), ("jpeg",), ("8/255",), ("digits",), 20, (1,), audit="none", command="advplug x"
    )
    text = spec_of(request)
    assert text is not None
    assert yaml.safe_load(text)["attacks"] == ["fgsm"]
    found = plan(text)
    assert cells(found) == {("cnn", d, "fgsm", "8/255", 1) for d in ("none", "jpeg")}
    assert (found.request.audit, found.request.limit) == ("none", 20)


# --- the dry run ---


def test_a_dry_run_imports_no_torch() -> None:
    code = (
        "import sys; from advplug import cli\n"
        f"sys.argv = ['advplug', 'run', {str(ROOT / 'recipes' / 'demo.yaml')!r}, '--dry-run']\n"
        "try: cli.main()\n"
        "finally: print(sorted(m for m in ('torch', 'sklearn', 'pandas') if m in sys.modules), file=sys.stderr)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "24 cells, 24 to compute" in done.stdout
    assert "forecast: about " in done.stdout


def test_a_dry_run_shows_refused_cells_with_reasons() -> None:
    text = f"title: what goes\ndatasets: '{TINY}'\nmodels: cnn\nattacks: ifgsm\neps: [8/255, 'l1:2']\n"
    Path("m.yaml").write_text(text)
    text = run("run", "m.yaml", "--dry-run").out
    rows = run("run", "m.yaml", "--dry-run", "--json").json
    assert text.startswith("what goes\n\n2 cells, 1 to compute\n")
    assert [(c["norm"], c["state"], c["reason"] is None) for c in rows["cells"]] == [
        ("linf", "to do", True),
        ("l1", "refused", False),
    ]
    assert "refused: ifgsm on cnn (none): ifgsm has no l1 version; it works in l2, linf" in text
    assert not list(Path().glob("advplug-results*"))
    assert set(rows["forecast"]) == {"passes", "most_passes", "guessed"}


def test_calibrate_goes_with_a_dry_run() -> None:
    Path("m.yaml").write_text("models: cnn\n")
    ran = run("run", "m.yaml", "--calibrate")
    assert (ran.code, ran.out) == (2, "")
    assert "--calibrate goes with --dry-run" in ran.err


def test_a_file_of_ones_own_is_never_overwritten() -> None:
    """One that is called as the spec that a run writes into its folder."""
    text = f"# by hand\ndatasets: '{TINY}'\nmodels: {CNN}\nattacks: fgsm\naudit: none\n"
    Path("spec.yaml").write_text(text)
    ran = run("run", "spec.yaml", "-o", ".")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "Error: the run would overwrite spec.yaml with its own; rename your file, or choose another -o\n"
    )
    ran = run("run", "spec.yaml", "-q")
    assert ran.code == 0, ran.err
    assert Path("spec.yaml").read_text() == text
    assert Path("advplug-results/spec/spec.yaml").is_file()
