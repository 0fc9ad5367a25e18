"""Everything that is registered conforms; a third-party distribution is installed, listed, checked and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from advplug import hooks
from advplug.parse import parse_reference
from advplug.registry import Entry, registry
from advplug.testing import check_attack, check_defense, check_plugin
from advplug.testing.attacks import attack_results
from advplug.testing.plugins import entry_results
from conftest import ROOT, advplug, python

REPRESENTATIVE = {"cnn", "cnn-a", "cnn-b", "resnet18", "file", "py", "torchvision"}
"""The models of a usual run; the rest of torchvision's classifiers are tried by `make test-slow`."""
HUGE = {"regnet_y_128gf", "vit_h_14"}
"""Over 600 million parameters: three copies do not fit beside the tests."""

SHORTER = {
    "attack 'apgd'": {"steps": 25},
    "attack 'apgd-t'": {"steps": 25},
    "attack 'autoattack'": {"steps": 25, "queries": 50},
    "attack 'fab-t'": {"steps": 25},
    "attack 'square'": {"queries": 100},
}
"""Parameters for a usual run; `make test-slow` takes the defaults."""


def entries() -> list[Any]:
    """The built-in ones; the tests of every other distribution run the kit over theirs."""
    found = []
    for kind in hooks.KINDS:
        for entry in registry().entries(kind):
            if entry.source.plugin != "builtin":
                continue
            marks = [] if kind != "model" or entry.name in REPRESENTATIVE else [pytest.mark.slow]
            if entry.name not in HUGE:
                found.append(pytest.param(entry, id=f"{kind}-{entry.name}", marks=marks))
    return found


@pytest.mark.parametrize("entry", entries())
def test_every_registration_conforms(entry: Entry) -> None:
    results = attack_results(entry.name, SHORTER[entry.label]) if entry.label in SHORTER else entry_results(entry)
    assert [r for r in results if r.ok is False] == []


@pytest.mark.slow
@pytest.mark.parametrize("label", SHORTER)
def test_long_attacks_conform_with_default_parameters(label: str) -> None:
    check_attack(label.split("'")[1])


def test_pruning_conforms_on_a_residual_net() -> None:
    results = check_defense("prune", on="resnet18")
    assert [r.ok for r in results if r.name == "tune"] == [True]


def test_every_plugin_lists_without_torch() -> None:
    for source in registry().sources:
        results = python("-c", "import sys, json; from advplug.testing.plugins import _find, _lists_without_torch;"
                         "from advplug.registry import registry; found = registry();"
                         "print(json.dumps(_lists_without_torch(found, _find(found, sys.argv[1])[0])))",
                         source.plugin)  # fmt: skip
        assert json.loads(results.stdout)[1] is True, results


def test_requirements_list_every_plugin_distribution() -> None:
    lines = [t for t in (ROOT / "requirements.txt").read_text().splitlines() if t and not t.startswith("#")]
    plugins = sorted(p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("plugins/*/pyproject.toml"))
    assert lines == ["-e .", *(f"-e {p}" for p in plugins)]


# --- the third-party distribution ------------------------------------------------------------------


def test_it_is_listed_with_its_parameters(example_site: Path) -> None:
    done = advplug("list", "--json", site=example_site)
    assert done.returncode == 0, done.stderr
    mine = [e for e in json.loads(done.stdout) if e["plugin"] == "advplug-example 0.3.0"]
    assert {kind: [e["name"] for e in mine if e["kind"] == kind] for kind in hooks.KINDS} == {
        "attack": ["example-noise", "example-transfer"],
        "defense": ["example-gaussian", "example-quantise", "example-smooth-labels", "example-thin"],
        "model": ["example-linear"],
        "dataset": ["example-bars"],
        "metric": ["example-weakest-class"],
        "tracker": ["example-count"],
    }
    assert all(e["summary"] and e["caps"] is not None for e in mine)
    described = advplug("info", "defense", "example-quantise", site=example_site)
    assert "bits a pixel keeps" in described.stdout


