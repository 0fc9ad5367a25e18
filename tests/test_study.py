"""Matrix files: values as people write them, and every mistake told with file, line and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from advplug.errors import UsageError
from advplug.session import Request
from advplug.studies.file import Matrix, load, resolved
from advplug.studies.plan import plan_file
from advplug.studies.schema import json_schema
from advplug.studies.yaml_text import LARGEST, parse
from cli_tools import run
from conftest import ROOT

VALID = jsonschema.Draft202012Validator(json_schema())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def matrix(text: str, scale: str | None = None) -> Matrix:
    Path("m.yaml").write_text(text)
    return load(Path("m.yaml"), scale).matrix


def told(text: str, scale: str | None = None) -> str:
    """What is said of a file that cannot be run."""
    Path("m.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        plan_file(Path("m.yaml"), Request(models=()), scale)
    return str(caught.value)


def allowed(text: str) -> bool:
    """What an editor says of it."""
    return bool(VALID.is_valid(yaml.safe_load(text)))


# --- mistakes ---

SHAPES = [
    # keys
    ("models: cnn\nattaks: fgsm\n", 2, "unknown key 'attaks'; did you mean 'attacks'?"),
    ("model: cnn\n", 1, "unknown key 'model'; did you mean 'models'?"),
    ("models: cnn\nx: 1\n", 2, "unknown key 'x'; keys are datasets, models, defenses, attacks, eps, seeds, title"),
    ("models: cnn\ninclude:\n  - attack: fgsm\n", 3, "unknown key 'attack'; did you mean 'attacks'?"),
    ("models: cnn\nexclude:\n  - attacks: fgsm\n", 3, "unknown key 'attacks'; did you mean 'attack'?"),
    ("models: cnn\nexclude: {n: 3}\n", 2, "unknown key 'n'; keys are dataset, model, defense, attack, eps, seed"),
    ("attacks: fgsm\n", 1, "'models' is missing; write like 'models: [cnn]'"),
    # types
    ("models: [[cnn]]\n", 1, "a list stands where one reference belongs; stack defenses as 'a+b'"),
    ("models: cnn\ndefenses:\n- jpeg\n- [jpeg, prune]\n", 4, "stack defenses as 'a+b'"),
    ("models: {cnn: {epochs: 1}, mlp: {}}\n", 1, "write a reference as pgd:steps=40 or as {pgd: {steps: 40}}"),
    ("models: cnn\nattacks: {pgd: [3]}\n", 2, "'pgd' takes its parameters as {KEY: VALUE}"),
    ("models: cnn\nattacks:\n- pgd:\n    steps: {a: 1}\n", 3, "'pgd': steps is nested"),
    ("models: cnn\nattacks: [pgd:steps=3,restarts=2]\n", 2, "'restarts=2' is a parameter without a name before it"),
    ("models: cnn\nattacks: fgsm, pgd\n", 2, "'fgsm, pgd' is no reference; write a list as [fgsm, pgd]"),
    ("models: cnn\nattacks:\n- fgsm\n- ''\n", 4, "a value is missing"),
    ("models: []\n", 1, "'models' is empty; leave the key out where nothing is to be said"),
    ("models:\n", 1, "a value is missing; leave the key out where nothing is to be said"),
    ("models: cnn\neps:\n - 8/255\n - eight\n", 4, "eps 'eight' is not a number; write it like 8/255, 0.1 or l2:0.5"),
    ("models: cnn\neps: [-1/255]\n", 2, "eps '-1/255' is negative"),
    ("models: cnn\neps: -0.1\n", 2, "eps '-0.1' is negative"),
    ("models: cnn\neps: {a: 1}\n", 2, "'eps' is a budget such as 8/255 or l2:0.5, got a mapping"),
    ("models: cnn\nexclude:\n- eps: few\n", 3, "eps 'few' is not a number"),
    ("models: cnn\nn: many\n", 2, "n, the number of test images, is a whole number of at least 1, got 'many'"),
    ("models: cnn\nn: 0\n", 2, "n, the number of test images, is a whole number of at least 1, got '0'"),
    ("models: cnn\nn: 1.5\n", 2, "is a whole number of at least 1, got '1.5'"),
    ("models: cnn\nn: [3]\n", 2, "is a whole number of at least 1, got a list"),
    ("models: cnn\nseeds: [0, -1]\n", 2, "a seed is a whole number of at least 0, got '-1'"),
    ("models: cnn\nbaseline: maybe\n", 2, "'baseline' is yes or no, got 'maybe'"),
    ("models: cnn\ncertify: [on]\n", 2, "'certify' is yes or no, got a list"),
    ("models: cnn\naudit: som\n", 2, "audit is none, quick or full, got 'som'"),
    ("models: cnn\ntitle: [a]\n", 2, "'title' is text, got a list"),
    ("models: cnn\nexclude: fgsm\n", 2, "'exclude' takes KEY: VALUE, got 'fgsm'"),
    ("models: cnn\ninclude: [fgsm]\n", 2, "'include' takes KEY: VALUE, got 'fgsm'"),
    ("models: cnn\nvariants: [a]\n", 2, "'variants' takes KEY: VALUE, got a list"),
    ("models: cnn\nvariants:\n  a: [pgd]\n", 3, "a list stands where one reference belongs"),
    ("models: cnn\nexclude:\n- {}\n", 3, "this would exclude everything; name at least one of dataset, model"),
    ("- cnn\n", 1, "a matrix is a mapping, like 'models: [cnn]', not a list"),
    ("just text\n", 1, "a matrix is a mapping, like 'models: [cnn]', not 'just text'"),
    ("models: cnn\nscales: smoke\n", 2, "scales is a mapping of names to keys, like 'smoke: {n: 16}'"),
    ("models: cnn\nscales: {smoke: 16}\n", 2, "scales is a mapping of names to keys"),
    ("models: cnn\nscales:\n  smoke: {n: 0}\n  paper: {n: 9}\n", 3, "at least 1, got '0'"),
]
"""What is wrong whatever the names mean: (file, line, text)."""

NAMES = [
    ("models: resnet81\n", 1, "no model is called 'resnet81'; did you mean 'resnet18'?"),
    ("models: cnn\nattacks: [fgsm, ifgms]\n", 2, "no attack is called 'ifgms'; did you mean 'ifgsm'?"),
    ("models: cnn\nattacks:\n  - fgsm\n  - pgd:stps=4\n", 4, "attack 'pgd' has no parameter 'stps'; did you mean 'ste"),
    ("models: cnn\ndatasets: digts\n", 2, "no dataset is called 'digts'; did you mean 'digits'?"),
    ("models: cnn\ndefenses:\n- jpeg+prun\n", 3, "no defense is called 'prun'; did you mean 'prune'?"),
    ("models: cnn\ninclude:\n- models: cnn\n  attacks:\n  - pgd:steps=0\n", 5, "steps must be >= 1, got 0"),
    ("models: cnn\nvariants: {hard: 'pgd:steps=3'}\nattacks: hrad\n", 3, "did you mean the variant 'hard'?"),
    ("models: cnn\nvariants: {pgd: 'pgd:steps=3'}\n", 2, "'pgd' has a meaning already; give the variant a name of"),
    ("models: cnn\nvariants: {none: jpeg}\n", 2, "'none' has a meaning already"),
    ("models: cnn\nvariants:\n  a b: 'pgd:steps=3'\n", 3, "'a b' is no name; letters, digits and '. _ -' make one"),
    ("models: cnn\nattacks: fgsm\nexclude: {model: cnn}\n", None, "nothing is left of the matrix; exclude less"),
    ("models: cnn\nattacks: fgsm\neps: [8/255, 8]\n", 3, "an L-inf budget above 1 has no meaning; did you mean 8/255?"),
    (
        "models: cnn\nattacks:\n- fgsm\n- pgd:norm=l2\neps: linf:8/255\n",
        4,
        "no budget of 'eps' is in l2; add one, like l2:",
    ),
    ("models: cnn\ninclude:\n- attacks: fgsm\n  eps: 2\n", 4, "did you mean 2/255?"),
    ("models: cnn\neps: linf:8\n", 2, "an L-inf budget above 1 has no meaning; did you mean 8/255?"),
]

YAML = [
    ("models: cnn\n\tattacks: fgsm\n", 2, "a tab stands where YAML wants spaces; indent with spaces"),
    ("models: cnn\nattacks:\n\t- fgsm\n", 3, "a tab stands where YAML wants spaces"),
    ("models: cnn\nattacks: fgsm\nmodels: mlp\n", 3, "'models' is written twice, first on line 1"),
    ("models: cnn\ninclude:\n- attacks: fgsm\n  attacks: pgd\n", 4, "'attacks' is written twice, first on line 3"),
    ("models: cnn\nattacks: [fgsm,\n\n", 2, "a bracket is not closed"),
    ("models: cnn\ntitle: 'a\n\nb\n", 2, "a quote is not closed"),
    ("models: cnn\nattacks: pgd: {steps: 3}\n", 2, "a ': ' stands where no key can; look at the indentation"),
    ("models: cnn\n  attacks: fgsm\n", 2, "a ': ' stands where no key can; look at the indentation"),
    ("models: cnn\nattacks: @x\n", 2, "this is no YAML: found character '@'"),
    ("models: cnn\nattacks: *pgd\n", 2, "this is no YAML: found undefined alias 'pgd'"),
    ("models: cnn\n---\nmodels: mlp\n", 2, "'---' begins a second document; a matrix file holds one"),
    ("models: !!python/object/apply:os.system [ls]\n", 1, "'!!python/object/apply:os.system' is a tag"),
    ("models: !secret cnn\n", 1, "'!secret' is a tag; write plain text, lists and mappings only"),
    ("models: cnn\n? [a]\n: b\n", 2, "a key is text, not a list or mapping"),
    ("models: cnn\nvariants: &v\n  a: *v\n", 2, "too large; an alias may repeat itself"),
    ("", None, "m.yaml is empty"),
    ("# a comment\n", None, "m.yaml is empty"),
    ("models: c\x00nn\n", None, "special characters are not allowed"),
]


@pytest.mark.parametrize(("text", "line", "what"), [*SHAPES, *NAMES, *YAML])
def test_a_mistake_is_told_with_its_line(text: str, line: int | None, what: str) -> None:
    said = told(text)
    assert what in said
    assert said.startswith(f"m.yaml:{line}: " if line else "m.yaml")
    assert "\n" not in said


@pytest.mark.parametrize("text", [text for text, *_ in SHAPES])
def test_the_schema_rejects_what_the_reader_rejects(text: str) -> None:
    assert not allowed(text)


def test_on_the_command_line_it_is_one_line() -> None:
    Path("m.yaml").write_text("models: cnn\nattaks: fgsm\n")
    for command in (("run", "m.yaml"), ("run", "m.yaml", "--dry-run", "--json")):
        ran = run(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == "Error: m.yaml:2: unknown key 'attaks'; did you mean 'attacks'?\n"
    assert list(Path().iterdir()) == [Path("m.yaml")]


def test_files_that_cannot_be_read() -> None:
    with pytest.raises(UsageError, match=r"cannot read none\.yaml: No such file"):
        load(Path("none.yaml"))
    with pytest.raises(UsageError, match=r"cannot read \.: Is a directory"):
        load(Path())
    Path("m.yaml").write_bytes(b"models: cnn\xff")
    with pytest.raises(UsageError, match=r"m\.yaml is no text: byte 11 is not UTF-8"):
        load(Path("m.yaml"))


def test_aliases_of_aliases_end() -> None:
    """Ten to the ninth values in a few lines."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    with pytest.raises(UsageError, match="too large"):
        parse("\n".join(rows), "m.yaml")
    with pytest.raises(UsageError, match=r"m\.yaml:1: too large"):
        parse(f"[{'1,' * LARGEST}]", "m.yaml")
    with pytest.raises(UsageError, match="nested too deeply"):
        parse("[" * 5000 + "]" * 5000, "m.yaml")


