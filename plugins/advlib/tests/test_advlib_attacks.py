"""adv-lib's attacks: conformance, closed forms, and a small network on which every one of them is run."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from advplug.contracts import Ball, Batch, Crafted, Goal, MinimumNorm, Targeted, Threat, Untargeted
from advplug.errors import CellFailure
from advplug.perturbations import BALLS
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing import check_attack
from advplug.testing.problems import linear_problem
from advplug.testing.sources import bound
from advplug.victim import Victim
from advplug_advlib.adapter import library
from advplug_advlib.table import ROWS, Row

FAST: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 12},
    "apgd-t": {"steps": 12},
    "apgd-min": {"steps": 20, "searches": 10},
    "alma": {"steps": 150, "lr": 0.01},
    "fab": {"steps": 30},
    "cw-l2": {"steps": 60, "searches": 6},
    "tr": {"radius": 0.01},
}
"""Parameters with which the test takes about a second."""
LONG = ("pdgd", "pdpgd", "cw-linf", "sigma-zero")
"""Attacks that take longer to converge: only tried on the network in the fast tests."""
DIFFERS = {
    ("apgd", "loss"), ("apgd-t", "loss"), ("apgd-min", "loss"), ("apgd-t", "targets"), ("ddn", "levels"),
    ("fmn", "steps"), ("tr", "steps"), ("alma", "lr"), ("pdpgd", "lr"),
}  # fmt: skip
"""The defaults that are not adv-lib's; see the README."""
EPS = {"linf": Fraction(1, 8), "l2": Fraction(7, 10), "l1": Fraction(2), "l0": Fraction(3)}
SHORT = {"apgd-t": {"steps": 50},
         "apgd-min": {"steps": 20, "searches": 8}, "alma": {"steps": 200}, "pdgd": {"steps": 200},
         "pdpgd": {"steps": 200}, "sigma-zero": {"steps": 200}, "cw-l2": {"steps": 100, "searches": 6},
         "cw-linf": {"steps": 50, "largest_const": 5.0}}  # fmt: skip
"""Fewer steps for the network, where the defaults take more than a second."""
SHARE = {"cw-l2": 0.3, "cw-linf": 0.0}
"""How much of the reference these find in so few steps; others half of it."""


def run(name: str, victim: Victim, batch: Batch, threat: Threat, **params: Any) -> Crafted:
    entry = registry().get("attack", name)
    made: Crafted = entry.make(bound(entry, params))(victim, batch, threat, Stream(0, "attack"))
    return made


