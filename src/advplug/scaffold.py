"""`advplug plugin new`: an installable plugin with a working attack or defense and the test that proves it."""

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

A plugin for advplug. It registers the {kind} `{name}`: {what}.

```
pip install -e '.[dev]'        # in the environment that holds advplug
pytest                         # the conformance kit says whether the contract holds
advplug plugin check {name}
advplug info {kind} {name}
advplug eval --model cnn {options}
```

- `src/{module}/__init__.py` says what there is. It is imported whenever plugins are listed, so it imports no torch.
- `src/{module}/{kind}.py` holds the {kind}. Torch is imported inside the factory, because listing reads its signature.
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

_DEFENSE_INIT = '''\
"""What this plugin registers. Imported whenever plugins are listed: no torch here."""

from advplug.contracts import DefenseCaps, Spec
from advplug.hooks import hookimpl


@hookimpl
def advplug_defenses():
    # What holds of the wrap is said here, too: gradient=Gradient.BPDA, stochastic=True, rejects=True.
    caps = DefenseCaps(("wrap",))
    return [Spec("{name}", "{module}.defense:make", caps, "images smoothed a little")]
'''

_DEFENSE = '''\
"""The defense: each pixel is mixed with the mean of its neighbourhood before the model sees it."""

from typing import Annotated

from advplug.contracts import Gradient, Wrap
from advplug.params import Param


def make(share: Annotated[float, Param("weight of the mean", ge=0, le=1)] = 0.5):
    """The annotation above is what `advplug info` shows and what `{name}:share=0.8` is checked against."""
    from torch.nn import functional

    def forward(inner, x, rng):
        """What the deployed system answers, logits (B, classes).

        inner: the model, or the next defense around it
        x:     (B, C, H, W) in [0, 1]
        rng:   the only source of randomness, a torch.Generator; who draws from it declares stochastic=True and draws=20
        """
        around = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return inner((1 - share) * x + share * around)

    # EXACT: attacks differentiate `forward` itself. Where it rounds, sorts or decodes, its gradient is of no use to
    # them, and a high number means nothing: declare Gradient.BPDA, and surrogates=(stand_in,), a smooth one like it.
    return (Wrap(forward, Gradient.EXACT),)
'''

_DEFENSE_TEST = '''\
"""The conformance kit: gradients and randomness as declared, answers image by image, clean accuracy, and more."""

from advplug.testing import check_defense


def test_defaults():
    check_defense("{name}")


def test_the_mean_alone():
    check_defense("{name}", share=1.0, clean_drop=0.2)
'''

_KINDS = {
    "attack": (
        _INIT,
        _ATTACK,
        _TEST,
        "the better of a few sign patterns at full budget",
        "--attack {name} --attack pgd",
    ),
    "defense": (_DEFENSE_INIT, _DEFENSE, _DEFENSE_TEST, "smoothed images", "--defense {name} --attack apgd"),
}

_GITIGNORE = "__pycache__/\n*.egg-info/\nbuild/\ndist/\n.pytest_cache/\n"


def new_plugin(name: str, directory: Path, kind: str = "attack") -> list[Path]:
    """Writes the package `advplug-NAME`, which registers an attack or a defense, under `directory`; returns the files.

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
    files = _files(name, kind)
    try:
        for path, text in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{root} cannot be written: {error.strerror or error}") from error
    return [root / path for path in files]


def _files(name: str, kind: str) -> dict[str, str]:
    init, code, test, what, options = _KINDS[kind]
    module = "advplug_" + name.replace("-", "_")
    values = {
        "name": name,
        "module": module,
        "distribution": f"advplug-{name}",
        "title": name.replace("-", " ").capitalize(),
        "versions": _compatible(),
        "kind": kind,
        "what": what,
        "options": options.format(name=name),
    }
    templates = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"src/{module}/__init__.py": init,
        f"src/{module}/{kind}.py": code,
        "tests/test_it.py": test,
        ".gitignore": _GITIGNORE,
    }
    return {path: text.format(**values) for path, text in templates.items()}


def _compatible() -> str:
    """This version up to the next that may change the contracts: `>=0.1,<0.2`."""
    major, minor = (int(n) for n in __version__.split(".")[:2])
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 1}"
