"""`advplug eval` from end to end on tiny data: the matrix, its JSON, the verdicts, what must not change a result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from advplug import session, work
from advplug.evidence import Evidence
from advplug.registry import Registry, Source, load
from cli_tools import CNN, QUICK, TINY, evaluate, run, stored, without_times
from conftest import ROOT
from usernets import Linear

PRUNE = "prune:epochs=1"
LINEAR = "py:usernets:Linear#weights=linear.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(Linear().state_dict(), "linear.safetensors")
    return tmp_path


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attacks that are run, as they are run."""
    seen: list[str] = []
    real = work.run_sweep

    def counted(sweep: Any, *rest: Any) -> Any:
        seen.append(f"{sweep.victim.model.label} {sweep.victim.defense_label} {sweep.attack.label}")
        return real(sweep, *rest)

    monkeypatch.setattr(work, "run_sweep", counted)
    return seen


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The third-party plugin of the tests beside the built-ins."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugin_package" / "src")
    import advplug_example

    source = Source("example", "advplug-example", "0")
    known = load([(source, SimpleNamespace(load=lambda: advplug_example))])
    assert known.broken == ()
    monkeypatch.setattr(session, "registry", lambda: known)
    yield known
    for name in [n for n in sys.modules if n.startswith("advplug_example")]:
        del sys.modules[name]


def names(result: Any, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(cell[c] for c in columns) for cell in result["cells"]]


MATRIX = ("-m", CNN, "-m", "cnn-a:epochs=1", "-a", "fgsm", "-a", "pgd:steps=5", "-d", PRUNE, "-d", "none",
          "-e", "8/255", "-e", "1/512")  # fmt: skip
TWO = "fake:n=20,train=40,size=16,channels=1,classes=4"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return evaluate(*MATRIX, output=tmp_path_factory.mktemp("matrix"), dataset=TWO)


def test_every_axis_meets_every_other(matrix: Any) -> None:
    assert names(matrix, "model", "defense", "attack", "eps") == [
        (m, d, a, e)
        for m in (CNN, "cnn-a:epochs=1")
        for d in ("none", PRUNE)
        for a in ("fgsm", "pgd:steps=5")
        for e in ("1/512", "8/255")
    ]
    assert {c["status"] for c in matrix["cells"]} == {"ok"}
    assert len({c["key"] for c in matrix["cells"]}) == 16
    assert len(matrix["threats"]) == 8
    assert all(t["attacks"] == ["fgsm", "pgd:steps=5"] for t in matrix["threats"])


def test_the_json_keeps_to_its_schema(matrix: Any) -> None:
    schema = run("schema").json
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(matrix)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**matrix, "cells": [{**matrix["cells"][0], "status": "well"}]})


def test_the_json_says_what_the_run_depends_on(matrix: Any) -> None:
    assert list(matrix) == ["schema", "run", "cells", "threats", "certificates", "poisonings"]
    assert matrix["schema"] == 1
    info = matrix["run"]
    assert {"advplug", "python", "torch", "torchvision", "numpy"} <= info["versions"].keys()
    assert (info["seed"], info["device"]) == (0, "cpu")
    assert info["command"].startswith("advplug eval --dataset fake:n=20")
    for cell in matrix["cells"]:
        told = cell["provenance"]
        assert told["images"]["n"] == 20
        assert len(told["images"]["indices_sha256"]) == len(told["weights_sha256"]) == 64
        assert told["dataset"]["fingerprint"]
        assert told["attack"]["params"]["loss"] == "ce"
        assert cell["passes"]["forward"] >= cell["passes"]["backward"] > 0
    pruned = [c for c in matrix["cells"] if c["defense"] == PRUNE]
    for cell in pruned:
        facts = cell["provenance"]["facts"][PRUNE]
        assert facts["parameters_after"] < facts["parameters_before"]
    assert all(c["provenance"]["facts"] == {} for c in matrix["cells"] if c["defense"] == "none")


