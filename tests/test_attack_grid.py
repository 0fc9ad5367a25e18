"""Every registered attack on a small net, over class counts, channels and uneven batches.

What cannot run there says so through its capabilities; everything else returns images inside its set.
"""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch

from advplug.contracts import Access, AttackCaps, Batch, MinimumNorm, Targeted, Threat, Untargeted
from advplug.errors import AdvplugError
from advplug.parse import Reference
from advplug.perturbations import CUSTOMARY
from advplug.pipeline import allowed
from advplug.registry import Entry, registry
from advplug.rng import Stream
from advplug.testing.problems import fragile
from advplug.testing.state import differences, fingerprint
from advplug.victim import Victim

CLASSES, CHANNELS, BATCHES = (2, 3, 10, 100), (1, 3), (2, 3)
"""5 images in batches of 2 or 3 leave an odd one."""
EPS = {"linf": Fraction(1, 10), "l2": Fraction(1), "l1": Fraction(10), **CUSTOMARY}
SMALL = {
    "steps": 3, "queries": 30, "max_iter": 3, "max_iterations": 10, "restarts": 1, "tries": 2, "n_targets": 2,
    "targets": 2, "popsize": 4, "samples": 4, "binary_search_steps": 2, "init_eval": 5, "init_size": 5, "max_eval": 20,
    "search_steps": 2, "square_steps": 30, "scales": 1, "epochs": 1, "rounds": 2, "inner_steps": 3, "directions": 8,
}  # fmt: skip
"""Enough to run every line; strength is the other tests' business."""
SHARES = {"art.jsma": ("gamma", "0.05")}
"""Of pixels that may be changed, one after the other."""


def quick(entry: Entry) -> dict[str, Any]:
    """Bound parameters with the expensive counts cut down."""
    given = [SHARES[entry.name]] if entry.name in SHARES else []
    for p in entry.params():
        if p.kind == "victim":
            given.append((p.name, "cnn"))
        elif p.name in SMALL and p.kind == "int" and (p.default is None or SMALL[p.name] < p.default):
            given.append((p.name, str(max(SMALL[p.name], int(p.info.ge or 0)))))
    return entry.bind(Reference(entry.name, tuple(given)))


@functools.cache
def net(classes: int, channels: int) -> Any:
    return fragile(channels, classes)


def batch(classes: int, channels: int, targeted: bool) -> Batch:
    x = torch.rand(5, channels, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    with torch.no_grad():
        scores = net(classes, channels)(x)
    return Batch(x, scores.argmax(1), torch.arange(5) + 20, scores.argmin(1) if targeted else None)


def cases() -> list[Any]:
    """Each attack with every pair of values in a usual run; all combinations in the long one."""
    found = []
    for number, entry in enumerate(registry().entries("attack")):
        caps: AttackCaps = entry.spec.caps  # type: ignore[assignment]
        if caps.access is Access.TRAINING_SET or caps.modality != "image":
            continue
        for position, values in enumerate(itertools.product(CLASSES, CHANNELS, BATCHES)):
            # Classes, channels and batches in a Latin arrangement: 4 of 16 hold every class count once.
            usual = (position + number) % 4 == (position // 4) % 4
            marks = [] if usual else [pytest.mark.slow]
            found.append(pytest.param(entry, *values, id=f"{entry.name}-{'-'.join(map(str, values))}", marks=marks))
    return found


def fits(caps: AttackCaps, classes: int, channels: int) -> bool:
    return (
        caps.min_classes <= classes <= (caps.max_classes or classes)
        and (caps.channels is None or channels in caps.channels)
    )  # fmt: skip


@pytest.mark.parametrize(("entry", "classes", "channels", "size"), cases())
def test_it_runs_or_says_that_it_cannot(entry: Entry, classes: int, channels: int, size: int) -> None:
    caps: AttackCaps = entry.spec.caps  # type: ignore[assignment]
    if not fits(caps, classes, channels):
        return
    module = net(classes, channels)
    norm = sorted(caps.norms)[(CLASSES.index(classes) + size) % len(caps.norms)]
    targeted = "untargeted" not in caps.goals
    victim = Victim(module, classes, stream=Stream(0, "victim"), batch_size=size)
    params = quick(entry)
    attack = entry.make(params, **{n: Victim(module, classes) for n in entry.needs(params)})
    some = batch(classes, channels, targeted)
    eps = EPS[norm]
    sets = MinimumNorm(norm, eps) if caps.minimum_norm else allowed(attack, norm, eps)
    before = fingerprint(module)
    threat = Threat(sets, Targeted() if targeted else Untargeted(), caps.access)
    try:
        made = attack(victim, some, threat, Stream(0, "a"))
    except AdvplugError as error:
        if "needs the package" in str(error):
            pytest.skip(str(error))
        raise
    assert made.x.shape == some.x.shape
    assert made.x.dtype == some.x.dtype
    assert made.x.isfinite().all()
    assert sets.check(some.x, made.x, made.applied).all()
    assert differences(before, fingerprint(module)) == []


def test_the_usual_run_holds_every_pair() -> None:
    """Over all attacks each pair of values occurs; for each attack each class count does."""
    usual = [c.values for c in cases() if not c.marks]
    for entry in registry().entries("attack"):
        assert {v[1] for v in usual if v[0] is entry} in (set(CLASSES), set())
    for first, second in ((1, 2), (1, 3), (2, 3)):
        pairs = {(v[first], v[second]) for v in usual}
        sets = {1: CLASSES, 2: CHANNELS, 3: BATCHES}
        assert pairs == set(itertools.product(sets[first], sets[second]))


def test_capabilities_are_used_by_the_matrix() -> None:
    from advplug.matrix import Axes, expand
    from advplug.plans import bind

    known = registry()
    dataset = bind(known, "dataset", Reference("fake", (("classes", "2"), ("channels", "1"))))
    model = bind(known, "model", Reference("cnn"))
    narrow = [e for e in known.entries("attack") if isinstance(e.spec.caps, AttackCaps) and not fits(e.spec.caps, 2, 1)]
    axes = Axes((dataset,), (model,), attacks=tuple(Reference(e.name) for e in narrow))
    for sweep in expand(axes, known):
        assert sweep.refused is not None, sweep.attack.label
        assert "classes" in str(sweep.refused) or "channels" in str(sweep.refused)