def test_it_conforms(example_site: Path) -> None:
    done = advplug("plugin", "check", "example", site=example_site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    lines = done.stdout.splitlines()
    assert "ok   example: lists without torch" in lines
    assert "ok   attack 'example-transfer': l2: flips nothing within the exact radius" in lines
    assert "ok   defense 'example-quantise': wrap: gradient as declared" in lines
    assert "ok   dataset 'example-bars': test images are not trained on" in lines


def test_it_runs(example_site: Path, tmp_path: Path) -> None:
    """One run with each of its parts, the attack that needs another victim included."""
    transfer = "example-transfer:from=(example-linear:epochs=10+example-smooth-labels),attack=(pgd:steps=3)"
    done = advplug("eval", "--dataset", "example-bars", "-m", "example-linear", "-a", "example-noise",
                   "-a", transfer, "-d", "example-quantise:bits=3", "-d", "example-gaussian", "-d",
                   "example-thin+example-smooth-labels", "-e", "1/5", "-n", "40", "--audit", "none", "--json", "-q",
                   "--track", f"example-count:file={tmp_path / 'counts'}",
                   "-o", str(tmp_path / "out"), site=example_site)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "counts").read_text() == "8 cells, result.json, report.html\n"
    cells = json.loads(done.stdout)["cells"]
    assert {c["status"] for c in cells} == {"ok"}
    assert len(cells) == 8
    assert {c["defense"] for c in cells} >= {"none", "example-quantise:bits=3", "example-gaussian"}
    for cell in cells:
        metrics = cell["metrics"]
        assert metrics["clean_accuracy"]["value"] >= 0.8
        assert metrics["weakest_class_accuracy"]["value"] <= metrics["robust_accuracy"]["value"] + 1e-9
    undefended = {c["attack"]: c["metrics"]["robust_accuracy"]["value"] for c in cells if c["defense"] == "none"}
    # Crafted on a twin by gradients, the transfer attack breaks more than a few random sign patterns.
    assert undefended[str(parse_reference(transfer))] < undefended["example-noise"]


def distribution(site: Path, name: str, module: str) -> Path:
    """An installed plugin of one module."""
    info = site / f"advplug_{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: advplug-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[advplug]\n{name} = advplug_{name}\n")
    (site / f"advplug_{name}.py").write_text(module)
    return site


def test_a_broken_plugin_hides_only_itself(tmp_path: Path) -> None:
    site = distribution(tmp_path, "bad", "raise RuntimeError('out of order')\n")
    unknown = advplug("plugin", "check", "baad", site=site)
    assert unknown.returncode == 2
    assert "no installed plugin is called 'baad'; did you mean 'bad'?" in unknown.stderr
    checked = advplug("plugin", "check", "bad", site=site)
    assert checked.returncode == 1
    assert "FAIL bad: loads: RuntimeError: out of order" in checked.stdout
    doctor = advplug("doctor", "--quick", site=site)
    assert doctor.returncode == 1
    assert "advplug-bad 1.0: RuntimeError: out of order" in doctor.stdout
    listed = advplug("list", "attacks", site=site)
    assert listed.returncode == 0
    assert "pgd" in listed.stdout
    assert "plugin 'bad' failed to load" in listed.stderr


def test_a_plugin_that_imports_torch_when_listed_is_named(tmp_path: Path) -> None:
    hook = "from advplug.hooks import hookimpl\n@hookimpl\ndef advplug_attacks():\n    return []\n"
    done = advplug("plugin", "check", "heavy", site=distribution(tmp_path, "heavy", "import torch\n" + hook))
    assert done.returncode == 1
    assert "FAIL heavy: lists without torch: listing imports torch" in done.stdout


def test_checks_return_results_and_take_parameters() -> None:
    results = check_attack("pgd", steps=12)
    assert {r.ok for r in results} <= {True, None}
    with pytest.raises(
        AssertionError, match=r"attack 'pgd' breaks its contract:\n  linf: flips beyond the exact radius"
    ):
        check_attack("pgd", steps=1, alpha="1/10000")


def test_check_plugin_counts_every_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advplug.testing.plugins.entry_results", lambda entry: [])
    assert [r.name for r in check_plugin("builtin")] == ["builtin: loads", "builtin: lists without torch"]
