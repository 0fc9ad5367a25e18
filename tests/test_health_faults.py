"""Each check against a really broken victim or attack, and against its repaired twin: the whole path runs."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug import contracts, session
from advplug.registry import Source, load

CLASSES, PIXELS = 4, 64
LOW, HIGH = 64 / 255, 191 / 255


def _data(n: int = 160) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of 64/255 and 191/255 around class prototypes, and a linear classifier that is right on all of them."""
    draws = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 2, (CLASSES, PIXELS), generator=draws).float()
    y = torch.arange(n) % CLASSES
    flips = torch.rand(n, PIXELS, generator=draws) < 0.25
    x = torch.where(prototypes[y].bool() ^ flips, HIGH, LOW)
    weight = prototypes - prototypes.mean(0)
    right = ((x - 0.5) @ weight.T - 0.25 * weight.sum(1)).argmax(1) == y
    return x[right].view(-1, 1, 8, 8), y[right], weight


X, Y, WEIGHT = _data()


class Linear(nn.Module):
    """The sound victim that every fault is put into."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T - 0.25 * self.weight.sum(1)


class OneBit(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(x > 0.5, HIGH, LOW))


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


class _FlippedGradient(_NanGradient):
    @staticmethod
    def backward(ctx, grad):
        return -grad


class NanGradient(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_NanGradient.apply(x))


class FlippedGradient(Linear):
    """Gradients point away from every success, so noise does better."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_FlippedGradient.apply(x))


class OffGrid(Linear):
    """Wrong only between the 8-bit levels."""

    def forward(self, x: Tensor) -> Tensor:
        between = torch.sin(torch.pi * 255 * x).square().flatten(1).mean(1, keepdim=True)
        return super().forward(x) * (1 - 4 * between)


class BatchStatistics(Linear):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits - 0.5 * logits.mean(0)


