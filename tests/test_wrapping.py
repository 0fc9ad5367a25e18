"""Other libraries' attacks: what they see of the victim, what they may return, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linear
from advplug.contracts import Access, Ball, Batch, Crafted, Gradient, MinimumNorm, Targeted, Threat, Wrap
from advplug.craft import craft
from advplug.decisions import Batching
from advplug.errors import CellFailure
from advplug.rng import Stream
from advplug.testing.problems import fragile, fragile_batch
from advplug.testing.state import differences, fingerprint, with_gradients
from advplug.victim import Passes, Victim
from advplug.wrapping import AsModule, Wrapped

THREAT = Threat(Ball("linf", Fraction(1, 10)))


def wrapped(call: Callable[..., Tensor], **options: Any) -> Wrapped:
    return Wrapped("lib.attack", call, **{"access": Access.GRADIENT, **options})


def scene(wraps: tuple[Wrap, ...] = (), **fields: Any) -> tuple[Victim, Batch]:
    module = fragile()
    return Victim(module, 10, wraps, **fields), fragile_batch(module, images=5)


# --- the victim as a module -------------------------------------------------------------------------


def test_gradients_and_passes_are_those_of_the_attacked_view() -> None:
    double = Wrap(
        lambda f, x, rng: f(x).round(), Gradient.BPDA, surrogates=(lambda f, x, rng: f(x), lambda f, x, rng: 2 * f(x))
    )
    victim, batch = scene((double,))
    for view, factor in ((0, 1), (1, 2)):
        point = batch.x.clone().requires_grad_()
        AsModule(victim, Access.GRADIENT, view)(point).sum().backward()
        own = batch.x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(factor * victim.module(own).sum(), own)
        assert torch.allclose(point.grad, expected)  # type: ignore[arg-type]
    assert (victim.passes.forward, victim.passes.backward) == (10, 10)


def test_a_randomised_victim_answers_with_the_logarithms_of_its_mean_probabilities() -> None:
    """Half of the draws are sure of class 0: the mean logits would be, too."""

    def torn(f: Callable[[Tensor], Tensor], x: Tensor, rng: torch.Generator) -> Tensor:
        sure = torch.rand(len(x), 1, generator=rng) < 0.5
        return torch.where(sure, 50 * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10), f(x))

    victim, batch = scene((Wrap(torn, stochastic=True, draws=4000),))
    point = batch.x.clone().requires_grad_()
    seen = AsModule(victim, Access.GRADIENT)(point)
    assert (victim.passes.forward, victim.passes.backward) == (5 * 4000, 0)
    own = victim.module(batch.x).softmax(1)
    wanted = 0.5 * own + 0.5 * nn.functional.one_hot(torch.zeros(5, dtype=torch.long), 10)
    assert (seen.exp() - wanted).abs().max() < 0.05
    assert torch.allclose(seen.exp().sum(1), torch.ones(5), atol=1e-4)
    chances = AsModule(victim, Access.GRADIENT, probabilities=True)(batch.x)
    assert (chances - wanted).abs().max() < 0.05
    nn.functional.cross_entropy(seen, batch.y).backward()
    assert victim.passes.backward == 5 * 4000


def test_one_draw_is_the_view_itself() -> None:
    plain, drawn = (scene((Wrap(lambda f, x, rng: f(x), stochastic=s, draws=1),)) for s in (False, True))
    (victim, batch), (noisy, _) = plain, drawn
    assert torch.equal(AsModule(noisy, Access.GRADIENT)(batch.x), AsModule(victim, Access.GRADIENT)(batch.x))


def test_scores_and_labels_come_without_gradient_from_the_deployed_system() -> None:
    rounding = Wrap(lambda f, x, rng: f(x).round(), Gradient.BPDA, surrogates=(lambda f, x, rng: f(x),))
    victim, batch = scene((rounding,))
    point = batch.x.clone().requires_grad_()
    scores = AsModule(victim, Access.SCORE)(point)
    assert torch.equal(scores, victim.module(batch.x).round())
    assert not scores.requires_grad
    labels = AsModule(victim, Access.DECISION, probabilities=True)(point)
    assert torch.equal(labels.argmax(1), scores.argmax(1))
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    chances = AsModule(victim, Access.SCORE, probabilities=True)(batch.x)
    assert torch.allclose(chances.sum(1), torch.ones(5))


def test_images_of_another_precision_are_converted_and_a_model_needs_no_parameters() -> None:
    victim, batch = scene()
    assert AsModule(victim, Access.GRADIENT)(batch.x.double()).dtype == torch.float32
    bare = Victim(linear.Function(lambda x: x.flatten(1)[:, :2]), 2)
    module = AsModule(bare, Access.GRADIENT)
    assert next(module.parameters()).device == torch.device("cpu")
    assert module(torch.zeros(1, 1, 2, 2, dtype=torch.float64)).dtype == torch.float64


# --- what comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b, t: 1 / 0, "lib.attack raised ZeroDivisionError: division by zero"),
        (lambda m, b, t: b.x * float("nan"), "lib.attack returned NaN or infinite pixels"),
        (lambda m, b, t: b.x[:-1], "lib.attack returned"),
        (lambda m, b, t: b.x.flatten(1), "lib.attack returned"),
        (lambda m, b, t: (b.x + 0.2).clamp(0, 1), "lib.attack left the perturbation set on 5 images, by up to 0.1"),
        (lambda m, b, t: b.x - 0.05 - b.x.amin(), "lib.attack left the perturbation set"),
    ],
)
def test_a_failing_attack_is_a_failed_cell_with_its_reason(call: Any, message: str) -> None:
    victim, batch = scene()
    with pytest.raises(CellFailure, match=message):
        craft(wrapped(call), victim, batch, THREAT, Stream(0, "a"), Batching(8), "lib.attack")


def test_rounding_is_projected_away_and_the_smallest_change_has_no_ball() -> None:
    victim, batch = scene()
    over = wrapped(lambda m, b, t: b.x.clamp(0.2, 0.8) + 0.10001)
    middle = Batch(batch.x.clamp(0.2, 0.8), batch.y, batch.index)
    x = over(victim, middle, THREAT, Stream(0, "a")).x
    assert THREAT.perturbation.check(middle.x, x).all()
    far = wrapped(lambda m, b, t: 1 - b.x)
    free = Threat(MinimumNorm("linf", Fraction(1, 10)))
    assert torch.equal(far(victim, batch, free, Stream(0, "a")).x, 1 - batch.x)


def test_batches_are_no_larger_than_allowed_and_all_views_are_tried_on_what_is_left() -> None:
    sizes: list[int] = []

    def call(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        sizes.append(len(part))
        return part.x

    pair = Wrap(lambda f, x, rng: f(x), surrogates=(lambda f, x, rng: f(x), lambda f, x, rng: f(x)))
    victim, batch = scene((pair,), batch_size=2)
    wrapped(call)(victim, batch, THREAT, Stream(0, "a"))
    assert sizes == [2, 2, 2, 2, 1, 1]
    sizes.clear()
    wrapped(call, one_by_one=True, access=Access.SCORE)(victim, batch, THREAT, Stream(0, "a"))
    assert sizes == [1] * 5


# --- query budgets ----------------------------------------------------------------------------------


def search(module: AsModule, part: Batch, threat: Threat) -> Tensor:
    """Asks for ever larger changes, for ever, and would return nothing of use."""
    step = 0
    while True:
        step += 1
        module((part.x + 0.004 * step * (-1 if step % 2 else 1)).clamp(0, 1))


class Corner(nn.Module):
    """Class 1 where the mean of the image exceeds 0.55."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).mean(1) - 0.55
        return torch.stack([-z, z], 1)


