"""Randomised defenses: dropout that is really on, votes that are counted right, noise that nobody shares."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.builtin.randomised import dropout, noise_vote
from advplug.contracts import DatasetInfo, Schedule, Tune, Wrap
from advplug.data import ArrayImages, Split
from advplug.defenses.dropout import Active, drop
from advplug.defenses.noise import counted, scores, vote
from advplug.errors import UsageError
from advplug.parse import parse_stack
from advplug.rng import Stream
from advplug.train import Training
from advplug.victim import Victim, input_gradient
from linear import problem

INFO = DatasetInfo(tuple("0123"), 3, (4, 4), {})


def training() -> Training:
    split = Split(ArrayImages(np.zeros((4, 3, 4, 4), np.float32)), np.arange(4), np.arange(4))
    return Training(split, INFO, Schedule(), torch.device("cpu"), Stream(0, "test"))


def dropped(model: nn.Module, **params: Any) -> tuple[nn.Module, Wrap, dict[str, Any]]:
    if "layers" in params:
        params["layers"] = parse_stack(params["layers"])
    tune, wrap = dropout(**params)
    assert isinstance(tune, Tune)
    assert isinstance(wrap, Wrap)
    tuned = tune.apply(copy.deepcopy(model), training())
    return tuned.model, wrap, dict(tuned.facts)


def mlp(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), *middle, nn.Linear(64, 4)).eval()


class Functional(nn.Module):
    """Dropout as a function, off in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(48, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.dropout(self.first(x.flatten(1)).relu(), 0.4, self.training)
        return self.last(hidden)


X = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


# --- dropout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (mlp(nn.Dropout(0.5)), "the model's own"),
        (Functional().eval(), "the model's own"),
        (mlp(), "in front of 3"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(32, 4)).eval(),
            "the model's own",
        ),
        (mlp(nn.Dropout(0.0)), "in front of 4"),
    ],
)
def test_dropout_is_on_in_evaluation_mode_and_its_mean_is_right(model: nn.Module, where: str) -> None:
    tuned, wrap, facts = dropped(model)
    assert facts["dropout"] == where
    assert not any(m.training for m in tuned.modules())
    victim = Victim(tuned, 4, (wrap,))
    with torch.no_grad():
        plain = tuned(X)
        assert torch.equal(plain, model(X))  # without the wrap nothing is dropped
        before = torch.random.get_rng_state()
        drawn = torch.stack([victim.logits(X) for _ in range(600)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (drawn.std(0) > 0).all()
    # What follows the dropout is linear, so the mean over draws is the undropped answer.
    error = (drawn.mean(0) - plain).abs() / (drawn.std(0) / 600**0.5)
    assert error.max() < 4.5


def test_the_rate_is_the_share_that_is_dropped() -> None:
    for rate, given, wanted in ((0.25, 0.5, 0.25), (None, 0.5, 0.5), (0.7, None, 0.7), (None, None, 0.3)):
        model = nn.Sequential(nn.Flatten(), *([nn.Dropout(given)] if given else []), nn.Linear(4000, 4000, bias=False))
        with torch.no_grad():
            model[-1].weight.copy_(torch.eye(4000))
        tune, wrap = dropout(rate=rate)
        assert isinstance(tune, Tune)
        assert isinstance(wrap, Wrap)
        wide = training()
        wide.info = DatasetInfo(("0", "1"), 1, (1, 4000), {})
        made = tune.apply(model.eval(), wide).model
        kept = Victim(made, 4000, (wrap,)).logits(torch.ones(4, 1, 1, 4000))
        assert float((kept == 0).float().mean()) == pytest.approx(wanted, abs=0.02)
        assert float(kept.max()) == pytest.approx(1 / (1 - wanted), rel=1e-5)


def test_it_goes_where_it_is_told() -> None:
    model = mlp(nn.Dropout(0.5))
    _, _, facts = dropped(model, layers="(1+4)")
    assert facts == {"dropout": "in front of 1, 4", "dropouts_a_pass": 3}
    with pytest.raises(UsageError, match="the model has no layer '9'"):
        dropped(model, layers="9")
    with pytest.raises(UsageError, match=r"write layers=fc"):
        dropped(model, layers="fc:x=1")
    conv = nn.Sequential(nn.Conv2d(3, 4, 4), nn.Flatten()).eval()
    with pytest.raises(UsageError, match="neither dropout nor a linear layer"):
        dropped(conv)
    assert dropped(conv, layers="0")[2]["dropouts_a_pass"] == 1
    attention = nn.TransformerEncoderLayer(48, 2, 16, dropout=0.0, batch_first=True)
    wrapped = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 48)), attention, nn.Flatten(), nn.Linear(48, 4)).eval()
    assert dropped(wrapped)[2]["dropout"] == "in front of 4"
    with pytest.raises(UsageError, match="not called by itself"):
        dropped(wrapped, layers="2.self_attn.out_proj")


