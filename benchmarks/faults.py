"""Broken defenses and broken attacks, each with what breaks it and with a repaired twin, as plugins.

A fault is what has been published as robustness, or is easily mistaken for it: the defense hides its gradient, or the
attack wastes it. `stand_in` is what whoever broke it by hand would differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import advplug
from advplug.contracts import (
    Access,
    AttackCaps,
    Batch,
    Crafted,
    Defense,
    DefenseCaps,
    Gradient,
    Objective,
    Param,
    Spec,
    Strength,
    Threat,
    Trace,
    Tune,
    Tuned,
    Wrap,
)
from advplug.registry import Registry, Source, load
from advplug.rng import Stream
from advplug.train import Training
from advplug.victim import input_gradient

Net = Callable[[Tensor], Tensor]
Forward = Callable[[Net, Tensor, Any], Tensor]


# --- broken defenses: what they do to images and logits ----------------------------------------------


def smooth(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def plain(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(x)


def smoothed(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(smooth(x))


def detached(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(smooth(x.detach()))


def one_bit(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net((x > 0.5).to(x))


def rounded_logits(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(x).round()


def times_100(net: Net, x: Tensor, rng: Any) -> Tensor:
    return 100 * net(x)


def probabilities(net: Net, x: Tensor, rng: Any) -> Tensor:
    return (10 * net(x)).softmax(1)


def answers_only(net: Net, x: Tensor, rng: Any) -> Tensor:
    logits = net(x)
    return 10.0 * functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits)


def sigmoid_input(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(torch.sigmoid(1e4 * (x - 0.5)))


def gentle_sigmoid(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(torch.sigmoid(10 * (x - 0.5)))


def half_detached(net: Net, x: Tensor, rng: Any) -> Tensor:
    """No gradient for images that look like an even class."""
    logits = net(x)
    even = (logits.argmax(1) % 2 == 0)[:, None]
    return torch.where(even, logits.detach(), logits)


ROUGH = 0.03
"""Mean distance of a digit from its smoothed version: at most 0.0293 on clean ones, 0.0387 with sign noise of 0.1."""


def _roughness(x: Tensor) -> Tensor:
    return (x - smooth(x)).abs().flatten(1).mean(1, keepdim=True)


def nan_on_rough(net: Net, x: Tensor, rng: Any) -> Tensor:
    """A penalty that is the logarithm of a negative number for images rougher than clean ones."""
    return net(x) + 0.01 * torch.log(ROUGH - _roughness(x))


def clamped_penalty(net: Net, x: Tensor, rng: Any) -> Tensor:
    return net(x) + 0.01 * torch.log((ROUGH - _roughness(x)).clamp_min(1e-3))


def fixed_noise(net: Net, x: Tensor, rng: Any) -> Tensor:
    """The same seed in each pass, so that an image's noise depends on its place in the batch."""
    return net(x + 0.08 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x))


def one_noise(net: Net, x: Tensor, rng: Any) -> Tensor:
    """The same noise for every image."""
    return net(x + 0.08 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x))


def drop_pixels(net: Net, x: Tensor, rng: Any) -> Tensor:
    """Dropout on the image; without `rng`, from torch's global state."""
    keep = torch.rand(x.shape, generator=rng, device=x.device) > 0.1
    return net(x * keep / 0.9)


def resize(net: Net, x: Tensor, rng: Any) -> Tensor:
    """Scaled down by up to an eighth and put at a random place, as Xie et al. 2018 do (arXiv 1711.01991)."""
    size = x.shape[-1]
    low = size - size // 8
    draw = torch.randint(0, 1 << 30, (3,), generator=rng, device=x.device).tolist()
    small = low + draw[0] % (size - low + 1)
    left, top = draw[1] % (size - small + 1), draw[2] % (size - small + 1)
    scaled = functional.interpolate(x, (small, small), mode="bilinear", align_corners=False)
    return net(functional.pad(scaled, (left, size - small - left, top, size - small - top)))


def undeclared(forward: Forward) -> Forward:
    """Draws from the global generator, unseen by whoever attacks."""
    return lambda net, x, rng: forward(net, x, None)


@dataclass(frozen=True)
class BrokenDefense:
    """`fault` and `twin` are the parts a defense is made of; one of `checks` must name the fault.

    `adapted`: what the model is tuned to before, where it would otherwise not read such images.
    """

    name: str
    fault: Wrap
    twin: Wrap
    stand_in: Forward
    checks: tuple[str, ...]
    adapted: str = ""

    def stack(self, kind: str) -> str:
        """The reference of the `broken` or `sound` defense."""
        return f"adapted:to={self.adapted}+{kind}-{self.name}" if self.adapted else f"{kind}-{self.name}"


def _bpda(forward: Forward, surrogate: Forward) -> Wrap:
    return Wrap(forward, Gradient.BPDA, (surrogate,))


ADAPTED: dict[str, Forward] = {"one-bit": one_bit, "dropped": drop_pixels, "resized": resize}


