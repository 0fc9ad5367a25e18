"""What the README and the plugin guide show is what happens."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from advplug import hooks
from cli_tools import CNN, QUICK, TINY
from conftest import ROOT, advplug, install, python
from walks import WALKS, write_files

README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "plugins.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_readme_plugin_is_short_installs_and_conforms(tmp_path: Path) -> None:
    (manifest,), (module,) = blocks(README, "toml"), blocks(README, "python")
    assert len((manifest + module).splitlines()) <= 30
    install(write(tmp_path / "sign", pyproject__toml=manifest, advplug_sign__py=module), tmp_path / "site")
    described = advplug("info", "attack", "sign-noise", site=tmp_path / "site")
    assert "share of the budget to use" in described.stdout
    checked = advplug("plugin", "check", "sign", site=tmp_path / "site")
    assert checked.returncode == 0, checked.stdout
    assert "ok   attack 'sign-noise': linf: stays inside the ball" in checked.stdout


def test_the_guide_is_one_working_plugin(tmp_path: Path) -> None:
    (manifest,), (test,) = blocks(GUIDE, "toml"), blocks(GUIDE, "python test")
    module = "\n\n".join(blocks(GUIDE, "python"))
    install(write(tmp_path / "guide", pyproject__toml=manifest, advplug_guide__py=module), tmp_path / "site")
    write(tmp_path / "tests", test_guide__py=test)
    tested = python(
        "-W",
        "error",
        "-m",
        "pytest",
        "-q",
        "--basetemp",
        str(tmp_path / "inner"),
        str(tmp_path / "tests"),
        site=tmp_path / "site",
    )
    assert tested.returncode == 0, tested.stdout
    listed = advplug("list", "--json", site=tmp_path / "site")
    mine = {e["kind"]: e["name"] for e in json.loads(listed.stdout) if e["plugin"] == "advplug-guide 0.1.0"}
    assert set(mine) == set(hooks.KINDS)


def test_the_guide_names_every_hook_and_check() -> None:
    from advplug import testing

    for name in (
        *hooks.KINDS.values(),
        *(n for n in testing.__all__ if n.startswith("check_") and n != "check_plugin"),
    ):
        assert name in GUIDE


def commands(text: str) -> list[str]:
    whole = [block.replace("\\\n", " ") for block in blocks(text, "")]
    lines = [line.partition(" #")[0].strip() for block in whole for line in block.splitlines()]
    return [line for line in lines if line.startswith("advplug ")]


def test_generated_parts_are_up_to_date() -> None:
    code = (
        "import json, sys; sys.path.insert(0, 'docs'); import generate; "
        "made = [page() for page in generate.PAGES]; "
        "print(json.dumps([(str(path.relative_to(generate.HERE)), text) for path, text in made]))"
    )
    made = json.loads(python("-c", code, cwd=ROOT).stdout)
    assert len(made) >= 4
    assert [name for name, text in made if (ROOT / "docs" / name).read_text() != text] == [], "make docs"


# The guide to plugins is followed step by step above, the page on deployment in test_pack.py, others in test_walks.py.
FOLLOWED = [ROOT / "docs" / name for name in ("plugins.md", "deploy.md", *WALKS)]
SHOWN = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p not in FOLLOWED)]
PAGES = [*SHOWN, *sorted(ROOT.glob("plugins/*/README.md"))]
LINES = {line: page for page in reversed(PAGES) for line in commands(page.read_text())}


def _reads_data(line: str) -> bool:
    """Whether it runs a recipe at a scale that takes files from the folder that ADVPLUG_DATA names."""
    named = re.search(r"recipes/[\w-]+\.yaml(?=.*--scale (?:small|paper))", line)
    return named is not None and "$ADVPLUG_DATA" in (ROOT / named[0]).read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that is finished, for commands that read one; each kind is run once."""
    kinds = {
        "compare": ("-m", "cnn", "-a", "fgsm", "--dataset", "digits:size=16", *QUICK),
        "read": ("-m", CNN, "-d", "jpeg", "-a", "fgsm", "--dataset", TINY, *QUICK),
    }
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            assert advplug("eval", *kinds[kind], "-o", str(made[kind])).returncode == 0
        return made[kind]

    return folder


@pytest.mark.parametrize("line", sorted(LINES))
def test_the_commands_shown_work(line: str, tmp_path: Path, finished: Callable[[str], Path]) -> None:
    write_files(LINES[line], tmp_path)
    if "ADVPLUG_DATA" not in os.environ and ("$ADVPLUG_DATA" in line or _reads_data(line)):
        pytest.skip("ADVPLUG_DATA names no folder with data")
    arguments = shlex.split(os.path.expandvars(line))[1:]
    for root in re.findall(r"imagenet:(photos/\w+)", line):
        for name in ("n01440764", "n02102040"):
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "0.jpg").write_bytes(b"no image, and nobody looks at it")
    if arguments[0] == "compare":
        for folder in arguments[1:3]:
            shutil.copytree(finished("compare"), tmp_path / folder)
    if arguments[0] in ("plot", "export", "report"):
        shutil.copytree(finished("read"), tmp_path / arguments[1])
    if arguments[0] == "run" or arguments[:2] == ["status", "advplug-results/matrix"]:
        (tmp_path / "matrix.yaml").write_text(blocks((ROOT / "docs" / "matrix.md").read_text(), "yaml")[0])
        shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    if arguments[0] == "status":
        begun = ("-m", CNN, "-d", "jpeg", "-a", "fgsm", "--dataset", TINY, "--max-passes", "1", "--audit", "none")
        advplug("run", "matrix.yaml", *begun, cwd=tmp_path)
    if arguments[0] in ("eval", "transfer", "run"):
        arguments += ["-o", str(tmp_path)] + ["--dry-run"] * ("--dry-run" not in arguments)
    if "--calibrate" in arguments:
        # Each model is built and timed: one of them shows it.
        arguments += ["-m", CNN, "-d", "jpeg"]
    if arguments == ["doctor"]:
        arguments.append("--quick")
    done = advplug(*arguments, cwd=ROOT / "benchmarks" if "py:engine_models" in line else tmp_path)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == "-o"]
    assert done.stdout.strip() or all(file.stat().st_size for file in written)


def test_links_lead_somewhere() -> None:
    pages = (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("plugins/*/README.md"),
    )
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
