"""The cascade: its parts and their order, who gets which images, merged traces, and the published code's results."""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.attacks.cascade import Cascade, Part
from advplug.attacks.engine import GradientAttack
from advplug.attacks.fab import FabT
from advplug.attacks.square import Square
from advplug.builtin.autoattack import autoattack
from advplug.contracts import Ball, Batch, Crafted, Goal, Targeted, Threat, Trace, Untargeted, Wrap
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.testing import check_attack
from advplug.victim import Victim
from linear import problem, stream, threat, wrong

SMALL: dict[str, Any] = {"steps": 10, "n_targets": 3, "queries": 30}


def test_conforms() -> None:
    check_attack("autoattack", steps=12, n_targets=3, queries=15)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_breaks_exactly_what_is_within_reach(norm: str, classes: int) -> None:
    p = problem(classes)
    eps = float(p.distance(norm).median())
    aim = threat(eps, norm)
    out = autoattack(**SMALL)(p.victim(), p.batch, aim, stream())
    flipped = wrong(p.victim(), out.x, p.batch.y)
    sure = (p.distance(norm) * 1.02 < eps) | (p.distance(norm) > eps)
    assert torch.equal(flipped[sure], (p.distance(norm) < eps)[sure])
    assert aim.perturbation.check(p.batch.x, out.x).all()


def test_targeted_hits_the_target_where_it_can() -> None:
    p = problem(4)
    batch = replace(p.batch, target=(p.batch.y + 1) % 4)
    attack = autoattack(**SMALL)
    out = attack(p.victim(), batch, threat(1e-5, goal=Targeted()), stream())
    assert (p.victim().decide(out.x).label == p.batch.y).all()
    out = attack(p.victim(), batch, threat(0.2, goal=Targeted()), stream())
    assert torch.equal(p.victim().decide(out.x).label, batch.target)
    with pytest.raises(UsageError, match="a targeted attack needs"):
        attack(p.victim(), p.batch, threat(0.1, goal=Targeted()), stream())


def shaken(inner: Any, x: Tensor, rng: torch.Generator) -> Tensor:
    return inner(x + 0.01 * torch.randn(x.shape, generator=rng, dtype=x.dtype))  # type: ignore[no-any-return]


def chosen(victim: Victim, goal: Goal, **parameters: Any) -> dict[str, Any]:
    return {part.name: part.attack for part in autoattack(**parameters).choose(victim, goal)}


def test_parts_are_the_published_ones() -> None:
    p = problem(5)
    parts = chosen(p.victim(), Untargeted())
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    shared = {"rule": "adaptive", "steps": 100, "restarts": 1, "start": "uniform", "precision": "auto"}
    assert parts["apgd-ce"] == GradientAttack(loss="ce", **shared)  # type: ignore[arg-type]
    assert parts["apgd-t"] == GradientAttack(loss="dlr", n_targets=9, **shared)  # type: ignore[arg-type]
    assert parts["fab-t"] == FabT(100, 9, 0.1, 1.05, 0.9)
    assert parts["square"] == Square(5000, 0.8, rescale=False, restarts=1)
    small = chosen(p.victim(), Untargeted(), steps=7, n_targets=2, queries=9, precision="float32")
    assert (small["apgd-ce"].steps, small["apgd-t"].n_targets, small["fab-t"].n_targets) == (7, 2, 2)
    assert (small["apgd-t"].steps, small["fab-t"].steps, small["square"].queries) == (7, 7, 9)


@pytest.mark.parametrize(("classes", "goal", "second"), [
    (5, Untargeted(), "dlr"), (3, Untargeted(), "dlr"), (2, Untargeted(), "margin"), (3, Targeted(), "margin"),
])  # fmt: skip
def test_randomised_victims_get_their_own_version(classes: int, goal: Goal, second: str) -> None:
    victim = problem(classes).victim((Wrap(shaken, stochastic=True, draws=4),))
    parts = chosen(victim, goal)
    assert list(parts) == ["apgd-ce", f"apgd-{second}"]
    assert [a.loss for a in parts.values()] == ["ce", second]
    assert all(a.draws == 20 and a.steps == 100 for a in parts.values())


def test_a_randomised_victim_is_attacked_through_its_draws() -> None:
    p = problem(3)
    victim = p.victim((Wrap(shaken, stochastic=True, draws=4),))
    attack = autoattack(steps=5, draws=6)
    out = attack(victim, p.batch, threat(0.06), stream())
    assert wrong(p.victim(), out.x, p.batch.y).all()
    assert victim.passes.backward == 5 * 6 * sum(seen for _, seen in attack.broken.values())


class Shift:
    """Breaks the images of these positions by a known change, and notes whom it was given."""

    def __init__(self, breaks: set[int], step: float) -> None:
        self.breaks, self.step = breaks, step
        self.given: list[int] = []

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        self.given = batch.index.tolist()
        hit = torch.tensor([i in self.breaks for i in self.given])
        change = torch.where(hit, 1.0, -self.step)[:, None, None, None]
        n = len(batch)
        one = torch.ones(n, dtype=torch.long)
        # It claims success everywhere: nobody should believe it.
        trace = Trace(torch.ones(n, dtype=torch.bool), hit, one * 2, one, queries=one * 10)
        return Crafted(batch.x + change, trace)