# --- values ---


def test_numbers_are_read_as_they_are_written() -> None:
    found = matrix("models: cnn\nattacks: pgd\neps: [8/255, 1e-3, .5, 0.1, l2:0.5]\nseeds: [0, 007]\nn: 010\n")
    assert found.eps == ["8/255", "1e-3", ".5", "0.1", "l2:0.5"]
    assert (found.seeds, found.n) == ([0, 7], 10)
    plan = plan_file(Path("m.yaml"), Request(models=()))
    budgets = {(s.norm, s.victim.seed): list(map(str, s.budgets)) for s in plan.sweeps}
    assert budgets["linf", 0] == budgets["linf", 7] == ["1/1000", "8/255", "1/10", "1/2"]
    assert budgets["l2", 0] == ["1/2"]
    assert {s.limit for s in plan.sweeps} == {10}


@pytest.mark.parametrize("text", ["eps: 2/255, 8/255", "eps: [2/255, 8/255]", "eps:\n- 2/255\n- 8/255"])
def test_lists_of_budgets(text: str) -> None:
    text = f"models: cnn\n{text}\n"
    assert matrix(text).eps == ["2/255", "8/255"]
    assert allowed(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: cnn", ["cnn"]),
        ("models: [cnn, mlp]", ["cnn", "mlp"]),
        ("models:\n- cnn:epochs=3\n- mlp", ["cnn:epochs=3", "mlp"]),
        ("models:\n- cnn: {epochs: 3, lr: 1e-2}", ["cnn:epochs=3,lr=1e-2"]),
        ("models: {cnn: {epochs: 3}}", ["cnn:epochs=3"]),
        ("models: {cnn: epochs=3}", ["cnn:epochs=3"]),
        ("models: [cnn: {epochs: 3}, mlp]", ["cnn:epochs=3", "mlp"]),
        ("models: 'py:usernets:Linear#weights=a.safetensors'", ["py:usernets:Linear#weights=a.safetensors"]),
    ],
)
def test_references(text: str, expected: list[str]) -> None:
    assert matrix(text).models == expected
    assert allowed(text)


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("on", True), ("true", True), ("no", False), ("Off", False)]
)
def test_switches(word: str, value: bool) -> None:
    text = f"models: cnn\nbaseline: {word}\n"
    assert matrix(text).baseline is value
    assert allowed(text)