def corner(n: int = 3) -> tuple[Victim, Batch]:
    x = torch.full((n, 1, 2, 2), 0.5)
    return Victim(Corner(), 2), Batch(x, torch.zeros(n, dtype=torch.long), torch.arange(n))


@pytest.mark.parametrize("access", [Access.SCORE, Access.DECISION])
def test_a_search_ends_with_its_queries_and_keeps_the_closest_success(access: Access) -> None:
    victim, batch = corner()
    attack = wrapped(search, access=access, one_by_one=True, queries=20)
    made = attack(victim, batch, THREAT, Stream(0, "a"))
    assert victim.passes.forward == 60
    assert made.trace is not None
    assert made.trace.queries is not None
    assert made.trace.queries.tolist() == [20] * 3
    assert made.x.flatten().tolist() == pytest.approx([0.556] * 12), "the first change of 14 steps upward"
    few = wrapped(search, access=access, one_by_one=True, queries=10)(victim, batch, THREAT, Stream(0, "a"))
    assert torch.equal(few.x, batch.x)


def test_the_closest_success_for_a_target() -> None:
    victim, batch = corner(1)
    goal = Threat(Ball("linf", Fraction(1, 10)), Targeted("next"))
    there = Batch(batch.x, batch.y, batch.index, torch.ones(1, dtype=torch.long))
    attack = wrapped(search, access=Access.SCORE, one_by_one=True, queries=20)
    assert attack(victim, there, goal, Stream(0, "a")).x.mean() == pytest.approx(0.556)
    here = Batch(batch.x, batch.y, batch.index, torch.zeros(1, dtype=torch.long))
    assert attack(victim, here, goal, Stream(0, "a")).x.mean() == pytest.approx(0.496), "the first query hits"


