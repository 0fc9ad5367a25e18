"""AutoAttack and its parts: conformance, closed forms, and the authors' own ensemble as the reference."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pyautoattack
import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

import advplug
from advplug.contracts import Access, Ball, Batch, Crafted, Gradient, Targeted, Threat, Wrap
from advplug.errors import CellFailure, UsageError
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing import check_attack
from advplug.testing.problems import LinearProblem, linear_problem
from advplug.testing.sources import bound
from advplug.victim import Victim
from advplug.wrapping import AsModule
from advplug_autoattack import ATTACKS, parts

FAST: dict[str, dict[str, Any]] = {
    "aa.standard": {"steps": 8, "queries": 20, "targets": 3},
    "aa.plus": {"steps": 8, "queries": 20, "restarts": 1, "targets": 3},
    "aa.rand": {"steps": 10, "draws": 2},
    "aa.apgd-ce": {"steps": 20},
    "aa.apgd-dlr": {"steps": 20},
    "aa.apgd-t": {"steps": 15, "targets": 3},
    "aa.fab": {"steps": 10, "restarts": 2},
    "aa.fab-t": {"steps": 10, "targets": 3},
    "aa.square": {"queries": 50},
}
TABLE = {"steps": 30, "queries": 150, "targets": 3, "restarts": 2, "draws": 2}
NAMES = [spec.name for spec in ATTACKS]


def run(name: str, victim: Victim, batch: Batch, threat: Threat, **params: Any) -> Crafted:
    entry = registry().get("attack", name)
    made: Crafted = entry.make(bound(entry, params))(victim, batch, threat, Stream(0, "attack"))
    return made


def wrong(victim: Victim, x: Tensor, batch: Batch) -> Tensor:
    return victim.decide(x).label != batch.y


class Net(nn.Module):
    """A small ReLU network with random weights on 8 x 8 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        with Stream(1, "net").as_global():
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers((x - 0.5) * 10)
        return logits