def test_what_does_not_apply_is_null_and_never_zero(matrix: Any) -> None:
    for cell in matrix["cells"]:
        metrics = cell["metrics"]
        defended, small = cell["defense"] != "none", cell["eps"] == "1/512"
        assert (metrics["static_robust_accuracy"] is None) == (not defended)
        assert (metrics["robust_accuracy_8bit"] is None) == small
        assert metrics["bare_robust_accuracy"] is None  # there is no wrap
        for name in ("clean_accuracy", "robust_accuracy", "adaptive_robust_accuracy", "attack_success_rate"):
            found = metrics[name]
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
            assert found["n"] <= 20
        assert metrics["robust_accuracy"]["value"] <= metrics["clean_accuracy"]["value"]
        broken = metrics["attack_success_rate"]["value"] > 0
        assert (metrics["l2_median"] is not None) == (metrics["linf_median"] is not None)
        assert broken or metrics["l2_median"] is None
    for threat in matrix["threats"]:
        assert (threat["difference_to_baseline"] is None) == (threat["defense"] == "none")


def test_the_worst_case_is_no_better_than_any_attack(matrix: Any) -> None:
    for threat in matrix["threats"]:
        mine = [c for c in matrix["cells"]
                if all(c[k] == threat[k] for k in ("model", "defense", "norm", "eps"))]  # fmt: skip
        assert len(mine) == 2
        worst = threat["worst_case_accuracy"]["value"]
        assert worst <= min(c["metrics"]["robust_accuracy"]["value"] for c in mine)
        for cell in mine:
            origins = [cell["metrics"][f"{k}_robust_accuracy"] for k in ("static", "adaptive")]
            known = [o["value"] for o in origins if o is not None]
            assert cell["metrics"]["robust_accuracy"]["value"] <= min(known)


def test_the_text_shows_baseline_and_defense_side_by_side() -> None:
    ran = run("eval", "--dataset", TWO, "-m", CNN, "-a", "fgsm", "-d", PRUNE, "-o", "out")
    assert ran.code == 0
    head = next(line for line in ran.out.splitlines() if "clean %" in line)
    for column in ("defense", "static %", "adaptive %", "robust % [95 %]", "8-bit %", "success %", "status"):
        assert column in head
    assert "against undefended" in ran.out
    assert "parameters before" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines() if " fgsm " in line][:2] == ["none", PRUNE]
    assert ran.err == "kept in out: the same command again computes only what is missing\n"
    assert run("eval", "--dataset", TWO, "-m", CNN, "-a", "fgsm", "-q", "-o", "out").err == ""
    again = run("eval", "--dataset", TWO, "-m", CNN, "-a", "fgsm", "-d", PRUNE, "-o", "out")
    assert again.err == "kept in out: nothing was computed, all was there; --fresh computes it anew\n"
    assert again.out == ran.out


def test_json_is_all_there_is_on_standard_output() -> None:
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-a", "fgsm", "--json", "-v", "-o", "out")
    assert ran.out.startswith("{")
    assert ran.json["cells"][0]["status"] == "ok"
    assert "NaN" not in ran.out


def test_without_the_baseline(sweeps: list[str]) -> None:
    result = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE, "--no-baseline", *QUICK)
    assert names(result, "defense") == [(PRUNE,)]
    assert result["cells"][0]["metrics"]["static_robust_accuracy"] is None
    assert result["threats"][0]["difference_to_baseline"] is None
    assert sweeps == [f"{CNN} {PRUNE} fgsm"]


def test_static_images_are_those_of_the_baseline() -> None:
    """Against itself under another name, static and adaptive are the same attack."""
    result = evaluate("-m", CNN, "-a", "fgsm", "-d", f"{PRUNE}", *QUICK)
    base, pruned = result["cells"]
    assert not list(Path("out/crafted").glob("*"))  # they are dropped once nothing needs them
    alone = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE, "--no-baseline", *QUICK, output="alone")["cells"][0]
    assert pruned["metrics"]["adaptive_robust_accuracy"] == alone["metrics"]["adaptive_robust_accuracy"]
    # The baseline's cell may have been computed by an earlier run, without keeping its images.
    evaluate("-m", CNN, "-a", "fgsm", *QUICK, output="later")
    later = evaluate("-m", CNN, "-a", "fgsm", "-d", PRUNE, *QUICK, output="later")["cells"]
    assert [c["metrics"] for c in later] == [base["metrics"], pruned["metrics"]]