class Guess(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor([0.0, 0.0, 0.0, 1.0]) + torch.tensor([1.0, 0, 0, -9.0])


class Snapping(Linear):
    """Beyond .06 from the two levels it answers for the nearest grid point, without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        snapped = torch.where(x > 0.5, HIGH, LOW)
        far = ((x - snapped).abs().flatten(1).amax(1, keepdim=True) > 0.06).float()
        return far * super().forward(snapped) * 2 + (1 - far) * super().forward(x)


class HalfDetached(Linear):
    """No gradient from the half of the pixels that says as much as the other."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=3)
        return super().forward(torch.cat([left, right.detach()], 3))


class Saturated(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1000


class Drawing(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.05 * torch.randn(x.shape))


class Probabilities(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Standardised(Linear):
    """Trained, one might say, on (x - 0.5) / 0.5: pixels that are bright on average speak for the first class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5 + 0.5) + 20 * x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0, 0, 0])


def flags(model: nn.Module, attack="pgd:steps=20", eps="28/255", **options) -> set[str]:
    result = advplug.evaluate(model, attack, dataset=(X, Y), classes=CLASSES, eps=eps, **options)
    assert [c.reason for c in result.failed] == []
    row = result.threats[-1]
    assert (row.verdict == "not trustworthy") == any(f.level == "error" for f in row.flags)
    return {f.name for f in row.flags if f.level != "info" or f.name == "lost-in-rounding"}


@pytest.mark.parametrize("attack", ["pgd:steps=20", "apgd:steps=20", "fgsm"])
def test_the_sound_twin_carries_no_flag(attack):
    assert flags(Linear(), attack) == set()


def test_the_standard_protocol_on_the_sound_twin_is_trusted():
    result = advplug.evaluate(Linear(), dataset=(X[:40], Y[:40]), eps="1/20")
    assert [(t.verdict, t.flags, t.unchecked) for t in result.threats] == [("trusted", (), ())]


@pytest.mark.parametrize(
    ("model", "name", "eps"),
    [
        (OneBit(), "zero-gradients", "28/255"),
        (NanGradient(), "nonfinite-gradients", "28/255"),
        (OffGrid(), "lost-in-rounding", "1/255"),
        (Guess(), "near-chance", "28/255"),
        (BatchStatistics(), "batch-dependent", "28/255"),
        (FlippedGradient(), "noise-beats-attack", "2/5"),
        (Snapping(), "rises-with-budget", "28/255"),
        (HalfDetached(), "gradient-mismatch", "28/255"),
        (Saturated(), "saturated-logits", "28/255"),
        (Drawing(), "randomised-without-eot", "28/255"),
        (Probabilities(), "probabilities", "28/255"),
        (Standardised(), "undeclared-normalisation", "28/255"),
        (OneBit(), "unbounded-attack-fails", "28/255"),
    ],
)
def test_a_broken_victim_trips_its_check(model, name, eps):
    assert name in flags(model, eps=eps)


def test_steps_too_small_let_one_step_win():
    assert "one-step-beats-iterative" in flags(Linear(), "ifgsm:steps=5,alpha=1/100000")
    assert flags(Linear(), "ifgsm:steps=5") == set()


def test_twice_the_steps_find_what_too_few_leave():
    assert "not-converged" in flags(Linear(), "pgd:steps=5,alpha=1/300")
    assert flags(Linear(), "pgd:steps=40") == set()


def test_random_search_finds_what_masked_gradients_hide():
    result = advplug.evaluate(OneBit(), ["pgd:steps=5", "square:queries=1000"], dataset=(X, Y), eps="2/5")
    (row,) = result.threats
    assert "black-box-beats-white-box" in {f.name for f in row.flags}
    sound = advplug.evaluate(Linear(), ["pgd:steps=20", "square:queries=1000"], dataset=(X, Y), eps="12/255")
    assert (sound.threats[0].flags, sound.threats[0].unchecked) == ((), ())


class Plugin:
    """An attack that ignores its budget, and a defense whose declared gradient misleads, with repaired twins."""

    @staticmethod
    @advplug.hookimpl
    def advplug_attacks():
        caps = contracts.AttackCaps(contracts.Access.DECISION, frozenset({"linf"}))
        white = contracts.AttackCaps(contracts.Access.GRADIENT, frozenset({"linf"}))
        found = [contracts.Spec(n, f"{__name__}:{n}", caps, n) for n in ("overstep", "instep")]
        return [*found, *(contracts.Spec(n, f"{__name__}:{n}", white, n) for n in ("first_kept", "last_kept"))]

    @staticmethod
    @advplug.hookimpl
    def advplug_defenses():
        caps = contracts.DefenseCaps(("wrap",), contracts.Gradient.BPDA)
        noise = contracts.DefenseCaps(("wrap",), stochastic=True)
        found = [contracts.Spec(n, f"{__name__}:{n}", caps, n) for n in ("misled", "honest")]
        return [*found, contracts.Spec("shaken", f"{__name__}:shaken", noise, "shaken")]


class _Point:
    @staticmethod
    def load() -> type:
        return Plugin


def _blast(factor: float):
    def attack(victim, batch, threat, rng):
        return contracts.Crafted((batch.x + factor * threat.eps).clamp(0, 1))

    return attack


def _there_and_back(keep: int):
    """Steps to where the victim is fooled, then back; returns the images of either place."""

    def attack(victim, batch, threat, rng):
        toward = (WEIGHT[(batch.y + 1) % CLASSES] - WEIGHT[batch.y]).sign().view_as(batch.x)
        stations = [(batch.x + threat.eps * toward).clamp(0, 1), batch.x]
        fooled = victim.decide(stations[0]).label != batch.y
        return contracts.Crafted(stations[keep], contracts.Trace(any_iterate=fooled))

    return attack


def first_kept():
    return _there_and_back(0)


def last_kept():
    return _there_and_back(1)


def overstep():
    return _blast(2)


def instep():
    return _blast(1)


def misled():
    return (contracts.Wrap(lambda f, x, rng: f(x), contracts.Gradient.BPDA, (lambda f, x, rng: -f(x),)),)


def honest():
    return (contracts.Wrap(lambda f, x, rng: f(x), contracts.Gradient.BPDA, (lambda f, x, rng: f(x),)),)


def shaken():
    def forward(inner, x, rng):
        return inner((x + 0.01 * torch.randn(x.shape, generator=rng)).clamp(0, 1))

    return (contracts.Wrap(forward, stochastic=True, draws=4),)


@pytest.fixture
def with_plugin(monkeypatch):
    known = load([(Source("faulty", "faulty", "1"), _Point)])
    assert not known.broken
    monkeypatch.setattr(session, "registry", lambda: known)


@pytest.mark.usefixtures("with_plugin")
def test_an_attack_outside_its_budget_is_reported_and_projected():
    result = advplug.evaluate(Linear(), ["overstep"], dataset=(X, Y), eps="28/255")
    (cell,) = result.cells
    assert [f.name for f in cell.flags] == ["perturbation-violation"]
    assert f"{len(Y)} images lay outside the budget, by up to 0.1" in cell.flags[0].detail
    assert cell.metrics["linf_median"] is None or cell.metrics["linf_median"].value <= 28 / 255 + 1e-6
    twin = advplug.evaluate(Linear(), ["instep"], dataset=(X, Y), eps="28/255")
    assert twin.cells[0].flags == ()
    assert cell.metrics["robust_accuracy"] == twin.cells[0].metrics["robust_accuracy"]


@pytest.mark.usefixtures("with_plugin")
def test_successes_that_are_not_returned_are_seen():
    assert "silent-success" in flags(Linear(), "last_kept")
    assert "silent-success" not in flags(Linear(), "first_kept")


@pytest.mark.usefixtures("with_plugin")
def test_a_defense_without_effect_is_called_so_and_stays_trusted():
    result = advplug.evaluate(Linear(), "apgd", "honest", dataset=(X, Y), eps="1/50")
    assert [f.name for f in result.threats[1].flags] == ["defense-adds-nothing"]
    assert [t.verdict for t in result.threats] == ["trusted", "trusted"]


@pytest.mark.usefixtures("with_plugin")
def test_a_surrogate_that_misleads_is_beaten_by_transfer():
    assert "static-beats-adaptive" in flags(Linear(), defense="misled")
    assert flags(Linear(), defense="honest") == set()


@pytest.mark.usefixtures("with_plugin")
def test_static_bare_and_adaptive_stand_side_by_side():
    result = advplug.evaluate(Linear(), "pgd:steps=20", "misled", dataset=(X, Y), eps="1/20")
    baseline, defended = (c.metrics for c in result.cells)
    assert baseline["static_robust_accuracy"] is None
    assert defended["adaptive_robust_accuracy"].value > baseline["robust_accuracy"].value + 0.15
    assert defended["bare_robust_accuracy"] == baseline["robust_accuracy"]
    assert defended["static_robust_accuracy"] == baseline["robust_accuracy"]
    assert defended["robust_accuracy"] == baseline["robust_accuracy"]
    assert result.threats[1].difference_to_baseline.value == 0


@pytest.mark.usefixtures("with_plugin")
def test_batch_dependence_shows_through_a_randomised_wrap():
    assert "batch-dependent" in flags(BatchStatistics(), "pgd:steps=3", defense="shaken")
    assert flags(Linear(), "pgd:steps=10", defense="shaken") == set()


@pytest.mark.usefixtures("with_plugin")
def test_a_randomised_victim_is_decided_afresh_with_its_spread():
    result = advplug.evaluate(Linear(), "pgd:steps=10", "shaken", dataset=(X, Y), eps="12/255")
    robust = result.cells[1].metrics["adaptive_robust_accuracy"]
    assert robust.spread is not None
    assert any("EOT" in note for note in result.cells[1].notes)


def test_linear_victim_is_judged_exactly():
    """Robust accuracy equals the share of images whose closed-form distance exceeds eps."""
    logits = Linear()(X).detach()
    gaps = logits.gather(1, Y[:, None]) - logits
    reach = (WEIGHT[Y][:, None] - WEIGHT[None]).abs().sum(2)
    distance = torch.where(reach > 0, gaps / reach.clamp_min(1e-9), torch.inf).amin(1)
    for eps in (Fraction(1, 100), Fraction(1, 50), Fraction(1, 20)):
        result = advplug.evaluate(Linear(), "pgd", dataset=(X, Y), eps=str(eps))
        assert result.cells[0].metrics["robust_accuracy"].value == pytest.approx(
            (distance > float(eps)).float().mean().item()
        )


def test_images_that_are_to_transfer_go_on_after_success():
    """Crafted with early leaving they just fool the model without its wrap, and say nothing of it with it."""
    defense = "denoise:method=median"
    stop, on = (
        advplug.evaluate("cnn", f"pgd:steps=20{more}", defense, dataset="digits:size=16", n=40, audit="none").cells[1]
        for more in ("", ",keep_going=yes")
    )
    for origin in ("static", "bare"):
        values = [c.metrics[f"{origin}_robust_accuracy"].value for c in (stop, on)]
        assert values[0] == values[1] < 0.6
    assert stop.metrics["adaptive_robust_accuracy"].value <= stop.metrics["static_robust_accuracy"].value


def test_noise_on_the_scores_needs_no_averaging_where_attackers_do_not_see_it():
    result = advplug.evaluate(Linear(), "pgd:steps=20", "score-noise", dataset=(X, Y), train=(X, Y), eps="28/255")
    assert "randomised-without-eot" not in {f.name for f in result.threats[1].flags}


@pytest.mark.parametrize("seed", [1, 3])
def test_kinks_near_the_images_are_no_wrong_gradient(seed):
    """With one step length, 4 or more of 32 images of these networks met one."""
    result = advplug.evaluate("cnn", "fgsm", n=60, seed=seed)
    assert "gradient-mismatch" not in {f.name for f in result.threats[0].flags}