def test_a_stored_model_gets_its_dropout_back() -> None:
    model = mlp()
    tune, wrap = dropout(rate=0.4)
    assert isinstance(tune, Tune)
    assert isinstance(wrap, Wrap)
    assert tune.rebuild is not None
    tuned = tune.apply(copy.deepcopy(model), training())
    again = tune.rebuild(mlp(), tuned.structure)
    again.load_state_dict(tuned.model.state_dict())
    answers = [Victim(m, 4, (wrap,)).logits(X) for m in (tuned.model, again, copy.deepcopy(again))]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_put_in_dropout_is_on_while_the_model_is_trained_further() -> None:
    tuned, _, _ = dropped(mlp(), rate=0.9)
    with torch.no_grad():
        assert torch.equal(tuned(X), tuned(X))
        tuned.train()
        assert not torch.equal(tuned(X), tuned(X))


def test_every_kind_of_dropout_is_caught() -> None:
    x = torch.rand(2, 4, 6, 6)
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    for kind in kinds:
        given = x[0] if kind is nn.Dropout1d else x.unsqueeze(2) if kind is nn.Dropout3d else x
        module = kind(0.5).eval()
        with Active() as active:
            made = module(given)
        assert active.calls == 1
        assert not torch.equal(made, given)
    with Active() as active:
        torch.dropout(x, 0.5, False)
        functional.dropout(x, 0.0, False)
    assert active.calls == 1


def test_a_compiled_model_drops_too() -> None:
    model = mlp(nn.Dropout(0.5))
    # It keeps the graph as it was traced first, without dropout.
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))
        made = [drop(m, X, None, torch.Generator().manual_seed(0)) for m in (model, compiled)]
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], model(X))
        assert torch.equal(compiled(X), model(X))


def test_attack_and_decision_draw_masks_of_their_own() -> None:
    tuned, wrap, _ = dropped(mlp())
    victim = Victim(tuned, 4, (wrap,))
    with torch.no_grad():
        attacked = victim.attacked(X)
        decided = victim.logits(X)
        assert not torch.equal(attacked, decided)
        assert not torch.equal(decided, victim.logits(X))
        # However much was attacked, the same decisions are drawn.
        victim.reseed("a")
        expected = victim.logits(X)
        victim.reseed("a")
        victim.attacked(X)
        assert torch.equal(victim.logits(X), expected)


def test_averaged_gradients_agree_better_the_more_draws_they_average() -> None:
    tuned, wrap, _ = dropped(mlp(nn.Dropout(0.5)))
    victim = Victim(tuned, 4, (wrap,))
    y = torch.arange(len(X)) % 4

    def gradient(n: int) -> Tensor:
        total = torch.zeros_like(X)
        for _ in range(n):
            point = X.clone().requires_grad_()
            total += input_gradient(functional.cross_entropy(victim.attacked(point), y, reduction="none"), point)
        return total.flatten(1)

    with victim.frozen():
        cosines = [float(functional.cosine_similarity(gradient(n), gradient(n)).mean()) for n in (1, 5, 20, 100)]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.85
    assert cosines[2] > 0.9
    assert cosines[3] > 0.98


# --- votes ------------------------------------------------------------------------------------------


def test_votes_equal_a_direct_count_on_the_same_noise() -> None:
    p = problem(classes=4, n=12)
    x, sigma, n = p.batch.x[:40], 0.05, 57
    k = 32 // len(x)
    found = counted(vote(p.module, x, sigma, n, torch.Generator().manual_seed(5)), n)
    rng = torch.Generator().manual_seed(5)
    direct = torch.zeros(len(x), 4, dtype=torch.long)
    done = 0
    while done < n:
        now = min(k, n - done)
        for noise in torch.randn(now * len(x), *x.shape[1:], generator=rng, dtype=x.dtype).split(len(x)):
            for i, label in enumerate(p.module(x + sigma * noise).argmax(1).tolist()):
                direct[i, label] += 1
        done += now
    assert torch.equal(found, direct)
    assert (found.sum(1) == n).all()