# --- verdicts --------------------------------------------------------------------------------------

EASY = "fake:n=40,train=400,size=8,channels=1,classes=4"
TRAINED = "cnn:epochs=2"


def test_the_standard_protocol_reaches_trusted() -> None:
    result = evaluate("-m", TRAINED, "-e", "20/255", dataset=EASY)
    (threat,) = result["threats"]
    assert threat["attacks"] == ["autoattack"]
    assert threat["verdict"] == "trusted", threat
    assert (threat["flags"], threat["unchecked"]) == ([], [])


def test_one_weak_attack_is_an_upper_bound() -> None:
    result = evaluate("-m", TRAINED, "-a", "ifgsm", "-e", "20/255", dataset=EASY)
    (threat,) = result["threats"]
    assert threat["verdict"] == "upper bound"
    assert (threat["flags"], threat["unchecked"]) == ([], ["black-box-beats-white-box"])
    ran = run("eval", "--dataset", EASY, "-m", TRAINED, "-a", "ifgsm", "-e", "20/255", "-o", "out")
    assert "upper bound: cnn:epochs=2 (none), linf 4/51: a stronger attack may break more" in ran.out


def test_without_the_audit_nothing_is_trusted() -> None:
    result = evaluate("-m", TRAINED, "-a", "apgd:steps=10", "-e", "20/255", *QUICK, dataset=EASY)
    (threat,) = result["threats"]
    assert threat["verdict"] == "upper bound"
    assert "batch-dependent" in threat["unchecked"]


# --- what must not change a result -----------------------------------------------------------------


