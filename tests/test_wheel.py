"""The wheel: what it holds, and that the core works from it alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy: building leaves a build folder and metadata behind.
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=ROOT, capture_output=True, check=True)  # fmt: skip
    for name in filter(None, files.stdout.decode().split("\0")):
        if name.startswith(("src/", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("advplug-*.whl")
    return built


def test_it_holds_types_licence_and_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "advplug/py.typed" in names
    assert "advplug/builtin/imagenet_classes.txt" in names
    assert {f"advplug/report/templates/page.{end}" for end in ("html.j2", "css", "js")} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    modules = {f"advplug/{p.relative_to(ROOT / 'src' / 'advplug').as_posix()}" for p in (ROOT / "src").rglob("*.py")}
    assert modules <= set(names)
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "plugins"))]


def test_the_command_works_from_it(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)

    def run(code: str, *arguments: str) -> str:
        first = f"import sys; sys.path.insert(0, {str(site)!r}); "
        command = [sys.executable, "-c", first + code, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "gradient steps" in run("from advplug.cli import main; main()", "info", "attack", "pgd")
    assert run("import advplug; print(advplug.__file__)").startswith(str(site))
