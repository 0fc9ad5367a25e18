"""The command line answers before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import python

LOOK = """
import json, sys
sys.argv = ["advplug", *json.loads(sys.argv[1])]
from advplug.cli import main
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
heavy = [m for m in ("torch", "torchvision", "sklearn", "scipy", "matplotlib") if m in sys.modules]
print("\\n" + json.dumps([code, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["eval", "--help"],
        ["list"],
        ["list", "models", "--json"],
        ["info", "attack", "pgd"],
        ["info", "dataset", "digits", "--json"],
        ["info", "defense", "prune"],
        ["eval", "--model", "resnet18", "--attack", "ifgsm", "--defense", "prune", "--dry-run"],
        ["doctor", "--quick"],
        ["schema"],
        ["cache", "ls"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported(arguments: list[str], tmp_path: Path) -> None:
    if "--dry-run" in arguments:
        arguments = [*arguments, "-o", str(tmp_path)]
    done = python("-c", LOOK, json.dumps(arguments))
    code, heavy = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    assert heavy == []
    assert done.stdout.strip()


def test_help_imports_little() -> None:
    """NumPy, pydantic and rich take longer to import than click itself: --help has no use for them."""
    code = LOOK.replace(
        '("torch", "torchvision", "sklearn", "scipy", "matplotlib")', '("numpy", "pydantic", "rich", "pluggy")'
    )
    done = python("-c", code, json.dumps(["--help"]))
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