def adapted(to: Annotated[Literal["one-bit", "dropped", "resized"], Param("what the model learns to read")]) -> Defense:
    """Three more epochs on images as the defense changes them."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        return functional.cross_entropy(ADAPTED[to](model, x, None), y)

    def apply(model: nn.Module, training: Training) -> Tuned:
        return Tuned(training.fit(model, Objective(loss), schedule=replace(training.schedule, epochs=3)))

    return (Tune(apply),)


DRAWS = 8
MASKED = ("zero-gradients", "gradient-mismatch")
DEFENSES = (
    BrokenDefense("detached-gradient", Wrap(detached), Wrap(smoothed), smoothed, MASKED),
    # Single bits are a puzzle that random search solves better than any stand-in; the repair is a soft threshold.
    BrokenDefense("one-bit-input", Wrap(one_bit), Wrap(gentle_sigmoid), gentle_sigmoid, MASKED, "one-bit"),
    BrokenDefense("quantised-logits", Wrap(rounded_logits), _bpda(rounded_logits, plain), plain, MASKED),
    BrokenDefense("logits-times-100", Wrap(times_100), Wrap(plain), plain, ("saturated-logits", "zero-gradients")),
    BrokenDefense("softmax-output", Wrap(probabilities), Wrap(plain), plain, ("probabilities",)),
    BrokenDefense("argmax-layer", Wrap(answers_only), _bpda(answers_only, plain), plain, MASKED),
    BrokenDefense(
        "saturating-sigmoid",
        Wrap(sigmoid_input),
        Wrap(gentle_sigmoid),
        gentle_sigmoid,
        MASKED,
        "one-bit",
    ),
    BrokenDefense("half-detached", Wrap(half_detached), Wrap(plain), plain, MASKED),
    BrokenDefense("nan-logits", Wrap(nan_on_rough), Wrap(clamped_penalty), plain, ("nonfinite-gradients",)),
    BrokenDefense("fixed-seed-noise", Wrap(fixed_noise), Wrap(one_noise), fixed_noise, ("batch-dependent",)),
    BrokenDefense(
        "dropout-without-eot",
        Wrap(undeclared(drop_pixels)),
        Wrap(drop_pixels, stochastic=True, draws=DRAWS),
        drop_pixels,
        ("randomised-without-eot",),
        "dropped",
    ),
    BrokenDefense(
        "random-resizing",
        Wrap(undeclared(resize)),
        Wrap(resize, stochastic=True, draws=DRAWS),
        resize,
        ("randomised-without-eot",),
        "resized",
    ),
)


# --- broken attacks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descent:
    """A plain PGD with something to go wrong: its direction, budget, steps, or what it hands in."""

    steps: int = 20
    sign: float = 1.0
    scale: float = 1.0
    share: float = 0.125
    best: bool = True

    def __call__(self, victim: Any, batch: Batch, threat: Threat, rng: Any) -> Crafted:
        x, y, eps = batch.x, batch.y, self.scale * threat.eps
        at, kept = x.clone(), x.clone()
        fooled = torch.zeros_like(y, dtype=torch.bool)
        with victim.frozen(), torch.enable_grad():
            for _ in range(self.steps):
                at.requires_grad_()
                logits = victim.attacked(at)
                gradient = input_gradient(functional.cross_entropy(logits, y, reduction="none"), at)
                victim.passes.backward += len(x)
                kept = torch.where(fooled[:, None, None, None], kept, at.detach())
                fooled |= logits.argmax(1) != y
                moved = at.detach() + self.sign * self.share * eps * gradient.sign()
                at = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
        fooled_last = victim.decide(at).label != y
        best = torch.where((fooled & ~fooled_last)[:, None, None, None], kept, at)
        return Crafted(best if self.best else at, Trace(any_iterate=(fooled | fooled_last).cpu()))


@dataclass(frozen=True)
class BrokenAttack:
    """An attack on the undefended model that claims too much, and the same without its fault."""

    name: str
    fault: Descent
    checks: tuple[str, ...]


STD = 0.3081
"""The standard deviation that MNIST's pixels are customarily divided by."""
ATTACKS = (
    BrokenAttack("sign-flipped-labels", Descent(sign=-1.0), ("one-step-beats-iterative", "noise-beats-attack")),
    BrokenAttack("eps-in-normalised-units", Descent(scale=STD), ("one-step-beats-iterative",)),
    BrokenAttack("max-iter-1", Descent(steps=1), ("one-step-beats-iterative",)),
    BrokenAttack("last-iterate-only", Descent(share=2.0, best=False), ("silent-success",)),
)
SOUND = Descent()


# --- registration ------------------------------------------------------------------------------------


class _Plugin:
    """All of the above, through the hooks that every plugin uses."""

    @staticmethod
    @advplug.hookimpl
    def advplug_defenses() -> list[Spec]:
        tuning = DefenseCaps(("tune",))
        found = [Spec("adapted", f"{__name__}:adapted", tuning, "tuned to images as a defense changes them")]
        for d in DEFENSES:
            for prefix, wrap in (("broken", d.fault), ("sound", d.twin)):
                caps = DefenseCaps(("wrap",), wrap.gradient, wrap.stochastic)
                found.append(
                    Spec(f"{prefix}-{d.name}", f"{__name__}:{_factory(prefix, d.name, (wrap,))}", caps, d.name)
                )
        return found

    @staticmethod
    @advplug.hookimpl
    def advplug_attacks() -> list[Spec]:
        caps = AttackCaps(Access.GRADIENT, frozenset({"linf"}), strength=Strength.ITERATIVE)
        named = [(f"broken-{a.name}", a.fault) for a in ATTACKS] + [("sound-descent", SOUND)]
        return [Spec(n, f"{__name__}:{_factory('attack', n, attack)}", caps, n) for n, attack in named]


def _factory(prefix: str, name: str, made: Any) -> str:
    """A factory of this module that returns `made`."""
    attribute = f"{prefix}_{name}".replace("-", "_")

    def make() -> Any:
        return made

    globals()[attribute] = make
    return attribute


class _Point:
    @staticmethod
    def load() -> type:
        return _Plugin


def registry() -> Registry:
    """Everything that is installed, with the faults and twins beside it."""
    return load([(Source("faults", "advplug-faults", "0"), _Point)])
