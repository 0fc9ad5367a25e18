"""The plugin as advplug sees it: listing, the missing library, and the conformance of every attack."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from advplug.errors import UsageError
from advplug.parse import Reference
from advplug.registry import Entry, registry

CHEAP = {
    "ta.autoattack": {"version": "rand"},
    "ta.onepixel": {"steps": 2},
    "ta.square": {"queries": 100},
    "ta.spsa": {"nb_iter": 2},
}
"""Parameters that shorten the slowest ones; the slow test takes all defaults."""
SLOW = {"ta.autoattack", "ta.apgd", "ta.apgdt", "ta.cw", "ta.eaden", "ta.eadl1", "ta.onepixel"}

LISTING = """
import json, sys
from advplug.registry import registry
found = [e.describe() for e in registry().entries("attack") if e.name.startswith("ta.")]
heavy = [m for m in ("torch", "torchattacks") if m in sys.modules]
print(json.dumps([[f["name"] for f in found], heavy, [p for f in found for p in f["params"] if not p["help"]]]))
"""


def entries() -> list[Entry]:
    return [e for e in registry().entries("attack") if e.name.startswith("ta.")]


NAMES = [e.name for e in entries()]


def test_lists_36_attacks_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, check=True)
    names, heavy, silent = json.loads(done.stdout)
    assert len(names) == 36
    assert heavy == []
    assert silent == []


def test_says_what_is_left_out() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    from advplug_torchattacks.table import LEFT_OUT, ROWS

    assert {row.attack for row in ROWS} | set(LEFT_OUT) == set(torchattacks.__all__)
    assert not {row.attack for row in ROWS} & set(LEFT_OUT)


def test_every_parameter_is_an_argument_of_its_class() -> None:
    """What the table passes is what the class takes, and defaults that scale with nothing are the library's."""
    import inspect

    torchattacks = pytest.importorskip("torchattacks")
    from advplug_torchattacks.table import ROWS

    own = {"loss": str, "noise_type": str}
    differ = set()
    for row in ROWS:
        taken = inspect.signature(getattr(torchattacks, row.attack).__init__).parameters
        given = {p.name: p.default for p in row.params}
        passed = row.arguments(given, 0.5)
        assert passed.keys() <= taken.keys(), row.name
        for spec in row.params:
            into = row.rename.get(spec.name, spec.name)
            if (
                into is not None
                and spec.default is not None
                and into not in own
                and taken[into].default != spec.default
            ):
                differ.add(f"{row.name}.{spec.name}")
    assert differ == {"apgd.steps", "apgdt.steps", "cw.steps", "spsa.nb_iter"}


def test_names_the_installation_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    entry = registry().get("attack", "ta.pgd")
    with pytest.raises(UsageError, match=r"pip install --no-deps torchattacks==3\.5\.1"):
        entry.make(entry.bind(Reference("ta.pgd")))


def test_refuses_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torchattacks")
    monkeypatch.setattr(library, "__version__", "3.4.0")
    entry = registry().get("attack", "ta.pgd")
    with pytest.raises(UsageError, match=r"found 3\.4\.0"):
        entry.make(entry.bind(Reference("ta.pgd")))


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("ta.jsma", {"theta": 0.0}, "theta=0"),
        ("ta.tifgsm", {"len_kernel": 4}, "odd"),
        ("ta.pixle", {"patch_min": 5, "patch_max": 4}, "patch_min"),
    ],
)
def test_refuses_parameters_that_do_not_fit(name: str, params: dict[str, object], text: str) -> None:
    pytest.importorskip("torchattacks")
    entry = registry().get("attack", name)
    with pytest.raises(UsageError, match=text):
        entry.make(entry.bind(Reference(name)) | params)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SLOW])
def test_conforms(name: str) -> None:
    pytest.importorskip("torchattacks")
    from advplug.testing import check_attack

    check_attack(name, **CHEAP.get(name, {}))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_conforms_with_default_parameters(name: str) -> None:
    pytest.importorskip("torchattacks")
    from advplug.testing import check_attack

    check_attack(name)
