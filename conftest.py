"""What all tests share: one weight cache, so that nothing is trained twice in a run."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).parent
_cache: str | None = None
# The same examples in every run, and no limit that a busy machine would break.
settings.register_profile("advplug", derandomize=True, deadline=None)
settings.register_profile("mutation", settings.get_profile("advplug"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("advplug")


def pytest_configure(config: pytest.Config) -> None:
    """Sets ADVPLUG_CACHE for this process and those it starts; an outer test process's folder is kept."""
    global _cache
    os.environ.pop("ADVPLUG_DISABLE_PLUGINS", None)
    if "ADVPLUG_TEST_CACHE" not in os.environ:
        _cache = os.environ["ADVPLUG_TEST_CACHE"] = tempfile.mkdtemp(prefix="advplug-test-cache-")
    os.environ["ADVPLUG_CACHE"] = os.environ["ADVPLUG_TEST_CACHE"]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cache:
        os.environ.pop("ADVPLUG_TEST_CACHE", None)
        shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers a factory for one test: (kind, caps, factory) to its name."""
    from planting import planter

    return planter(monkeypatch)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; tests that need it skip without."""
    folder = os.environ.get("ADVPLUG_DATA")
    if not folder:
        pytest.skip("real data are not at hand: ADVPLUG_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def example_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which tests/plugin_package is installed; put it on PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    install(ROOT / "tests" / "plugin_package", site)
    return site


@contextmanager
def benchmark_module(name: str) -> Iterator[Any]:
    """A module of `benchmarks`, which can import its neighbours meanwhile."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def install(source: Path, site: Path) -> None:
    """Installs a distribution into a folder, from a copy, so that the build leaves nothing behind."""
    copy = Path(tempfile.mkdtemp(prefix="advplug-build-")) / source.name
    try:
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                   "--disable-pip-version-check", "--target", str(site), str(copy)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(copy.parent)


def python(
    *arguments: str, site: Path | None = None, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """This interpreter in a process of its own, with `site` importable."""
    environment = os.environ | variables
    if site is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def advplug(
    *arguments: str, site: Path | None = None, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    code = "import sys; from advplug.cli import main; sys.exit(main())"
    return python("-c", code, *arguments, site=site, cwd=cwd, **variables)