def labelled(net: nn.Module, images: int = 24, side: int = 8) -> Batch:
    """Random images, labelled as the network sees them; the target is its second choice."""
    x = torch.rand(images, 1, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        best = net(x).argsort(1, descending=True)
    return Batch(x, best[:, 0], torch.arange(images), best[:, 1])


def ball(norm: str, eps: str) -> Threat:
    return Threat(Ball(norm, Fraction(eps)))


def test_every_attack_is_listed_here() -> None:
    assert set(FAST) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_conformance(name: str) -> None:
    check_attack(name, **FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_conformance_with_published_settings(name: str) -> None:
    check_attack(name)


def clear(problem: LinearProblem) -> Tensor:
    """The images whose exact radius is not eps itself."""
    return (problem.radius / float(problem.eps) - 1).abs() > 0.02


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["aa.apgd-ce", "aa.apgd-dlr", "aa.apgd-t", "aa.fab", "aa.fab-t"])
def test_exactly_the_images_within_eps_flip(name: str, norm: str) -> None:
    problem = linear_problem(norm, images=21)
    victim = problem.victim()
    crafted = run(name, victim, problem.copy(), problem.threat())
    flipped, reachable = wrong(victim, crafted.x, problem.batch), problem.radius <= float(problem.eps)
    sure = clear(problem)
    assert int((reachable & sure).sum()) >= 9
    assert torch.equal(flipped[sure], reachable[sure])


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("name", ["aa.standard", "aa.plus", "aa.rand", "aa.apgd-t", "aa.fab-t"])
def test_any_number_of_classes(name: str, classes: int) -> None:
    problem = linear_problem("linf", images=2 * classes + 5, classes=classes)
    victim = problem.victim()
    crafted = run(name, victim, problem.copy(), problem.threat(), **FAST[name] | {"steps": 20})
    flipped, reachable = wrong(victim, crafted.x, problem.batch), problem.radius <= float(problem.eps)
    sure = clear(problem)
    assert torch.equal(flipped[sure], reachable[sure])


def official(net: nn.Module, batch: Batch, threat: Threat, targets: int) -> Tensor:
    """What the authors' AutoAttack returns, with 30 queries; its checks clear the trace function."""
    attack = pyautoattack.AutoAttack(
        net, norm=parts.NORMS[threat.norm], eps=threat.eps, seed=torch.initial_seed(), version="standard", device="cpu"
    )
    attack.square.n_queries = 30
    attack.fab.n_target_classes = targets
    attack.apgd_targeted.n_target_classes = min(targets, attack.apgd_targeted.n_target_classes)
    trace = sys.gettrace()
    try:
        x, _ = attack.run_standard_evaluation(batch.x, batch.y, batch_size=len(batch))
    finally:
        sys.settrace(trace)
    return x


@pytest.mark.parametrize("targets", [2, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("norm", "eps"), [("linf", "1/100"), ("l2", "1/20"), ("l1", "3/20")])
def test_same_images_as_the_authors_ensemble(norm: str, eps: str, targets: int) -> None:
    """Their published settings with fewer queries (and, unless slow, fewer targets), bit for bit."""
    net = Net()
    batch, threat = labelled(net, 5), ball(norm, eps)
    with Stream(0, "reference").as_global():
        expected = official(net, batch, threat, targets)
    with Stream(0, "reference").as_global():
        module = AsModule(Victim(net, 10), Access.GRADIENT)
        made = parts.Standard(100, targets, 30)(module, batch, threat)
    broken = net(expected).argmax(1) != batch.y
    assert 0 < int(broken.sum()) < 5
    assert torch.equal(made, expected)


def test_trace_function_and_terminal_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    net = Net(3)

    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        run("aa.standard", Victim(net, 3), labelled(net, 4), ball("linf", "1/50"), **FAST["aa.standard"])
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer
    assert capfd.readouterr() == ("", "")


def test_square_asks_the_deployed_system() -> None:
    """Through a stand-in without gradients the other parts are blind; Square, in the ensemble too, is not."""

    def flat(inner: Any, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(torch.full_like(x, 0.5)) + 0 * inner(x)

    def forward(inner: Any, x: Tensor, rng: torch.Generator) -> Tensor:
        logits: Tensor = inner(x)
        return logits

    net = Net()
    clean = net(torch.full((1, 1, 8, 8), 0.5)).argmax(1)
    batch = labelled(net, 200)
    batch = batch.take(batch.y == clean)
    assert len(batch) >= 8
    victim = Victim(net, 10, (Wrap(forward, Gradient.BPDA, surrogates=(flat,)),))
    threat = ball("linf", "1/10")
    blind = run("aa.apgd-t", victim, batch, threat, steps=10)
    assert torch.equal(blind.x, batch.x)
    made = run("aa.standard", victim, batch, threat, steps=10, queries=200)
    assert int(wrong(victim, made.x, batch).sum()) >= len(batch) // 2


def test_averages_as_many_draws_as_asked() -> None:
    def noisy(inner: Any, x: Tensor, rng: torch.Generator) -> Tensor:
        logits: Tensor = inner(x + 0.05 * torch.randn(x.shape, generator=rng))
        return logits

    net = Net()
    batch, threat = labelled(net, 2), ball("linf", "1/1000")
    randomised = Victim(net, 10, (Wrap(noisy, stochastic=True, draws=8),))
    attack = parts.Apgd("ce", steps=5, draws=20)
    with Stream(0, "draws").as_global():
        attack(AsModule(randomised, Access.GRADIENT), batch, threat)
    # One look at the clean images, then six gradients of 3 passes of 8 draws.
    assert randomised.passes.forward in {8 * k + 8 * 3 * 6 * k for k in (1, 2)}
    assert randomised.passes.backward in {8 * 3 * 6 * k for k in (1, 2)}
    fixed = Victim(net, 10)
    with Stream(0, "draws").as_global():
        attack(AsModule(fixed, Access.GRADIENT), batch, threat)
    assert fixed.passes.backward == 2 * 6


def test_square_hits_targets() -> None:
    net = Net()
    batch, victim = labelled(net), Victim(net, 10)
    threat = Threat(Ball("linf", Fraction(1, 10)), Targeted("random"), Access.SCORE)
    crafted = run("aa.square", victim, batch, threat, queries=300)
    assert int((victim.decide(crafted.x).label == batch.target).sum()) >= 20
    assert crafted.trace is not None
    assert crafted.trace.queries is not None
    assert int(crafted.trace.queries.max()) <= 300


@pytest.mark.parametrize(("queries", "restarts"), [(4, 1), (60, 1), (61, 3)])
def test_square_asks_no_more_than_allowed_and_counts_each_image(queries: int, restarts: int) -> None:
    net = Net()
    batch, victim = labelled(net), Victim(net, 10)
    crafted = run("aa.square", victim, batch, ball("linf", "1/30"), queries=queries, restarts=restarts)
    assert crafted.trace is not None
    assert crafted.trace.queries is not None
    asked, broken = crafted.trace.queries, wrong(victim, crafted.x, batch)
    assert int(asked.sum()) == victim.passes.forward - len(batch), "one more for each to see what is broken"
    assert 0 < int(broken.sum()) < len(batch)
    assert (asked[~broken] == 1 + restarts * ((queries - 1) // restarts)).all(), "who resists is asked to the end"
    assert (asked[broken] <= queries).all()
    assert (asked[broken] < queries).any()


def test_square_with_too_few_queries_for_its_restarts() -> None:
    with pytest.raises(UsageError, match=r"aa\.square: 3 restarts need at least 10 queries, got 9"):
        run("aa.square", Victim(Net(), 10), labelled(Net(), 2), ball("linf", "1/20"), queries=9, restarts=3)


def test_squares_shrink_over_the_queries_if_asked_to() -> None:
    net = Net()
    batch, threat = labelled(net), ball("linf", "1/20")
    plain = run("aa.square", Victim(net, 10), batch, threat, queries=60)
    shrunk = run("aa.square", Victim(net, 10), batch, threat, queries=60, rescale=True)
    assert not torch.equal(plain.x, shrunk.x)


@pytest.mark.parametrize(("height", "width"), [(s, s) for s in range(3, 33)] + [(9, 7), (32, 28), (20, 33), (15, 10)])
def test_tiles_says_where_square_fits(height: int, width: int) -> None:
    x = torch.full((1, 1, height, width), 0.5)
    attack = SquareAttack(lambda x: torch.tensor([[1.0, 0.0]]).repeat(len(x), 1), "L2", n_queries=1, eps=0.5)
    with Stream(0, "tiles").as_global():
        try:
            attack.perturb(x, torch.zeros(1, dtype=torch.long))
            runs = True
        except (RuntimeError, ZeroDivisionError):
            runs = False
    assert parts.tiles(height, width) == runs


def test_images_that_square_cannot_tile() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(14 * 14, 3))
    batch = labelled(net, 4, side=14)
    with pytest.raises(CellFailure, match="14 x 14 pixels; use linf"):
        run("aa.square", Victim(net, 3), batch, ball("l2", "1/10"), queries=5)
    run("aa.square", Victim(net, 3), batch, ball("linf", "1/10"), queries=5)


def test_network_every_attack_finds_what_standard_finds() -> None:
    """Prints the table; each gradient attack breaks at least four fifths of what the ensemble breaks."""
    net = Net()
    batch, threat = labelled(net), ball("linf", "1/50")
    broken = {}
    for name in NAMES:
        victim = Victim(net, 10)
        params = {k: v for k, v in TABLE.items() if k in {p.name for p in registry().get("attack", name).params()}}
        x = run(name, victim, batch, threat, **params).x
        broken[name] = int(wrong(victim, x, batch).sum())
        print(f"{name:12} {broken[name]:2} of {len(batch)}, {victim.passes.forward} forward passes")
    best = broken["aa.standard"]
    assert 6 <= best <= 22
    assert max(broken.values()) - best <= 1
    for name, count in broken.items():
        assert count >= (0.25 if name == "aa.square" else 0.8) * best, name


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys\nfrom advplug.registry import registry\n"
        "names = [e.describe()['name'] for e in registry().entries('attack') if e.name.startswith('aa.')]\n"
        "assert len(names) == 9, names\nassert 'torch' not in sys.modules and 'pyautoattack' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [
        ("aa.apgd-t", 2, ["APGD-T climbs the cross-entropy"]),
        ("aa.apgd-t", 3, ["APGD-T climbs the cross-entropy"]),
        ("aa.apgd-t", 4, []),
        ("aa.rand", 2, ["APGD-DLR is left out"]),
        ("aa.rand", 3, []),
    ],
)
def test_what_fewer_classes_change_is_noted_at_the_cell(name: str, classes: int, words: list[str]) -> None:
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4) % classes
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    steps = f"{name}:steps=5" if name != "aa.rand" else f"{name}:steps=5,draws=2"
    (cell,) = advplug.evaluate(net, steps, dataset=(x, y), classes=classes, eps="0.1", audit="none").cells
    assert cell.status == "ok"
    noted = [note for note in cell.notes if "classes" in note]
    assert len(noted) == len(words)
    assert all(word in note for word, note in zip(words, noted, strict=True))