def cases() -> list[Any]:
    return [pytest.param(row, norm, id=f"{row.name}-{norm}") for row in ROWS for norm in row.norms]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits: images (N, 1, 8, 8) and labels."""
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


@functools.cache
def network(classes: int = 10) -> nn.Module:
    """A small ReLU network, trained for a moment on the first digits."""
    x, y = digits()
    x, y = x[y < classes], y[y < classes]
    with Stream(0, "network").as_global(), torch.enable_grad():
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, classes))
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(150):
            rows = torch.randint(0, len(x) - 100, (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.requires_grad_(False).eval()


def right(net: nn.Module, images: int = 10) -> Batch:
    """Digits that the network gets right; the target is its second choice."""
    x, y = (t[-100:] for t in digits())
    best = net(x).argsort(1, descending=True)
    rows = (best[:, 0] == y).nonzero().flatten()[:images]
    return Batch(x[rows], y[rows], rows, best[rows, 1])


@pytest.mark.parametrize("row", [r for r in ROWS if r.name not in LONG], ids=lambda r: r.name)
def test_conformance(row: Row) -> None:
    check_attack(f"adv.{row.name}", **FAST.get(row.name, {}))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_conformance_with_defaults(row: Row) -> None:
    check_attack(f"adv.{row.name}", **({"steps": 1000} if row.name == "cw-l2" else {}))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_defaults_are_the_librarys(row: Row) -> None:
    function = functools.reduce(getattr, row.function.split("."), library())
    known = inspect.signature(function).parameters
    differs = {o.spec.name for o in row.options if known[o.keyword].default != o.spec.default}
    assert {(row.name, name) for name in differs} == {d for d in DIFFERS if d[0] == row.name}
    further = {k for keywords in row.extra.values() for k in keywords}
    assert further | {k for k in (row.norm, row.eps) if k} <= set(known)
    assert ("targeted" in row.goals) <= ("targeted" in known)


CLOSE = [("ddn", "l2", 1.02), ("fmn", "linf", 1.02), ("fmn", "l2", 1.02), ("fmn", "l1", 1.02), ("alma", "l2", 1.05),
         ("fab", "linf", 1.01), ("fab", "l2", 1.01), ("fab", "l1", 1.01), ("apgd-min", "l2", 1.1),
         ("deepfool", "l2", 1.03), ("deepfool", "linf", 1.05), ("superdeepfool", "l2", 1.03), ("tr", "l2", 1.1),
         ("cw-l2", "l2", 1.1)]  # fmt: skip


@pytest.mark.parametrize(("name", "norm", "factor"), CLOSE)
def test_reaches_the_exact_distance(name: str, norm: str, factor: float) -> None:
    problem = linear_problem(norm)
    victim, allowed = problem.victim(), MinimumNorm(norm, problem.eps)
    x = run(f"adv.{name}", victim, problem.copy(), Threat(allowed), **FAST.get(name, {})).x
    ratio = allowed.measure(problem.batch.x, x) / problem.radius
    assert (victim.decide(x).label != problem.batch.y).all()
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= factor


@pytest.mark.parametrize("name", ["apgd", "apgd-t", "pgd"])
def test_exactly_the_images_within_eps_flip(name: str) -> None:
    problem = linear_problem("linf", images=21)
    victim = problem.victim()
    # From one end of the ball to the other PGD takes 60 of its steps.
    x = run(f"adv.{name}", victim, problem.copy(), problem.threat(), steps=100).x
    reachable = problem.radius <= float(problem.eps)
    sure = (problem.radius / float(problem.eps) - 1).abs() > 0.02
    assert torch.equal((victim.decide(x).label != problem.batch.y)[sure], reachable[sure])


@functools.cache
def reference(norm: str, targeted: bool) -> int:
    """How many images a gradient attack of another kind breaks within the budget."""
    net, goal = network(), Targeted("random") if targeted else Untargeted()
    batch, victim = right(net), Victim(net, 10)
    name, params = ("adv.fmn", {"steps": 300}) if norm == "l0" else ("apgd", {"restarts": 3})
    entry = registry().get("attack", name)
    allowed = MinimumNorm(norm, EPS[norm]) if norm == "l0" else Ball(norm, EPS[norm])
    x = entry.make(bound(entry, params))(victim, batch, Threat(allowed, goal), Stream(0, "reference")).x
    return int((hits(victim, batch, x, goal) & Ball(norm, EPS[norm]).check(batch.x, x)).sum())


def hits(victim: Victim, batch: Batch, x: Tensor, goal: Goal) -> Tensor:
    label = victim.decide(x).label
    return label == batch.target if isinstance(goal, Targeted) else label != batch.y


def broken(row: Row, norm: str, goal: Goal, **params: Any) -> int:
    """How many images of the network's it breaks within the budget; prints a line of the table."""
    net = network()
    batch, victim = right(net), Victim(net, 10)
    allowed = MinimumNorm(norm, EPS[norm]) if row.seeks else Ball(norm, EPS[norm])
    x = run(f"adv.{row.name}", victim, batch, Threat(allowed, goal), **params).x
    success = hits(victim, batch, x, goal)
    within = int((success & Ball(norm, EPS[norm]).check(batch.x, x)).sum())
    found = f"{within:2} of {len(batch)} within {EPS[norm]}, {int(success.sum()):2} at all"
    print(f"adv.{row.name:14} {norm:5} {goal!s:16} {found}, {victim.passes.forward} forward passes")
    if row.seeks and not row.eps:
        assert int(success.sum()) >= len(batch) - 1
    return within


@pytest.mark.parametrize(("row", "norm"), cases())
def test_network(row: Row, norm: str) -> None:
    """All images where the change is minimised, and within eps many of those that another attack breaks."""
    count = broken(row, norm, Untargeted(), **SHORT.get(row.name, {}))
    assert count >= SHARE.get(row.name, 0.5) * reference(norm, targeted=False)