@pytest.mark.parametrize("access", [Access.SCORE, Access.DECISION])
def test_a_rejected_image_is_no_success(access: Access) -> None:
    """What is closest to the image is rejected: the next one that is answered counts."""
    victim, batch = corner()
    far = Wrap(lambda f, x, rng: f(x), accepts=lambda x, scores: x.flatten(1).mean(1) > 0.57)
    attack = wrapped(search, access=access, one_by_one=True, queries=30)
    made = attack(replace(victim, wraps=(far,)), batch, THREAT, Stream(0, "a"))
    assert made.x.flatten().tolist() == pytest.approx([0.572] * 12)


def test_labels_of_rejected_images_are_not_given_away() -> None:
    """A search by labels sees a rejected image as one that failed."""
    victim, batch = corner(1)
    silent = replace(victim, wraps=(Wrap(lambda f, x, rng: f(x), accepts=lambda x, scores: x.new_zeros(len(x)) > 0),))
    seen = []

    def call(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        seen.append(module(torch.ones_like(part.x)).argmax(1).tolist())
        return part.x

    wrapped(call, access=Access.DECISION, one_by_one=True)(silent, batch, THREAT, Stream(0, "a"))
    wrapped(call, access=Access.DECISION, one_by_one=True)(victim, batch, THREAT, Stream(0, "a"))
    assert seen == [[0], [1]]


def test_the_closest_success_against_a_randomised_victim_is_no_lucky_one() -> None:
    """Of 60 queries around the boundary some succeed by chance, far inside the image's own class."""

    def near(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        for step in range(60):
            module(part.x + 0.001 * (60 - step))
        return part.x

    victim, batch = corner(8)
    noise = Wrap(lambda f, x, rng: f(x + 0.02 * torch.randn(len(x), 1, 1, 1, generator=rng)), stochastic=True, draws=9)
    noisy = replace(victim, wraps=(noise,))
    attack = wrapped(near, access=Access.DECISION, one_by_one=True, queries=1000)
    made = attack(noisy, batch, THREAT, Stream(0, "a"))
    # The boundary is at 0.55.
    means = made.x.flatten(1).mean(1)
    assert means.min() > 0.525
    assert 0.535 < means.mean() < 0.556
    assert made.trace is not None
    assert made.trace.queries is not None
    assert int(made.trace.queries.sum()) == noisy.passes.forward
    few = wrapped(near, access=Access.DECISION, one_by_one=True, queries=20)
    again = few(replace(noisy, passes=Passes()), batch, THREAT, Stream(0, "a"))
    assert again.trace is not None
    assert again.trace.queries is not None
    assert again.trace.queries.tolist() == [20] * 8


# --- state ------------------------------------------------------------------------------------------


def vandal(module: AsModule, part: Batch, threat: Threat) -> Tensor:
    """Does what attacks of several libraries do, and more."""
    import random

    import numpy as np

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    torch.set_default_dtype(torch.float64)
    for m in module.modules():
        m.train()
    for p in module.parameters():
        p.requires_grad_(True)
    module.zero_grad()
    module(part.x.float()).sum().backward()
    torch.set_grad_enabled(False)
    return part.x


def test_everything_comes_back_as_it_was_even_after_an_error() -> None:
    victim, batch = scene()
    with_gradients(victim.module, lambda m: m(batch.x).sum())
    next(iter(victim.module.parameters())).requires_grad_(False)
    victim.module.train()
    next(iter(victim.module.children())).eval()
    before = fingerprint(victim.module)
    before.pop("the model's weights")  # batch norm in training mode moves its statistics: the library's own doing
    wrapped(vandal)(victim, batch, THREAT, Stream(0, "a"))

    def fails(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        vandal(module, part, threat)
        raise ValueError

    with pytest.raises(ValueError):
        wrapped(fails)(victim, batch, THREAT, Stream(0, "a"))
    assert differences(before, fingerprint(victim.module)) == []


def test_what_is_left_for_a_second_view_is_decided_in_evaluation_mode() -> None:
    pair = Wrap(lambda f, x, rng: f(x), surrogates=(lambda f, x, rng: f(x), lambda f, x, rng: f(x)))
    victim, batch = scene((pair,))
    victim.module.train()
    before = fingerprint(victim.module)
    wrapped(lambda m, b, t: b.x)(victim, batch, THREAT, Stream(0, "a"))
    assert differences(before, fingerprint(victim.module)) == []


@pytest.mark.parametrize("near", [0, 1, 2])
def test_the_smallest_change_is_the_smallest_through_any_stand_in(near: int) -> None:
    """Each image is fooled through all three stand-ins; that one of them fooled it first says nothing of how far."""
    views = tuple(lambda f, x, rng: f(x) for _ in range(3))
    victim, batch = scene((Wrap(lambda f, x, rng: f(x), Gradient.BPDA, surrogates=views),))
    calls = []

    def call(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        calls.append(len(part))
        size = 0.1 if len(calls) - 1 == near else 0.3
        with torch.no_grad():
            found = [part.x + s * size for s in (-1, 1)]
            return torch.where(module(found[0]).argmax(1).ne(part.y)[:, None, None, None], *found).clamp(0, 1)

    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot((batch.y + 1) % 10, 10).float() + 0 * x.flatten(1)[:, :1]

    fooled = Victim(Always(), 10, victim.wraps)
    made = wrapped(call)(fooled, batch, Threat(MinimumNorm("linf", Fraction(1))), Stream(0, "a"))
    assert calls == [5, 5, 5]
    assert float((made.x - batch.x).abs().amax()) == pytest.approx(0.1, abs=1e-6)
    calls.clear()
    wrapped(call)(fooled, batch, Threat(Ball("linf", Fraction(1))), Stream(0, "a"))
    assert calls == [5], "inside a ball a success is one"


def test_draws_depend_on_the_image_where_it_goes_alone() -> None:
    def noise(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        return (part.x + 0.05 * torch.rand_like(part.x)).clamp(0, 1)

    victim, batch = scene()
    attack = wrapped(noise, one_by_one=True)

    def run(part: Batch, seed: int = 0) -> Crafted:
        return attack(victim, part, THREAT, Stream(seed, "a"))

    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(run(batch).x[order], run(batch.take(order)).x)
    assert not torch.equal(run(batch).x, run(batch, 1).x)


# --- successes on the way ---------------------------------------------------------------------------


def passing(*stations: Callable[[Batch], Tensor]) -> Callable[..., Tensor]:
    """An attack that asks about these images in turn and returns the clean ones."""

    def call(module: AsModule, part: Batch, threat: Threat) -> Tensor:
        for station in stations:
            module(station(part))
        return part.x

    return call


def test_a_success_that_is_not_returned_is_noted_image_by_image() -> None:
    scene = linear.problem()
    victim, batch = scene.victim(), scene.batch
    toward = (scene.module.weight[1 - batch.y] - scene.module.weight[batch.y]).sign().view_as(batch.x).detach()
    half = torch.arange(len(batch)) % 2 == 0
    some = batch.x + 0.05 * toward * half[:, None, None, None]
    made = wrapped(passing(lambda part: some))(victim, batch, THREAT, Stream(0, "test"))
    assert made.trace is not None
    assert torch.equal(made.trace.any_iterate, half)  # type: ignore[arg-type]
    outside, other_order = batch.x + 0.2 * toward, (batch.x + 0.05 * toward).flip(0)
    stations = (lambda part: outside, lambda part: some[:2], lambda part: other_order, lambda part: part.x)
    missed = wrapped(passing(*stations))(victim, batch, THREAT, Stream(0, "test"))
    assert missed.trace is not None
    assert not missed.trace.any_iterate.any()  # type: ignore[union-attr]


def test_successes_on_the_way_say_nothing_of_random_proxied_or_unbounded_threats() -> None:
    proxied = Wrap(lambda f, x, rng: f(x).round(), Gradient.BPDA, surrogates=(lambda f, x, rng: f(x),))
    random = Wrap(lambda f, x, rng: f(x), stochastic=True, draws=2)
    for wraps, threat in (
        ((proxied,), THREAT),
        ((random,), THREAT),
        ((), Threat(MinimumNorm("linf", Fraction(1, 10)))),
    ):
        victim, batch = scene(wraps)
        assert wrapped(passing(lambda part: part.x))(victim, batch, threat, Stream(0, "test")).trace is None