def test_words_that_yaml_takes_for_values_stay_words() -> None:
    assert matrix("models: [on, null, 1e3, 2001-01-01]\n").models == ["on", "null", "1e3", "2001-01-01"]


def test_anchors_repeat_a_value() -> None:
    found = matrix("models: &m [cnn, mlp]\ninclude:\n- models: *m\n  attacks: fgsm\n")
    assert found.include[0].models == found.models == ["cnn", "mlp"]


def test_a_line_is_that_of_the_key_whose_value_stands_below() -> None:
    Path("m.yaml").write_text("models: cnn\n\ninclude:\n\n- attacks:\n    - fgsm\n    # more\n    - pgd\n")
    loaded = load(Path("m.yaml"))
    assert loaded.where("include") == "m.yaml:3"
    assert loaded.where("include", 0, "attacks") == "m.yaml:5"
    assert loaded.where("include", 0, "attacks", 1) == "m.yaml:8"


def test_variants_are_replaced_everywhere() -> None:
    text = """
variants: {small: 'cnn:epochs=1', squash: {jpeg: {quality: 50}}, hard: 'pgd:steps=9'}
models: small
defenses: [squash, squash+prune, prune]
attacks: [hard, fgsm]
exclude: {defense: squash, attack: [hard, fgsm]}
include: {attacks: hard}
"""
    found = resolved(matrix(text))
    assert found.models == ["cnn:epochs=1"]
    assert found.defenses == ["jpeg:quality=50", "jpeg:quality=50+prune", "prune"]
    assert found.attacks == ["pgd:steps=9", "fgsm"]
    assert (found.exclude[0].defense, found.exclude[0].attack) == (["jpeg:quality=50"], ["pgd:steps=9", "fgsm"])
    assert found.include[0].attacks == ["pgd:steps=9"]
    assert found.variants["hard"] == "pgd:steps=9"  # for tables and reports
    assert resolved(found) == found
    assert allowed(text)