def test_each_part_gets_what_the_ones_before_left(caplog: pytest.LogCaptureFixture) -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.full((len(x),), 0.5), x.flatten(1).mean(1)], 1)

    parts = [Part(name, Shift(breaks, step)) for name, breaks, step in (("a", {10, 13}, 0.1), ("b", {12}, 0.2))]
    unused = Part("c", Shift(set(), 0.3))
    batch = Batch(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), torch.arange(10, 14))
    victim = Victim(Positive(), 2, batch_size=3)
    attack = Cascade(lambda v, goal: (*parts, unused))
    with caplog.at_level(logging.INFO, "advplug.attacks.cascade"):
        out = attack(victim, batch, threat(1.0), stream())
    assert [p.attack.given for p in (*parts, unused)] == [[10, 11, 12, 13], [11, 12], [11]]  # type: ignore[attr-defined]
    torch.testing.assert_close(out.x[:, 0, 0, 0], torch.tensor([1.0, -0.1, 1.0, 1.0]))
    assert attack.broken == {"a": (2, 4), "b": (1, 2), "c": (0, 1)}
    assert "b broke 1 of 2 images" in caplog.messages
    trace = out.trace
    assert trace is not None
    assert trace.any_iterate is not None
    assert trace.any_iterate.all()
    for value, expected in (
        (trace.final_iterate, [True, False, True, True]), (trace.steps, [2, 6, 4, 2]),
        (trace.zero_gradient, [1, 3, 2, 1]), (trace.queries, [10, 30, 20, 10]),
    ):  # fmt: skip
        assert value is not None
        assert value.tolist() == expected
    assert trace.nonfinite is None


def test_an_image_goes_on_while_one_draw_of_its_answers_is_right() -> None:
    """Every draw counts in the accuracy: what two of three draws are fooled by may be fooled in all."""
    drawn = itertools.count()

    def by_turns(inner: object, x: Tensor, rng: object) -> Tensor:
        """Right in one of three answers below 1."""
        level = x.flatten(1).mean(1)
        wrong = (level >= 1) | ((level > 0) & (next(drawn) % 3 > 0))
        return torch.stack([torch.full((len(x),), 0.5), wrong.to(x)], 1)

    class Up(Shift):
        def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
            self.given = batch.index.tolist()
            return Crafted(batch.x + self.step)

    batch = Batch(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long), torch.arange(2))
    # An attacker's single draw decides nothing: it is asked as often as it is judged.
    victim = Victim(nn.Flatten(), 2, (Wrap(by_turns, stochastic=True, draws=1, decisions=3),))
    first, second, third = (Up(set(), step) for step in (0.5, 1.0, 0.7))
    attack = Cascade(lambda v, goal: (Part("a", first), Part("b", second), Part("c", third)))
    out = attack(victim, batch, threat(1.0), stream())
    assert (first.given, second.given, third.given) == ([0, 1], [0, 1], [])
    assert (out.x == 1).all()
    assert attack.broken == {"a": (2, 2), "b": (0, 2)}
    search = Cascade(lambda v, goal: (Part("a", first), Part("b", second, gradient=False)))
    trace = search(victim, batch, threat(1.0), stream()).trace
    assert trace is not None
    assert trace.black_box is not None
    assert not trace.black_box.any(), "the gradient had broken them before"


# --- against the published code --------------------------------------------------------------------


def official(net: nn.Module, batch: Batch, norm: str, eps: float, **small: int) -> Tensor:
    """Images of the published implementation with the same settings."""
    module = pytest.importorskip("pyautoattack")
    name = {"linf": "Linf", "l2": "L2"}[norm]
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"]
    made = module.AutoAttack(net, norm=name, eps=eps, seed=0, version="custom", attacks=attacks, device="cpu")
    made.verbose = False
    made.apgd.n_restarts = made.fab.n_restarts = made.apgd_targeted.n_restarts = 1
    made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = small["steps"]
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = small["n_targets"]
    made.square.n_queries = small["queries"]
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        trace = sys.gettrace()
        found: Tensor = made.run_standard_evaluation(batch.x, batch.y, batch_size=len(batch.x))[0]
        sys.settrace(trace)  # its check of the model switches tracing off
    return found


def compared(net: nn.Module, batch: Batch, norm: str, eps: Fraction, **small: int) -> tuple[int, int]:
    """Images left standing by this cascade and by the published code."""
    attack = autoattack(**small)  # type: ignore[arg-type]
    out = attack(Victim(net, 10), batch, Threat(Ball(norm, eps)), stream())
    theirs = official(net, batch, norm, float(eps), **small)
    with torch.no_grad():
        return tuple(int((net(x).argmax(1) == batch.y).sum()) for x in (out.x, theirs))  # type: ignore[return-value]


def digit_net() -> tuple[nn.Module, Batch]:
    """A small net, trained on handwritten digits, with test images that it gets right."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy((data.images / 16).astype(np.float32))[:, None]
    y = torch.from_numpy(data.target).long()
    with Stream(0, "net").as_global():
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(80):
            rows = torch.randint(0, 1500, (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        right = (net(x[1500:]).argmax(1) == y[1500:]).nonzero().flatten()[:60] + 1500
    return net, Batch(x[right], y[right], right)


@pytest.mark.parametrize(("norm", "eps"), [("linf", Fraction(1, 12)), ("l2", Fraction(2, 5))])
def test_as_strong_as_the_published_code(norm: str, eps: Fraction) -> None:
    net, batch = digit_net()
    ours, theirs = compared(net, batch, norm, eps, steps=12, n_targets=4, queries=60)
    assert 5 < theirs < 55
    assert ours <= theirs + 1


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", Fraction(1, 255)), ("l2", Fraction(1, 8))])
def test_as_strong_as_the_published_code_on_cifar10(norm: str, eps: Fraction, data_folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        import engine_models  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    net = engine_models.victim_net().eval()
    batch = engine_models.batch(engine_models.images(), 0, 100)
    ours, theirs = compared(net, batch, norm, eps, steps=20, n_targets=3, queries=100)
    assert 0 < theirs < 90
    assert ours <= theirs + 1
