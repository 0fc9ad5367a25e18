"""torchvision beside a torch without CUDA: repaired where that is needed, untouched where it is healthy."""

from __future__ import annotations

from pathlib import Path

from conftest import python

HEALTHY = """
import sys
from advplug import vision
first = vision.import_torchvision()
assert first is vision.import_torchvision()
assert first.marker == 1 and "torch" not in sys.modules
print(vision.state())
"""

REAL = """
import logging
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record)
logger = logging.getLogger("advplug")
logger.addHandler(handler)
logger.setLevel(logging.INFO)
from advplug import vision
torchvision = vision.import_torchvision()
assert vision.import_torchvision() is torchvision
import torch, torchvision.transforms.v2
state = vision.state()
assert state in ("ok", "repaired"), state
assert [r.levelname for r in records] == ["INFO"] * (state == "repaired"), records
net = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=3)
assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
print(state)
"""

BROKEN = """
from advplug import vision
try:
    vision.import_torchvision()
except {kind}:
    print(vision.state())
"""


def package(folder: Path, body: str) -> str:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(body)
    return str(folder)


def test_a_healthy_torchvision_is_untouched(tmp_path: Path) -> None:
    done = python("-W", "error", "-c", HEALTHY, site=Path(package(tmp_path, "marker = 1")))
    assert (done.stdout.strip(), done.stderr) == ("ok", "")


def test_the_installed_torchvision_works_without_a_warning() -> None:
    done = python("-W", "error", "-c", REAL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_other_failures_are_raised_and_told(tmp_path: Path) -> None:
    site = Path(package(tmp_path, "raise RuntimeError('something\\n else')"))
    done = python("-c", BROKEN.format(kind="RuntimeError"), site=site)
    assert done.stdout.strip() == "RuntimeError: something else"
    (tmp_path / "torchvision" / "__init__.py").write_text("import no_such_module")
    done = python("-c", BROKEN.format(kind="ImportError"), site=site)
    assert done.stdout.strip() == "ModuleNotFoundError: No module named 'no_such_module'"
