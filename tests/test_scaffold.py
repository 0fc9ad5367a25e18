"""`advplug plugin new`: what it writes installs, passes its own test and is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from advplug.errors import UsageError
from advplug.scaffold import new_plugin
from conftest import advplug, install, python


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "options", "parameter"),
    [("attack", (), "sign patterns to try"), ("defense", ("--kind", "defense"), "weight of the mean")],
)
def test_the_package_installs_lists_and_passes_its_own_test(
    kind: str, options: tuple[str, ...], parameter: str, tmp_path: Path
) -> None:
    done = advplug("plugin", "new", f"my-{kind}", *options, "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    root = tmp_path / f"advplug-my-{kind}"
    assert done.stderr == f"next: pip install -e '{root}[dev]', then: advplug plugin check my-{kind}\n"
    assert f"registers the {kind} `my-{kind}`" in (root / "README.md").read_text()
    assert {Path(line) for line in done.stdout.split()} == {p for p in root.rglob("*") if p.is_file()}
    site = tmp_path / "site"
    install(root, site)
    tested = python(
        "-W",
        "error",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tmp_path / "t"),
        str(root),
        site=site,
    )
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout
    described = advplug("info", kind, f"my-{kind}", site=site)
    assert described.returncode == 0, described.stderr
    assert parameter in described.stdout
    bad = advplug("info", kind, f"my-{kind[1:]}", site=site)
    assert f"did you mean 'my-{kind}'?" in bad.stderr


def test_no_existing_folder_is_touched(tmp_path: Path) -> None:
    kept = tmp_path / "advplug-mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(UsageError, match="exists already; choose another name"):
        new_plugin("mine", tmp_path)
    assert [p.name for p in kept.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["", "My-attack", "my_attack", "a b", "-a", "a-", "a--b", "1a", "../x", "a/b", "a.b"])
def test_bad_names_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        new_plugin(name, tmp_path)
    assert "is no plugin name; use small letters" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["builtin", "advplug", "advplug-test"])
def test_names_of_the_core_are_taken(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is taken"):
        new_plugin(name, tmp_path)


def test_the_prefix_is_not_doubled(tmp_path: Path) -> None:
    assert new_plugin("advplug-mine", tmp_path)[0].parent.name == "advplug-mine"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        new_plugin("mine", tmp_path / "file")