# --- scales ---

SCALES = (
    "models: cnn\nn: 500\nvariants: {a: fgsm}\nscales:\n  smoke: {n: 16, variants: {b: pgd}}\n  paper: {models: mlp}\n"
)


def test_a_scale_takes_the_place_of_keys() -> None:
    smoke, paper = matrix(SCALES, "smoke"), matrix(SCALES, "paper")
    assert (smoke.models, smoke.n, smoke.variants) == (["cnn"], 16, {"a": "fgsm", "b": "pgd"})
    assert (paper.models, paper.n, paper.variants) == (["mlp"], 500, {"a": "fgsm"})
    assert allowed(SCALES)


def test_a_scale_is_chosen_from_those_there_are() -> None:
    assert told(SCALES) == "m.yaml comes in several scales; choose one with --scale: smoke, paper"
    assert told(SCALES, "smok") == "m.yaml has no scale 'smok'; did you mean 'smoke'?; there are smoke, paper"
    assert told("models: cnn\n", "smoke").startswith("m.yaml has no scales; leave --scale out")


# --- the schema ---


def test_the_schema_is_printed_and_takes_the_recipes() -> None:
    printed = run("schema", "matrix").json
    assert printed == json_schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert ROOT / "recipes" / "demo.yaml" in recipes
    for recipe in recipes:
        assert allowed(recipe.read_text()), recipe.name


def test_the_schema_describes_every_key() -> None:
    schema: dict[str, Any] = json_schema()
    for name, part in schema["properties"].items():
        assert part.get("description"), name
    assert set(schema["properties"]) == {*Matrix.model_fields, "scales"}
