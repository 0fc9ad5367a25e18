"""`advplug plugin new`: an installable plugin with a working attack and the test that proves it."""

from __future__ import annotations

import re
from pathlib import Path

from advplug import __version__
from advplug.errors import UsageError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TAKEN = frozenset({"advplug", "builtin", "test", "tests"})

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "{distribution}"
version = "0.1.0"
description = "{title} for advplug."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["advplug{versions}"]

[project.optional-dependencies]
dev = ["pytest>=8"]

# advplug finds the plugin through this line.
[project.entry-points.advplug]
{name} = "{module}"

[tool.setuptools.packages.find]
where = ["src"]
"""

_README = """\
# {distribution}

A plugin for advplug. It registers the attack `{name}`: the better of a few sign patterns at full budget.

```
pip install -e '.[dev]'        # in the environment that holds advplug
pytest                         # the conformance kit says whether the contract holds
advplug plugin check {name}
advplug info attack {name}
advplug eval --model cnn --attack {name} --attack pgd
```

- `src/{module}/__init__.py` says what there is. It is imported whenever plugins are listed, so it imports no torch.
- `src/{module}/attack.py` holds the attack. Torch is imported inside the factory, because listing reads its signature.
- `tests/test_it.py` runs the conformance kit.
"""

_INIT = '''\
"""What this plugin registers. Imported whenever plugins are listed: no torch here."""

from advplug.contracts import Access, AttackCaps, Spec, Strength
from advplug.hooks import hookimpl


@hookimpl
def advplug_attacks():
    caps = AttackCaps(Access.SCORE, frozenset({{"linf"}}), strength=Strength.FLOOR, stochastic=True)
    return [Spec("{name}", "{module}.attack:make", caps, "the best of a few random sign patterns")]
'''

_ATTACK = '''\
"""The attack: tries sign patterns at full budget and keeps, for each image, the one with the smallest margin."""

from typing import Annotated

from advplug.contracts import Crafted
from advplug.params import Param


def make(tries: Annotated[int, Param("sign patterns to try", ge=1)] = 8):
    """The annotation above is what `advplug info` shows and what `{name}:tries=20` is checked against."""
    import torch

    def attack(victim, batch, threat, rng):
        """Changed images for `batch`, within `threat`. The engine, not this function, decides which of them succeed.

        victim: answers `logits(x)`; gradient attacks differentiate `attacked(x)`
        batch:  x (B, C, H, W) in [0, 1], y (B,), index (B,), and target (B,) for targeted goals
        threat: norm and eps, in pixel units
        rng:    the only source of randomness; seeding by index makes results independent of the batch
        """

        def pattern(generator):
            return torch.randint(0, 2, batch.x.shape[1:], generator=generator) * 2 - 1

        def margin(x):
            logits = victim.logits(x)
            right = logits.gather(1, batch.y[:, None]).squeeze(1)
            return right - logits.scatter(1, batch.y[:, None], -torch.inf).amax(1)

        best, smallest = batch.x.clone(), margin(batch.x)
        for i in range(tries if threat.eps > 0 else 0):
            sign = rng.per_image(pattern, batch.index, i).to(batch.x)
            x = (batch.x + threat.eps * sign).clamp(0, 1)
            found = margin(x)
            better = found < smallest
            best[better], smallest[better] = x[better], found[better]
        return Crafted(best)

    return attack
'''

_TEST = '''\
"""The conformance kit: shapes, ball, seeds, soundness on a victim whose exact robust radius is known, and more."""

from advplug.testing import check_attack


def test_defaults():
    check_attack("{name}")


def test_one_try():
    check_attack("{name}", tries=1)
'''

_GITIGNORE = "__pycache__/\n*.egg-info/\nbuild/\ndist/\n.pytest_cache/\n"


def new_plugin(name: str, directory: Path) -> list[Path]:
    """Writes the package `advplug-NAME` under `directory` and returns the files.

    Raises UsageError for a name that cannot be one, a folder that exists, or one that cannot be written.
    """
    name = name.removeprefix("advplug-")
    if not _NAME.fullmatch(name):
        raise UsageError(f"'{name}' is no plugin name; use small letters, digits and single hyphens, like my-attack")
    if name in _TAKEN:
        raise UsageError(f"'{name}' is taken; choose another name")
    root = directory / f"advplug-{name}"
    if root.exists():
        raise UsageError(f"{root} exists already; choose another name, or another folder with -o")
    files = _files(name)
    try:
        for path, text in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{root} cannot be written: {error.strerror or error}") from error
    return [root / path for path in files]


def _files(name: str) -> dict[str, str]:
    module = "advplug_" + name.replace("-", "_")
    values = {
        "name": name,
        "module": module,
        "distribution": f"advplug-{name}",
        "title": name.replace("-", " ").capitalize(),
        "versions": _compatible(),
    }
    templates = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"src/{module}/__init__.py": _INIT,
        f"src/{module}/attack.py": _ATTACK,
        "tests/test_it.py": _TEST,
        ".gitignore": _GITIGNORE,
    }
    return {path: text.format(**values) for path, text in templates.items()}


def _compatible() -> str:
    """This version up to the next that may change the contracts: `>=0.1,<0.2`."""
    major, minor = (int(n) for n in __version__.split(".")[:2])
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 1}"
