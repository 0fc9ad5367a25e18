"""The studies of recipes/: three scales each, every name that a study names, and a smoke run without a failed cell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from advplug.studies.file import load
from advplug.studies.yaml_text import read
from cli_tools import run
from conftest import ROOT

STUDIES = sorted(ROOT.glob("recipes/s*.yaml"))
SCALES = ("smoke", "small", "paper")
NAMED = {
    "s1": "cnn-a resnet18 clip-tiny fgsm pgd apgd spatial tdpa ba safeclip shift angle scale",
    "s2": "clip-tiny pgd eot-pgd apgd noise-vote denoise bilateral fare oft",
    "s3": "caption-pgd mat caption-advtrain jpeg",
    "s4": "cnn-a cnn-b fgsm pgd deepfool apgd advtrain dropout",
    "s5": "resnet18 ifgsm pgd mifgsm transfer prune adv-finetune",
}
"""By study: models, attacks, defenses and parameters without which it would be another one."""
each_study = pytest.mark.parametrize("recipe", STUDIES, ids=lambda path: path.stem)


def words(*texts: str) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z][\w.\-]*", text)}


def planned(recipe: Path, scale: str) -> Any:
    """What `--dry-run` prints as JSON, or its one line of complaint."""
    ran = run("run", recipe, "--scale", scale, "--dry-run", "--json", "-o", "nowhere")
    if ran.code == 0:
        return ran.json
    assert ran.err.startswith("Error: ")
    return ran.err.strip()


def test_there_are_studies() -> None:
    assert STUDIES
    assert {path.stem.partition("-")[0] for path in STUDIES} <= set(NAMED)


@each_study
def test_three_scales_that_can_be_read(recipe: Path) -> None:
    assert set(read(recipe).plain["scales"]) == set(SCALES)  # type: ignore[index,call-overload]
    for scale in SCALES:
        assert load(recipe, scale).matrix.title


@each_study
def test_smoke_needs_no_data_and_names_what_the_study_does(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADVPLUG_DATA", raising=False)
    told = planned(recipe, "smoke")
    assert isinstance(told, dict), told
    assert missing(recipe, str(told)) == set()


@each_study
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_other_scales_are_planned_or_say_in_one_line_what_is_missing(
    recipe: Path, scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = planned(recipe, scale)
    assert isinstance(told, dict) or len(told.splitlines()) == 1, told
    if isinstance(told, dict) and scale == "small":
        assert missing(recipe, str(told)) == set()
    for folder in ("", str(tmp_path)):
        monkeypatch.setenv("ADVPLUG_DATA", folder)
        told = planned(recipe, scale)
        assert isinstance(told, dict) or len(told.splitlines()) == 1, told


@pytest.mark.slow
@pytest.mark.timeout(900)
@each_study
def test_smoke_runs_to_its_end(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADVPLUG_DATA", raising=False)
    ran = run("run", recipe, "--scale", "smoke", "-o", tmp_path / "out", "--json", "-q")
    assert ran.code == 0, ran.err
    made = ran.json
    cells = [*made["cells"], *made["poisonings"], *made["certificates"]]
    assert {f"{c['status']}: {c['reason']}" for c in cells if c["status"] != "ok"} == set()
    assert (
        missing(recipe, *(str(c[k]) for c in cells for k in ("model", "defense", "attack", "goal") if k in c)) == set()
    )


def missing(recipe: Path, *texts: str) -> set[str]:
    """What of a study does not occur in `texts`."""
    return words(NAMED[recipe.stem.partition("-")[0]]) - words(*texts)
