"""The doctor: each illness is found, named, and comes with its remedy; a healthy installation is called so."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from advplug import doctor
from advplug.contracts import Access, AttackCaps, Spec
from advplug.doctor import Line, Report, examine, render
from advplug.registry import Broken, Entry, Registry, Source

CAPS = AttackCaps(Access.DECISION, frozenset({"linf"}))


def distribution(site: Path, name: str, version: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> None:
    """Writes an installed distribution with its record."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*head, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
    record = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(text)}")
    (info / "RECORD").write_text("\n".join(record) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of distributions that stands in for everything that is installed, advplug excepted."""
    folder = tmp_path / "site"
    folder.mkdir()
    real = metadata.version

    def only(name: str) -> metadata.Distribution:
        found = list(metadata.distributions(name=name, path=[str(folder)]))
        if not found:
            raise metadata.PackageNotFoundError(name)
        return found[0]

    monkeypatch.setattr(doctor.metadata, "version", lambda n: real(n) if n == "advplug" else only(n).version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda n: only(n).requires)
    monkeypatch.setattr(doctor.metadata, "files", lambda n: only(n).files)
    return folder


def named(lines: list[Line], what: str) -> Line:
    (line,) = [line for line in lines if line.what == what]
    return line


def test_a_healthy_installation() -> None:
    report = examine()
    problems = [line for line in report.lines if line.level == "problem"]
    assert problems == []
    assert report.exit_code == 0
    whats = {line.what for line in report.lines}
    assert {"python", "advplug", "click", "pluggy", "numpy", "torch", "torchvision", "torchattacks",
            "plugin builtin", "cache", "cpu", "torchvision works", "cuda", "bfloat16"} <= whats  # fmt: skip
    quick = {line.what for line in examine(quick=True).lines}
    assert "torchvision works" not in quick
    assert {"torch", "torchvision", "plugin builtin", "cache"} <= quick


def test_missing_and_old_requirements(site: Path) -> None:
    wanted = ("torch>=2.10", "numpy>=1.26", "click>=8.1", 'mypy>=1 ; extra == "dev"')
    distribution(site, "advplug", "0.1.0", {}, wanted)
    distribution(site, "torch", "2.9.1+cpu", {})
    distribution(site, "numpy", "2.4.6", {})
    lines = list(doctor._requirements())
    assert named(lines, "torch") == Line("problem", "torch", "2.9.1+cpu is too old", "pip install 'torch>=2.10'")
    assert named(lines, "numpy") == Line("ok", "numpy", "2.4.6")
    assert named(lines, "click") == Line("problem", "click", "is not installed", "pip install 'click>=8.1'")
    assert len(lines) == 3


def test_torchattacks_absent_is_fine(site: Path) -> None:
    assert [line.level for line in doctor._torchattacks()] == ["ok"]


def test_torchattacks_without_its_pin_is_explained(site: Path) -> None:
    distribution(site, "torchattacks", "3.5.1", {"torchattacks/__init__.py": ""}, ("requests~=2.25.1",))
    distribution(site, "requests", "2.34.2", {})
    (line,) = doctor._torchattacks()
    assert line.level == "ok"
    assert "requests 2.34.2 is installed: right for an installation with --no-deps" in line.detail


def test_torchattacks_with_its_pin_is_a_warning(site: Path) -> None:
    distribution(site, "torchattacks", "3.5.1", {"torchattacks/__init__.py": ""}, ("requests~=2.25.1",))
    distribution(site, "requests", "2.25.1", {})
    (line,) = doctor._torchattacks()
    assert line.level == "warn"
    assert "pip install --no-deps torchattacks==3.5.1" in line.remedy


def test_the_stray_package_in_torchattacks_wheel(site: Path) -> None:
    files = {"torchattacks/__init__.py": "", "robustbench/utils.py": "old", "robustbench/data.py": "old"}
    distribution(site, "torchattacks", "3.5.1", files)
    line = named(list(doctor._torchattacks()), "robustbench")
    assert line.level == "warn"
    assert "finds 2 files of 2022 out of torchattacks' wheel" in line.detail


def test_a_package_that_was_overwritten(site: Path) -> None:
    distribution(site, "robustbench", "1.1.1", {"robustbench/utils.py": "new", "robustbench/model.py": "new"})
    assert named(list(doctor._torchattacks()), "robustbench").level == "ok"
    distribution(site, "torchattacks", "3.5.1", {"robustbench/utils.py": "old"})
    line = named(list(doctor._torchattacks()), "robustbench")
    assert line.level == "problem"
    assert "1 of its files were changed or removed (torchattacks' wheel holds files of the same names)" in line.detail
    assert line.remedy == "pip install --force-reinstall --no-deps robustbench"


def test_a_package_that_lost_files(site: Path) -> None:
    distribution(site, "robustbench", "1.1.1", {"robustbench/utils.py": "new"})
    (site / "robustbench" / "utils.py").unlink()
    assert named(list(doctor._torchattacks()), "robustbench").level == "problem"


def test_plugins_broken_duplicated_and_without_target(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Source("good", "advplug-good", "1.0"), Source("bad", "advplug-bad", "2.0")
    entry = Entry("attack", Spec("lost", "no_such_module:make", CAPS, "lost"), good)
    tables = {kind: {"lost": entry} if kind == "attack" else {} for kind in doctor.hooks.KINDS}
    found = Registry(tables, {("model", "net"): (good, bad)}, (Broken(bad, "ImportError: gone"),), (good,))
    monkeypatch.setattr(doctor, "registry", lambda: found)
    lines = [*doctor._plugins(), *doctor._targets()]
    assert named(lines, "plugin good").detail == "advplug-good 1.0: 1 attack"
    assert named(lines, "plugin bad").detail == "advplug-bad 2.0: ImportError: gone"
    assert "ADVPLUG_DISABLE_PLUGINS=bad" in named(lines, "plugin bad").remedy
    duplicate = named(lines, "model net")
    assert duplicate.detail == "model 'net' is registered twice, by advplug-bad 2.0 and advplug-good 1.0"
    assert duplicate.remedy.startswith("uninstall all but one")
    assert "No module named 'no_such_module'" in named(lines, "attack 'lost'").detail
    assert [line.level for line in lines] == ["ok", "problem", "problem", "problem"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "file" / "cache"))
    (line,) = doctor._cache()
    assert line.level == "problem"
    assert "cannot be written: Not a directory" in line.detail
    assert "ADVPLUG_CACHE" in line.remedy


def test_the_size_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advplug.artifacts import default_root

    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path))
    default_root().mkdir(parents=True)
    (default_root() / "weights").write_bytes(bytes(3 * 2**20))
    (line,) = doctor._cache()
    assert (line.level, line.detail) == ("ok", f"{default_root()}, 3.0 MiB of trained weights")


def test_torchvision_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advplug.vision.state", lambda: "ImportError: libtorch.so: undefined symbol")
    (line,) = doctor._torchvision()
    assert (line.level, line.detail) == ("problem", "ImportError: libtorch.so: undefined symbol")
    assert metadata.version("torch") in line.remedy


def test_one_failed_examination_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def ill() -> None:
        raise OSError("no such table")

    monkeypatch.setattr(doctor, "_cpu", ill)
    report = examine(quick=True)
    line = named(list(report.lines), "ill")
    assert line.detail == "cannot be examined: OSError: no such table"
    assert len(report.lines) > 5


def test_rendering() -> None:
    ok, warn = Line("ok", "a", "fine"), Line("warn", "bb", "two\nlines", "do this")
    assert render(Report((ok,))) == "ok       a  fine\n\nall is well"
    assert render(Report((ok, warn))).splitlines() == [
        "ok       a   fine",
        "warn     bb  two lines",
        "             -> do this",
        "",
        "1 warn",
    ]
    assert Report((ok, warn)).exit_code == 0
    assert Report((ok, Line("problem", "c", "d"))).exit_code == 1


def test_this_process_is_described() -> None:
    assert examine(quick=True).lines[0].detail.startswith(".".join(map(str, sys.version_info[:3])))
