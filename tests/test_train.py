"""The training loop against closed forms, and what it must leave alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from advplug.builtin.models import by_name
from advplug.contracts import DatasetInfo, Objective, Schedule
from advplug.data import ArrayImages, Split
from advplug.errors import CellFailure
from advplug.registry import registry
from advplug.rng import Stream
from advplug.train import WARM_UP, Training, augment, learning_rate

INFO = DatasetInfo(("a", "b", "c"), 1, (4, 4), {})
PLAIN = Schedule(epochs=1, optimizer="sgd", lr=0.1, batch_size=64, momentum=0.0, one_cycle=False)


def split(n: int) -> Split:
    rng = np.random.RandomState(0)
    return Split(ArrayImages(rng.rand(n, 1, 4, 4).astype(np.float32)), rng.randint(0, 3, n), np.arange(n))


def training(n: int, plan: Schedule = PLAIN, seed: int = 0, **more: object) -> Training:
    return Training(split(n), INFO, plan, torch.device("cpu"), Stream(seed, "test"), **more)  # type: ignore[arg-type]


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)]
        return nn.Sequential(*parts)


def state(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


def test_one_step_is_the_gradient_step() -> None:
    data = split(10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    weight, bias = (p.detach().clone().requires_grad_() for p in model[1].parameters())
    batch = data.batch(np.arange(10))
    loss = functional.cross_entropy(batch.x.double().flatten(1) @ weight.T + bias, batch.y)
    to_weight, to_bias = torch.autograd.grad(loss, (weight, bias))
    objective = Objective(lambda m, x, y, s: functional.cross_entropy(m(x.double()), y))
    training(10).fit(model, objective, schedule=replace(PLAIN, weight_decay=0.01))
    torch.testing.assert_close(model[1].weight, weight - 0.1 * (to_weight + 0.01 * weight))
    torch.testing.assert_close(model[1].bias, bias - 0.1 * to_bias)  # biases do not decay


def test_every_image_is_seen_once_an_epoch_and_no_batch_holds_one() -> None:
    seen: list[torch.Tensor] = []

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, stream: Stream) -> torch.Tensor:
        seen.append(x.detach().flatten(1))
        return functional.cross_entropy(model(x), y)

    plan = replace(PLAIN, epochs=2, batch_size=8)
    training(17, plan).fit(net(), Objective(loss))
    assert [len(x) for x in seen] == [8, 9, 8, 9]
    images = split(17).images.take(np.arange(17)).flatten(1)
    for epoch in (seen[:2], seen[2:]):
        order = torch.cdist(torch.cat(epoch), images).argmin(1)
        assert sorted(order.tolist()) == list(range(17))
        assert order.tolist() != list(range(17))
    assert not torch.equal(seen[0], seen[2])


def test_seeds_decide_and_global_states_stay() -> None:
    plan = Schedule(epochs=2, batch_size=8, flip=True, shift=1)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = state(training(20, plan).fit(net()))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    torch.manual_seed(99)
    assert torch.equal(first, state(training(20, plan).fit(net())))
    assert not torch.equal(first, state(training(20, plan, seed=1).fit(net())))
    assert not torch.equal(first, state(training(20, replace(plan, seed=1)).fit(net())))


def test_a_second_fit_draws_anew() -> None:
    both = training(20)
    assert not torch.equal(state(both.fit(net())), state(both.fit(net())))


def test_only_the_chosen_parameters_change() -> None:
    model = net()
    frozen = model[0].weight.requires_grad_(False)
    old, head, mean = frozen.clone(), model[5].weight.detach().clone(), model[1].running_mean.clone()
    assert model.train() is training(20).fit(model, parameters=model[5].parameters())
    assert not model.training
    assert torch.equal(frozen, old)
    assert not torch.equal(model[5].weight, head)
    assert not torch.equal(model[1].running_mean, mean)  # statistics follow the data
    assert not frozen.requires_grad
    assert model[1].weight.requires_grad


def test_adamw_and_sgd_both_learn() -> None:
    data = split(64)
    for plan in (Schedule(epochs=30, lr=0.02, batch_size=16), replace(PLAIN, epochs=30, momentum=0.9, batch_size=16)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
        batch = data.batch(np.arange(64))
        before = functional.cross_entropy(model(batch.x), batch.y).item()
        training(64, plan).fit(model)
        assert functional.cross_entropy(model(batch.x), batch.y).item() < 0.7 * before


def test_a_loss_that_is_not_finite_fails_with_its_place() -> None:
    calls = [0]

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, stream: Stream) -> torch.Tensor:
        calls[0] += 1
        return model(x).sum() * (float("nan") if calls[0] == 4 else 1.0)

    model = net()
    with pytest.raises(CellFailure, match=r"became nan in epoch 2 of 3, step 1 of 3; use a smaller lr than 0.1"):
        training(24, replace(PLAIN, epochs=3, batch_size=8)).fit(model, Objective(loss))
    assert not model.training


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images(n: int) -> None:
    with pytest.raises(CellFailure, match=f"at least 2 images, got {n}"):
        training(n).fit(net())


def test_progress_is_told_step_by_step() -> None:
    told: list[tuple[int, ...]] = []
    training(10, replace(PLAIN, epochs=2, batch_size=5), progress=lambda *a: told.append(a[:4])).fit(net())
    assert told == [(1, 2, 1, 2), (1, 2, 2, 2), (2, 2, 1, 2), (2, 2, 2, 2)]


def test_the_learning_rate_rises_to_one_and_falls_to_nearly_nothing() -> None:
    rates = [learning_rate(i, 100, True) for i in range(100)]
    top = int(100 * WARM_UP)
    assert rates[top] == 1.0 == max(rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 1e-3 < rates[0] < 0.05
    assert {learning_rate(i, 100, False) for i in range(100)} == {1.0}
    assert all(0 < learning_rate(i, n, True) <= 1 for n in (1, 2, 3) for i in range(n))


def test_mirroring_gives_the_image_or_its_mirror() -> None:
    x = torch.rand(200, 3, 5, 4)
    out = augment(x, Schedule(flip=True), Stream(0).generator())
    same, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (same ^ mirrored).all()
    assert 70 < same.sum() < 130


def test_moving_draws_every_offset_alike_and_repeats_the_edge() -> None:
    x = torch.arange(35.0).view(1, 1, 5, 7).expand(900, 2, 5, 7)
    out = augment(x, Schedule(shift=1), Stream(0).generator())
    down, right = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    counts = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = x[0][:, (down + dy).clamp(0, 4), (right + dx).clamp(0, 6)]
            counts.append(int((out == moved).flatten(1).all(1).sum()))
    assert sum(counts) == 900
    assert min(counts) > 60
    assert augment(x, Schedule(), Stream(0).generator()) is x


def test_a_small_network_learns_the_digits() -> None:
    entry = registry().get("dataset", "digits")
    data = entry.make({p.name: p.default for p in entry.params()}).load()
    source = by_name.cnn_a()
    with Stream(0, "init").as_global():
        model = source.build(data.info)
    plan = source.schedule(data.info)
    Training(data.train, data.info, plan, torch.device("cpu"), Stream(0, "train")).fit(model)
    batch = data.test.batch(np.arange(len(data.test)))
    with torch.no_grad():
        assert (model(batch.x).argmax(1) == batch.y).float().mean() > 0.95