def test_scores_are_the_smoothed_shares_and_can_be_counted_back() -> None:
    won = torch.tensor([[100, 0, 0], [34, 33, 33], [0, 1, 99], [60, 0, 30]])
    made = scores(won, 100, torch.float32)
    assert torch.equal(counted(made, 100), won)
    assert torch.allclose(made[:3].softmax(1), (won[:3] + 0.5) / 101.5)
    assert scores(torch.zeros(1, 3, dtype=torch.long), 100, torch.float32).isnan().all()


def test_the_views_are_the_mean_softmax_with_two_gradients() -> None:
    p = problem(classes=3, n=8)
    (wrap,) = noise_vote(sigma=0.1, draws=20)
    assert isinstance(wrap, Wrap)
    assert wrap.draws == 5
    victim = p.victim((wrap,))
    assert victim.views == 2
    values, gradients = [], []
    for view in range(2):
        victim.reseed("same")
        point = p.batch.x.clone().requires_grad_()
        logits = victim.attacked(point, view)
        values.append(logits.detach())
        gradients.append(input_gradient(functional.cross_entropy(logits, p.batch.y, reduction="none"), point))
    victim.reseed("same")
    noise = torch.stack(
        [torch.randn(p.batch.x.shape, generator=victim._attack_noise, dtype=torch.float64) for _ in range(4)]
    )
    drawn = torch.stack([p.module(p.batch.x + 0.1 * e) for e in noise])
    mean = drawn.softmax(2).mean(0)
    assert torch.allclose(values[0], mean.log())
    assert torch.allclose(values[1], mean.log())
    # Through the mean logits of a linear model: (mean softmax - one-hot) times the weights.
    direct = (mean - functional.one_hot(p.batch.y, 3)) @ p.module.weight
    assert torch.allclose(gradients[1].flatten(1), direct.detach())
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_sure_draw_leaves_a_gradient_through_the_mean_logits() -> None:
    """Softmax is flat where single draws are sure, whatever their mean; the mean logits are not."""
    p = problem(classes=2, n=8)
    (wrap,) = noise_vote(sigma=0.2, draws=20)
    assert isinstance(wrap, Wrap)
    with torch.no_grad():
        p.module.weight *= 1e4
        p.module.bias *= 1e4
    sizes = []
    for view in range(2):
        victim = p.victim((wrap,))
        point = p.batch.x.clone().requires_grad_()
        loss = functional.cross_entropy(victim.attacked(point, view), p.batch.y, reduction="none")
        mixed = (loss > 0.1) & (loss < 2)
        sizes.append(input_gradient(loss, point).flatten(1).norm(dim=1)[mixed])
    assert len(sizes[0])
    assert float(sizes[0].max()) < 1e-3
    assert float(sizes[1].min()) > 1.0


def test_attack_and_decision_draw_noise_of_their_own() -> None:
    p = problem(classes=2, n=8)
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return p.module(x)

    (wrap,) = noise_vote(sigma=0.1, votes=4, draws=4)
    assert isinstance(wrap, Wrap)
    victim = Victim(Spy(), 2, (wrap,))
    for call in (victim.attacked, victim.decide, victim.decide):
        call(p.batch.x)
    values = torch.cat([(x - p.batch.x.repeat(len(x) // len(p.batch), 1, 1, 1)).flatten() for x in seen])
    assert len(values.unique()) == len(values)


def test_passes_through_the_model_are_counted_beside_those_through_the_victim() -> None:
    p = problem(classes=2, n=12)
    (wrap,) = noise_vote(sigma=0.05, votes=20, draws=20)
    assert isinstance(wrap, Wrap)
    victim = p.victim((wrap,))
    n = len(p.batch)
    victim.decide(p.batch.x)
    assert (victim.passes.forward, victim.passes.model) == (n, 20 * n)
    victim.attacked(p.batch.x)
    assert (victim.passes.forward, victim.passes.model) == (2 * n, 24 * n)
    assert victim.decisions == 4
    assert p.victim().decisions == 1
