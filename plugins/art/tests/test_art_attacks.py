"""Every attack of ART: what it does to a small CNN, and the conformance kit. `-s` prints the table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import AttackCaps, Batch, Crafted, MinimumNorm, Targeted, Threat, Untargeted
from advplug.perturbations import Perturbation, perturbation
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing import check_attack
from advplug.testing.attacks import Blind, NoGradient
from advplug.testing.sources import bound
from advplug.victim import Victim
from advplug_art.attack_table import ROWS

SHAPE, CLASSES = (3, 12, 12), 4
EPS = {"linf": Fraction(2, 5), "l2": Fraction(3), "l1": Fraction(20), "l0": Fraction(60),
       "patch": Fraction(1, 2), "unrestricted": Fraction(1)}  # fmt: skip
FAST: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 50},
    "acg": {"steps": 50},
    "reacg": {"steps": 50},
    "autoattack": {"steps": 10, "restarts": 1, "square_steps": 20},
    "cw-l2": {"steps": 20},
    "brendel-bethge": {"steps": 20},
    "universal": {"rounds": 2},
    "targeted-universal": {"rounds": 5},
    "adversarial-patch": {"steps": 40},
    "newtonfool": {"eta": 0.1},
    "shadow": {"steps": 40, "copies": 2, "lambda_tv": 0.02, "lambda_c": 0.1},
    "wasserstein": {"steps": 3},
    "composite": {"rounds": 1, "steps": 4},
    "boundary": {"queries": 300},
    "hopskipjump": {"queries": 300},
    "geoda": {"queries": 300},
    "signopt": {"queries": 300},
    "square": {"queries": 100},
    "simba": {"queries": 600, "step": 0.2},
    "zoo": {"queries": 3000, "lr": 0.1},
    "pixel": {"queries": 1600},
    "threshold": {"queries": 4000},
    "laser": {"queries": 40},
    "spatial": {"num_rotations": 3, "num_translations": 3, "max_rotation": 90.0, "max_translation": 30.0},
}
SLOW = {
    "cw-l2", "cw-linf", "elastic-net", "brendel-bethge", "zoo", "pixel", "threshold", "signopt", "boundary",
    "universal", "wasserstein",
}  # fmt: skip
BLACK_BOXES = [row.name for row in ROWS.values() if row.access != "gradient"]


def cases() -> list[Any]:
    def marks(name: str) -> list[Any]:
        needs = ROWS[name].needs
        absent = bool(needs) and find_spec(needs) is None
        made = [pytest.mark.skipif(absent, reason=f"{needs} is not installed"), pytest.mark.timeout(600)]
        return made + [pytest.mark.slow] * (name in SLOW)

    return [pytest.param(name, marks=marks(name)) for name in ROWS]


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(16 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x - 0.5).flatten(1))
        return logits


@dataclass(frozen=True)
class Trained:
    module: Net
    batch: Batch


@pytest.fixture(scope="module")
def trained() -> Trained:
    """The net, trained on noisy smooth patterns, with images that it gets right.

    Labels are smoothed: attacks on probabilities (NewtonFool, SimBA, virtual adversarial) see nothing where a model
    is quite sure.
    """
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(CLASSES, 3, 4, 4, generator=g)
    patterns = nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear")
    y = torch.arange(512) % CLASSES
    x = (0.25 + 0.5 * patterns[y] + 0.1 * torch.randn(512, *SHAPE, generator=g)).clamp(0, 1)
    with Stream(0, "net").as_global():
        module = Net()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(20):
        for rows in torch.arange(512).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows], label_smoothing=0.2).backward()
            optimizer.step()
    module.eval()
    right = (module(x).argmax(1) == y).nonzero().flatten()[:6]
    assert len(right) == 6
    return Trained(module, Batch(x[right], y[right], right + 100))


def allowed(caps: AttackCaps, norm: str) -> Perturbation:
    return MinimumNorm(norm, EPS[norm]) if caps.minimum_norm else perturbation(norm, EPS[norm])


def run(name: str, victim: Victim, batch: Batch, norm: str, seed: int = 0, **more: Any) -> Crafted:
    entry = registry().get("attack", f"art.{name}")
    caps: AttackCaps = entry.spec.caps  # type: ignore[assignment]
    goal = Untargeted() if "untargeted" in caps.goals else Targeted(0)
    if isinstance(goal, Targeted):
        batch = Batch(batch.x, batch.y, batch.index, torch.zeros_like(batch.y))
    attack = entry.make(bound(entry, FAST.get(name, {}) | more))
    made: Crafted = attack(victim, batch, Threat(allowed(caps, norm), goal, caps.access), Stream(seed, "attack"))
    return made


def test_thirty_four_are_registered() -> None:
    entries = [e for e in registry().entries("attack") if e.name.startswith("art.") and e.name[4:] in ROWS]
    assert len(entries) == len(ROWS) == 34
    for entry in entries:
        assert entry.spec.summary
        assert entry.spec.paper
        assert set(entry.spec.caps.threat) <= {p.name for p in entry.params()}  # type: ignore[union-attr]
        assert entry.make(bound(entry, {})) is not None


@pytest.mark.parametrize("name", cases())
def test_it_flips_images_of_a_small_cnn(name: str, trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    rows = []
    for norm in ROWS[name].norms:
        victim, started = Victim(trained.module, CLASSES, batch_size=32), time.perf_counter()
        made = run(name, victim, trained.batch, norm)
        seconds = time.perf_counter() - started
        assert capfd.readouterr() == ("", "")
        caps: AttackCaps = registry().get("attack", f"art.{name}").spec.caps  # type: ignore[assignment]
        assert allowed(caps, norm).check(trained.batch.x, made.x).all()
        flips = int((victim.decide(made.x).label != trained.batch.y).sum())
        asked = "-"
        if made.trace is not None and made.trace.queries is not None:
            asked = f"{made.trace.queries.float().mean():.0f}"
            assert (made.trace.queries <= FAST.get(name, {}).get("queries", 10**9)).all()
        rows.append(f"art.{name:20} {norm:12} flips {flips}/6 {seconds:6.2f} s  queries {asked}")
        assert flips >= 1, f"art.{name} in {norm} flips nothing"
    print("\n".join(rows))


@pytest.mark.parametrize("name", cases())
def test_it_keeps_the_contract(name: str) -> None:
    check_attack(f"art.{name}", **FAST.get(name, {}))


@pytest.mark.parametrize("name", [case for case in cases() if case.values[0] in BLACK_BOXES])
def test_black_boxes_need_no_gradient_and_count_their_queries(name: str, trained: Trained) -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not x.requires_grad
            with torch.no_grad():
                return trained.module(x)

    kind = Blind if ROWS[name].access == "decision" else NoGradient
    norm, batch = ROWS[name].norms[0], trained.batch.take(torch.arange(2))
    victim = kind(Opaque(), CLASSES, batch_size=32)
    budget = {} if name == "virtual-adversarial" else {"queries": 60}
    made = run(name, victim, batch, norm, **budget)
    assert made.trace is not None
    queries = made.trace.queries
    assert queries is not None
    assert (queries > 0).all()
    assert int(queries.sum()) == victim.passes.forward
    if budget:
        assert (queries <= 60).all()
        again = run(name, kind(Opaque(), CLASSES, batch_size=1), batch, norm, **budget)
        assert torch.equal(again.x, made.x)