@pytest.mark.parametrize(("row", "norm"), [c for c in cases() if "targeted" in c.values[0].goals])
def test_network_targeted(row: Row, norm: str) -> None:
    count = broken(row, norm, Targeted("random"), **SHORT.get(row.name, {}))
    assert count >= SHARE.get(row.name, 0.5) * reference(norm, targeted=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("row", "norm"), [c for c in cases() if c.values[0].name in SHORT])
def test_network_with_defaults(row: Row, norm: str) -> None:
    params = {"steps": 1000} if row.name == "cw-l2" else {}
    share = 0.4 if row.name == "cw-linf" else 0.8
    assert broken(row, norm, Untargeted(), **params) >= share * reference(norm, targeted=False)


def test_one_changed_value_is_enough() -> None:
    """FMN in L0 on an image whose label hangs on one pixel, alone in its batch: adv-lib's own call fails."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[0, 5] = 1.0
        net[1].bias.copy_(torch.tensor([0.0, 0.3]))
    x = torch.full((1, 1, 8, 8), 0.5)
    batch, victim = Batch(x, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)), Victim(net, 2)
    with pytest.raises(RuntimeError):
        library().fmn(net, x, batch.y, norm=0, steps=100)
    allowed = MinimumNorm("l0", Fraction(8))
    made = run("adv.fmn", victim, batch, Threat(allowed))
    assert int(victim.decide(made.x).label) == 1
    assert float(allowed.measure(x, made.x)) == 1


def test_fmn_is_put_back_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no answer")

    home = importlib.import_module("adv_lib.attacks.fast_minimum_norm")
    names = [n for n in vars(home) if n.endswith("_projection_")]
    before = [getattr(home, n) for n in names]
    batch = right(network(), 2)
    with pytest.raises(ValueError, match="no answer"):
        run("adv.fmn", Victim(Failing(), 10), batch, Threat(MinimumNorm("l2", Fraction(1))))
    assert [getattr(home, n) for n in names] == before


@pytest.mark.parametrize(
    ("name", "classes", "goal", "instead"),
    [("apgd", 2, Untargeted(), "use loss=ce"), ("apgd", 3, Targeted("random"), "use loss=ce"),
     ("apgd-t", 3, Untargeted(), "use loss=ce"), ("alma", 3, Targeted("random"), "use adv.pdgd")],
)  # fmt: skip
def test_too_few_classes_for_the_loss(name: str, classes: int, goal: Goal, instead: str) -> None:
    net = network(classes)
    threat = Threat(MinimumNorm("l2", Fraction(1)) if name == "alma" else Ball("l2", Fraction(1)), goal)
    has_loss = "loss" in instead
    with pytest.raises(CellFailure, match=instead):
        run(f"adv.{name}", Victim(net, classes), right(net, 2), threat, **({"loss": "dlr"} if has_loss else {}))
    if has_loss:
        plain = run(f"adv.{name}", Victim(net, classes), right(net, 2), threat, loss="ce").x
        assert torch.equal(run(f"adv.{name}", Victim(net, classes), right(net, 2), threat).x, plain)
        wide = network(5)
        ratio = run(f"adv.{name}", Victim(wide, 5), right(wide, 2), threat, loss="dlr").x
        assert torch.equal(run(f"adv.{name}", Victim(wide, 5), right(wide, 2), threat).x, ratio)


def test_levels_round() -> None:
    net = network()
    batch = right(net, 4)
    threat = Threat(MinimumNorm("l2", Fraction(1)))
    x = run("adv.ddn", Victim(net, 10), batch, threat, levels=256).x * 255
    assert torch.allclose(x, x.round(), atol=1e-4)
    free = run("adv.ddn", Victim(net, 10), batch, threat).x * 255
    assert not torch.allclose(free, free.round(), atol=1e-2)


def test_norms_are_those_of_the_toolkit() -> None:
    assert {norm for row in ROWS for norm in row.norms} == set(BALLS)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys\nfrom advplug.registry import registry\n"
        "names = [e.describe()['name'] for e in registry().entries('attack') if e.name.startswith('adv.')]\n"
        f"assert len(names) == {len(ROWS)}, names\n"
        "assert 'torch' not in sys.modules and 'adv_lib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