def evidence(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Per image, what was observed in each cell."""
    rows = {k: Evidence.from_bytes(v[2]) for k, v in stored(folder).items() if v[2]}
    return {k: {n: v.tolist() if hasattr(v, "tolist") else v for n, v in vars(e).items()} for k, e in rows.items()}


EXACT = ("-m", LINEAR, "-a", "pgd:steps=5,restarts=2", "-a", "apgd:steps=10", "-a", "mifgsm", "-a", "noise:draws=3",
         "-a", "pgd:steps=5,target=random", "-e", "1/255", "-e", "3/255")  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A float64 linear model under several attacks."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_file(Linear().state_dict(), "linear.safetensors")
        evaluate(*EXACT)
        return evidence("out")


@pytest.mark.parametrize("size", ["1", "7", "19"])
def test_batch_size_changes_nothing(reference: dict[str, dict[str, Any]], size: str) -> None:
    evaluate(*EXACT, "--batch-size", size)
    assert evidence("out") == reference
    assert any(0 < sum(map(sum, e["adaptive"])) < sum(e["attacked"]) for e in reference.values())


def test_the_order_of_cells_changes_nothing(reference: dict[str, dict[str, Any]]) -> None:
    pairs = list(zip(EXACT[::2], EXACT[1::2], strict=True))
    evaluate(*(word for pair in reversed(pairs) for word in pair))
    assert evidence("out") == reference


def test_a_cell_alone_is_the_cell_in_the_matrix(reference: dict[str, dict[str, Any]]) -> None:
    evaluate("-m", LINEAR, "-a", "apgd:steps=10", "-e", "1/255", "-e", "3/255")
    alone = evidence("out")
    assert len(alone) == 2
    assert alone == {k: reference[k] for k in alone}


def test_the_same_seed_repeats_a_run_from_scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("-m", CNN, "-a", "pgd:steps=5,precision=float32", "-d", PRUNE, *QUICK)
    first = evaluate(*arguments, output="first")
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    torch.rand(3)  # the caller's own draws are no part of the seed
    assert without_times(evaluate(*arguments, output="again")) == without_times(first)
    other = evaluate(*arguments, "--seed", "1", output="other")
    weights = {c["provenance"]["weights_sha256"] for c in (*first["cells"], *other["cells"])}
    assert len(weights) == 4
    assert not {c["key"] for c in first["cells"]} & {c["key"] for c in other["cells"]}


def test_another_seed_draws_other_starts() -> None:
    attack = ("-m", LINEAR, "-a", "pgd:steps=2", "-e", "2/255", *QUICK)
    first, second = (evaluate(*attack, "--seed", seed)["cells"][0] for seed in "01")
    assert first["provenance"]["weights_sha256"] == second["provenance"]["weights_sha256"]
    one, other = evidence("out").values()
    assert one["l2"] != other["l2"]


def test_running_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = "py:usernets:Greedy#weights=linear.safetensors"
    arguments = ("-m", model, "-a", "fgsm", "-a", "pgd:steps=3", "-e", "2/255", "--batch-size", "20")
    monkeypatch.setenv("GREEDY", "1000")
    roomy = evaluate(*arguments, output="roomy")
    Path("sizes").unlink()
    monkeypatch.setenv("GREEDY", "5")
    tight = evaluate(*arguments, output="tight")
    assert evidence("tight") == evidence("roomy")
    assert roomy["cells"][0]["notes"] == []
    wanted = ["out of memory: batch size halved to 10", "out of memory: batch size halved to 5"]
    assert tight["cells"][0]["notes"] == wanted
    assert [t["verdict"] for t in tight["threats"]] == [t["verdict"] for t in roomy["threats"]]
    sizes = [int(s) for s in Path("sizes").read_text().split()]
    assert sum(s > 5 for s in sizes) == 2  # once halved it stays halved


def test_out_of_memory_with_one_image_fails_the_cell_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREEDY", "0")
    model = "py:usernets:Greedy#weights=linear.safetensors"
    ran = run("eval", "-m", model, "-m", CNN, "-a", "fgsm", "--dataset", TINY, "-o", "out", "--json", "-q")
    assert ran.code == 3
    assert ran.err.startswith("Error: 1 of 2 cells failed: out of memory with a single image; use a smaller model")


# --- options ---------------------------------------------------------------------------------------


def test_fresh_computes_everything_anew(sweeps: list[str]) -> None:
    command = ("-m", CNN, "-a", "fgsm", *QUICK)
    first = evaluate(*command)
    evaluate("-m", CNN, "-a", "noise", *QUICK)
    assert len(stored("out")) == 2
    again = evaluate(*command, "--fresh")
    assert len(sweeps) == 3
    assert list(stored("out")) == [first["cells"][0]["key"]] == [again["cells"][0]["key"]]


def test_a_dry_run_says_what_is_done_and_does_nothing(sweeps: list[str]) -> None:
    command = ("eval", "--dataset", TINY, "-m", CNN, "-a", "fgsm", "-a", "ifgsm", "-a", "ifgsm:norm=l1", *QUICK)
    cold = run(*command, "--dry-run", "--json", "-o", "out")
    assert not Path("out").exists()
    assert [(c["attack"], c["norm"], c["state"]) for c in cold.json["cells"]] == [
        ("fgsm", "linf", "to do"), ("ifgsm", "linf", "to do"), ("ifgsm", "l1", "refused")]  # fmt: skip
    assert "has no l1 version" in cold.json["cells"][2]["reason"]
    evaluate("-m", CNN, "-a", "fgsm", *QUICK)
    warm = run(*command, "--dry-run", "--json", "-o", "out").json["cells"]
    assert [c["state"] for c in warm] == ["done", "to do", "refused"]
    assert [c["key"] for c in warm] == [c["key"] for c in cold.json["cells"]]
    fresh = run(*command, "--dry-run", "--json", "-o", "out", "--fresh").json["cells"]
    assert [c["state"] for c in fresh] == ["to do", "to do", "refused"]
    text = run(*command, "--dry-run", "-o", "out").out
    assert "3 cells, 1 to compute" in text
    assert "refused: ifgsm on cnn:epochs=1 (none): ifgsm has no l1 version" in text
    assert sweeps == [f"{CNN} none fgsm"]


def test_refused_cells_stand_beside_the_others() -> None:
    result = evaluate("-m", CNN, "-a", "fgsm", "-a", "ifgsm:norm=l1", *QUICK)
    ok, refused = result["cells"]
    assert (ok["status"], refused["status"]) == ("ok", "refused")
    assert "it works in l2, linf" in refused["reason"]
    assert (refused["metrics"], refused["passes"], refused["seconds"]) == ({}, None, None)
    assert len(result["threats"]) == 1
    assert [row[0] for row in stored("out").values()] == ["ok", "refused"]


def test_a_subset_is_always_the_same_one() -> None:
    few, many = (evaluate("-m", CNN, "-a", "fgsm", "-n", n, *QUICK)["cells"][0] for n in ("7", "700"))
    assert few["provenance"]["images"]["n"] == few["metrics"]["clean_accuracy"]["n"] == 7
    assert many["provenance"]["images"]["n"] == 20
    assert many["notes"] == ["only 20 test images exist, all of them were used"]
    first, _ = evidence("out").values()
    assert len(set(first["index"])) == 7


def test_budgets_of_several_norms() -> None:
    command = ("-m", CNN, "-a", "pgd:steps=2", "-e", "8/255", "-e", "l2:0.5", "-e", "l2:1", *QUICK)
    result = evaluate(*command)
    assert names(result, "norm", "eps") == [("linf", "8/255"), ("l2", "1/2"), ("l2", "1")]


def test_a_repeated_value_counts_once(sweeps: list[str]) -> None:
    result = evaluate("-m", CNN, "-m", CNN, "-a", "fgsm", "-a", "fgsm:loss=ce", "-e", "8/255", "-e", "16/510", *QUICK)
    assert len(result["cells"]) == 1
    assert len(sweeps) == 1


# --- wraps, and attacks that need another model: from the third-party plugin ------------------------


def test_a_wrap_is_attacked_statically_bare_and_adaptively(example: Registry) -> None:
    result = evaluate("-m", CNN, "-a", "pgd:steps=5", "-d", "example-quantise:bits=3", *QUICK)
    base, wrapped = result["cells"]
    values = {k: v and v["value"] for k, v in wrapped["metrics"].items()}
    parts = [values[f"{k}_robust_accuracy"] for k in ("static", "bare", "adaptive")]
    assert all(p is not None for p in parts)
    assert values["robust_accuracy"] <= min(parts)
    assert base["metrics"]["bare_robust_accuracy"] is None
    assert any("stand-in (BPDA)" in note for note in wrapped["notes"])
    assert wrapped["provenance"]["weights_sha256"] == base["provenance"]["weights_sha256"]


def test_a_randomised_victim_is_judged_on_fresh_draws(example: Registry) -> None:
    command = ("-m", CNN, "-a", "pgd:steps=3", "-d", "example-gaussian:sigma=0.1", *QUICK)
    result = evaluate(*command)
    assert any("EOT" in note for note in result["cells"][1]["notes"])
    seen = evidence("out")[result["cells"][1]["key"]]
    assert len(seen["clean"][0]) == 10
    assert result["cells"][1]["metrics"]["clean_accuracy"]["spread"] is not None
    assert without_times(evaluate(*command, output="again")) == without_times(result)


def test_a_transfer_attack_gets_the_model_it_needs(example: Registry, sweeps: list[str]) -> None:
    attack = "example-transfer:from=(cnn-b:epochs=1),attack=(pgd:steps=3)"
    result = evaluate("-m", CNN, "-a", attack, *QUICK)
    assert [c["status"] for c in result["cells"]] == ["ok"]
    own = "example-transfer:from=(model),attack=(pgd:steps=3)"
    seen = evaluate("-m", CNN, "-a", own, *QUICK)["cells"][0]
    assert seen["status"] == "ok"
    assert seen["key"] != result["cells"][0]["key"]


def test_data_stages_and_objectives_train_another_model(example: Registry) -> None:
    stack = "example-thin:share=0.5+example-smooth-labels:amount=0.2"
    result = evaluate("-m", CNN, "-a", "fgsm", "-d", stack, "-d", "example-thin:share=0.5", *QUICK)
    assert names(result, "defense") == [("none",), (stack,), ("example-thin:share=0.5",)]
    assert len({c["provenance"]["weights_sha256"] for c in result["cells"]}) == 3
    assert "weakest_class_accuracy" in result["cells"][0]["metrics"]
