"""Training defenses: examples and losses against closed forms, what they must leave alone, stacks and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import advplug
from advplug.builtin import advtrain
from advplug.contracts import DatasetInfo, DefenseCaps, Objective, Schedule, Tuned
from advplug.data import ArrayImages, Split
from advplug.defenses import train_facts
from advplug.defenses.adversarial import Ascent, Inner, steps_from, worst_cross_entropy, worst_divergence
from advplug.defenses.train_losses import added, mart, mixed, smooth_in_the_input, trades
from advplug.errors import UsageError
from advplug.parse import parse_reference, parse_stack
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing.problems import fragile
from advplug.train import Training
from cli_tools import CNN, QUICK, TINY, evaluate, run
from linear import Affine, problem, stream

EPS = Fraction(1, 250)
INFO = DatasetInfo(tuple("0123"), 1, (8, 8), {"linf": Fraction(1, 20)})


def corner(eps: float = float(EPS)) -> tuple[Affine, Tensor, Tensor, Tensor]:
    """A model of two classes, images, labels, and the images of highest cross-entropy: x + eps sign(w_other - w_y)."""
    made = problem(classes=2)
    weight, x, y = made.module.weight.detach(), made.batch.x, made.batch.y
    return made.module, x, y, x + eps * (weight[1 - y] - weight[y]).sign().view_as(x)


def inner(text: str, norm: str = "linf", eps: Fraction | None = EPS, classes: int = 2) -> Inner:
    """The inner attack as `advtrain` makes it."""
    made = advtrain.inner_attack(parse_stack(text), None, norm)
    return Inner(made.kernel(), made.label, made.caps, made.norm, eps, classes)


def training(n: int = 40, epochs: int = 1, info: DatasetInfo = INFO, seed: int = 0) -> Training:
    draws = np.random.default_rng(0)
    data = Split(ArrayImages(draws.random((n, 1, 8, 8), dtype=np.float32)), np.arange(n) % 4, np.arange(n))
    return Training(data, info, Schedule(epochs=epochs, batch_size=10), torch.device("cpu"), Stream(seed, "test"))


def apply(text: str, model: nn.Module, plan: Training) -> Tuned:
    """The defense of that reference on `model`."""
    reference = parse_reference(text)
    entry = registry().get("defense", reference.name)
    [stage] = entry.make(entry.bind(reference))
    made: Tuned = stage.apply(model, plan)
    return made


def net() -> nn.Sequential:
    with Stream(0, "net").as_global():
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 4)]
        return nn.Sequential(*layers)


# --- examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["pgd:steps=7", "pgd:steps=7,alpha=1/500", "fgsm", "ifgsm:steps=3", "mifgsm",
                                  "apgd:steps=10", "pgd:steps=5,restarts=2", "pgd:steps=4,keep_going=false",
                                  "eot-pgd:steps=7", "ta.pgd"])  # fmt: skip
def test_every_attack_ends_in_the_worst_corner(text: str) -> None:
    model, x, y, worst = corner()
    if "keep_going=false" in text:  # early leavers stop just beyond the boundary
        found = inner(text)(model, x, y, stream())
        assert (found - x).abs().amax() <= float(EPS) + 1e-12
        assert not torch.equal(found, worst)
        return
    tolerance = 1e-6 if text.startswith("ta.") else 1e-12
    torch.testing.assert_close(inner(text)(model, x, y, stream()), worst, rtol=0, atol=tolerance)


def test_images_of_an_attack_of_many_targets_go_on_after_they_are_fooled() -> None:
    made = problem(classes=5, n=8)
    x, y = made.batch.x, made.batch.y
    found = inner("apgd-t:steps=20,n_targets=4", classes=5)(made.module, x, y, stream())
    assert ((found - x).abs() > 0.999 * float(EPS)).double().mean() > 0.95


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("text", ["fgsm", "ifgsm:steps=4", "mifgsm:steps=4", "mifgsm:steps=4,decay=0.5"])
def test_the_short_way_takes_the_same_steps_as_the_engine(text: str, norm: str) -> None:
    model = fragile(1, 4).double()
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(6) % 4
    short = inner(text, norm, Fraction(1, 500), 4)
    assert short.ascent is not None
    whole = copy.copy(short)
    whole.__dict__["ascent"] = None
    # The loss of this net rises all the way at so small a budget, so the last iterate is the one of highest loss.
    torch.testing.assert_close(short(model, x, y, stream()), whole(model, x, y, stream()), rtol=0, atol=1e-12)


def test_divergence_ends_in_one_of_the_two_corners() -> None:
    model, x, y, worst = corner()
    examples = worst_divergence(steps_from("near", "linf", EPS, 10), 2)
    change = (examples(model, x, y, stream()) - x) / (worst - x)
    turns = change.flatten(1)[:, :1]
    torch.testing.assert_close(turns.abs(), torch.ones_like(turns))
    torch.testing.assert_close(change.flatten(1), turns.expand(-1, x[0].numel()))


@pytest.mark.parametrize(("eps", "share"), [(None, 1.02), (EPS, 1.0)])
def test_deepfool_goes_a_little_beyond_the_boundary(eps: Fraction | None, share: float) -> None:
    made = problem(classes=2)
    examples = inner("deepfool", "l2", eps)(made.module, made.batch.x, made.batch.y, stream())
    size = (examples - made.batch.x).flatten(1).norm(dim=1)
    wanted = share * made.distance("l2") if eps is None else (1.02 * made.distance("l2")).clamp_max(float(eps))
    torch.testing.assert_close(size, wanted)


class Watching(nn.Module):
    """Writes down in which mode it is asked, how many images, and whether its parameters get gradients."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.asked = inside, []

    def forward(self, x: Tensor) -> Tensor:
        flag = next(self.inside.parameters()).requires_grad
        self.asked.append((self.inside.training, len(x), flag and torch.is_grad_enabled()))
        logits: Tensor = self.inside(x)
        return logits


BATCH = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(10) % 4
WORST = worst_cross_entropy(steps_from("clean", "linf", EPS, 5), 4)


@pytest.mark.parametrize(
    ("loss", "inside", "update"),
    [
        (mixed(inner("pgd:steps=7", classes=4), 1.0), [10] * 7, 10),
        (mixed(inner("fgsm", classes=4), 0.5), [5], 10),
        (added(WORST, 0.5), [10] * 5, 20),
        (mart(worst_cross_entropy(steps_from("near", "linf", EPS, 10), 4), 5.0), [10] * 10, 20),
        (trades(worst_divergence(steps_from("near", "linf", EPS, 10), 4), 6.0), [10] * 11, 20),
    ],
)
def test_examples_are_made_in_evaluation_mode_without_a_pass_too_many(
    loss: Callable[..., Tensor], inside: list[int], update: int
) -> None:
    model = Watching(net()).train()
    loss(model, *BATCH, stream())
    assert model.asked == [*((False, n, False) for n in inside), (True, update, True)]


def test_making_examples_leaves_the_model_as_it_was() -> None:
    model = net().train()
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    for attack in ("pgd:steps=3", "apgd:steps=3", "deepfool:steps=2"):
        made = inner(attack, "l2", Fraction(1), 4)(model, *BATCH, stream())
        assert not made.requires_grad
        assert made.min() >= 0
        assert made.max() <= 1
        assert not torch.equal(made, BATCH[0])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- losses ----------------------------------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z - max(row)) for z in row)
    return [math.exp(z - max(row)) / total for z in row]


def answers() -> tuple[nn.Module, Tensor, Tensor, Tensor, list[list[float]], list[list[float]]]:
    """A linear model, images, labels, changed images, and the class probabilities of both, in plain Python."""
    g = torch.Generator().manual_seed(1)
    model = Affine(torch.randn(5, 12, generator=g, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    x, x_adv = (torch.rand(7, 1, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    weight = model.weight.tolist()

    def probabilities(images: Tensor) -> list[list[float]]:
        rows = images.flatten(1).tolist()
        return [softmax([sum(w * v for w, v in zip(ws, row, strict=True)) for ws in weight]) for row in rows]

    return model, x, torch.arange(7) % 5, x_adv, probabilities(x), probabilities(x_adv)


def value(maker: Callable[..., Any], weight: float) -> tuple[float, list[int], list[list[float]], list[list[float]]]:
    model, x, y, x_adv, p, q = answers()
    loss = maker(lambda *_: x_adv, weight)(model, x, y, stream())
    return loss.item(), y.tolist(), p, q


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_the_loss_of_adversarial_training() -> None:
    model, x, y, x_adv, p, q = answers()
    for share, changed in ((1.0, 7), (0.5, 4), (0.01, 1)):
        seen: list[int] = []

        def examples(m: Any, part: Tensor, labels: Any, s: Any, seen: list[int] = seen) -> Tensor:
            seen.append(len(part))
            return x_adv[: len(part)]

        loss = mixed(examples, share)(model, x, y, stream())
        rows = [*q[:changed], *p[changed:]]
        wanted = sum(-math.log(row[k]) for row, k in zip(rows, y.tolist(), strict=True)) / 7
        assert loss.item() == pytest.approx(wanted, rel=1e-12)
        assert seen == [changed]


def test_the_loss_of_adversarial_fine_tuning() -> None:
    got, y, p, q = value(added, 0.7)
    wanted = sum(-math.log(a[k]) - 0.7 * math.log(b[k]) for k, a, b in zip(y, p, q, strict=True)) / 7
    assert got == pytest.approx(wanted, rel=1e-12)


def test_the_loss_of_trades() -> None:
    got, y, p, q = value(trades, 6.0)
    wanted = sum(-math.log(a[k]) + 6 * kl(a, b) for k, a, b in zip(y, p, q, strict=True)) / 7
    assert got == pytest.approx(wanted, rel=1e-12)


def test_the_loss_of_mart() -> None:
    got, y, p, q = value(mart, 5.0)
    wanted = 0.0
    for k, a, b in zip(y, p, q, strict=True):
        rival = max(v for j, v in enumerate(b) if j != k)
        wanted += (-math.log(b[k]) - math.log(1 - rival) + 5 * kl(a, b) * (1 - a[k])) / 7
    assert got == pytest.approx(wanted, rel=1e-12)


def test_mart_stays_finite_where_the_model_is_sure_and_wrong() -> None:
    model = Affine(torch.tensor([[400.0], [-400.0], [0.0]]), torch.zeros(3))
    x, y = torch.ones(2, 1, 1, 1), torch.tensor([1, 0])
    loss = mart(lambda *_: x, 5.0)(model, x, y, stream())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_gradient_penalty_of_a_linear_model() -> None:
    model, x, y, _, p, _ = answers()
    weight = model.weight.detach()
    slopes = (torch.tensor(p, dtype=torch.float64) - functional.one_hot(y, 5)) @ weight
    wanted = functional.cross_entropy(model(x), y) + 0.3 * slopes.square().sum(1).mean()
    torch.testing.assert_close(smooth_in_the_input(0.3)(model, x, y, stream()), wanted)


class Attending(nn.Module):
    """Attention over the rows of an image, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0, :, :4]
        logits: Tensor = self.head(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))
        return logits


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_the_gradient_of_the_penalty_agrees_with_finite_differences(attention: bool, batch_norm: bool) -> None:
    with Stream(0, "smooth").as_global():
        first = nn.BatchNorm2d(1) if batch_norm else nn.Identity()
        rest = Attending() if attention else nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(),
                                                           nn.Linear(108, 4))  # fmt: skip
        model = nn.Sequential(first, rest).double().train()
    x, y = BATCH[0].double(), BATCH[1]
    penalised = smooth_in_the_input(2.0)

    def loss() -> Tensor:
        return penalised(model, x, y, stream())

    parameters = list(model.parameters())
    exact = torch.autograd.grad(loss(), parameters)
    g, step = torch.Generator().manual_seed(5), 1e-6
    for parameter, slope in zip(parameters, exact, strict=True):
        side = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            parameter += step * side
        up = loss().item()
        with torch.no_grad():
            parameter -= 2 * step * side
        down = loss().item()
        with torch.no_grad():
            parameter += step * side
        assert (slope * side).sum().item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


# --- what is reported ------------------------------------------------------------------------------


class Overfitted(nn.Module):
    """Right at the clean image and a whole step away from it, wrong halfway: what training on FGSM may end in."""

    def __init__(self, eps: float, depth: float) -> None:
        super().__init__()
        self.eps, self.depth = eps, depth

    def forward(self, x: Tensor) -> Tensor:
        away = (x - 0.5).flatten(1).mean(1)
        lead = 1 - self.depth * away * (self.eps - away) / self.eps**2
        return torch.stack([lead, torch.zeros_like(lead)], 1)


@pytest.mark.parametrize(("depth", "told"), [(8.0, True), (2.0, False)])
def test_catastrophic_overfitting_is_told(depth: float, told: bool) -> None:
    plan = training()
    held = Split(ArrayImages(np.full((30, 1, 8, 8), 0.5, np.float32)), np.zeros(30, int), np.arange(30))
    facts = train_facts.overfitting(Overfitted(0.1, depth), held, plan, "linf", 0.1)
    assert (facts["held_back"], facts["fgsm_accuracy"], facts["pgd_accuracy"]) == (30, 1.0, 0.0 if told else 1.0)
    assert ("warnings" in facts) is told
    if told:
        assert "100 % hold against FGSM and 0 % against PGD; train with several steps" in facts["warnings"][0]
    assert train_facts.overfitting(Overfitted(0.1, 8.0), held.subset(np.arange(3)), plan, "linf", 0.1).keys() == {
        "held_back", "fgsm_accuracy", "pgd_accuracy"
    }  # fmt: skip  # three images prove nothing


def test_images_are_held_back_and_never_trained_on() -> None:
    whole = training(47)
    rest, held = train_facts.hold_back(whole)
    assert sorted([*rest.data.index, *held.index]) == list(range(47))
    assert len(held) == 4
    assert np.array_equal(train_facts.hold_back(training(47))[1].index, held.index)
    assert len(train_facts.hold_back(training(9))[1]) == 0


def test_what_each_defense_tells() -> None:
    told = {
        "advtrain": {"attack": "pgd:steps=7", "norm": "linf", "eps": "1/20"},
        "advtrain:steps=2,eps=8/255": {"attack": "pgd:steps=2", "norm": "linf", "eps": "8/255"},
        "trades:norm=l2,eps=0.5,steps=2": {"norm": "l2", "eps": "1/2"},
        "mart:steps=2": {"norm": "linf", "eps": "1/20"},
        "adv-finetune:preset=light,epochs=1": {"norm": "linf", "eps": "4/255", "steps": 3, "lambda": 0.5},
        "adv-finetune:preset=strong,epochs=1": {"norm": "linf", "eps": "8/255", "steps": 5, "lambda": 0.9},
        "adv-finetune:preset=strong,lambda=0.1,steps=2,epochs=1": {
            "norm": "linf", "eps": "8/255", "steps": 2, "lambda": 0.1},
        "adv-finetune:epochs=1": {"norm": "linf", "eps": "1/20", "steps": 5, "lambda": 1.0},
    }  # fmt: skip
    for text, facts in told.items():
        assert apply(text, net(), training()).facts == facts
    one_step = apply("advtrain:attack=fgsm", net(), training()).facts
    assert one_step.keys() == {"attack", "norm", "eps", "held_back", "fgsm_accuracy", "pgd_accuracy"}
    assert one_step["held_back"] == 4
    deepfool = apply("advtrain:attack=(deepfool:steps=3)", net(), training(200)).facts
    assert (deepfool["norm"], deepfool["eps"]) == ("l2", "unbounded")
    assert deepfool["median_l2"] > 0
    assert apply("advtrain:attack=(deepfool:steps=3),eps=1/8", net(), training()).facts["eps"] == "1/8"


def test_the_median_size_is_that_of_deepfool() -> None:
    made = problem(classes=2)
    plan, batch = training(), made.batch
    held = Split(ArrayImages(batch.x.float().numpy()), batch.y.numpy(), batch.index.numpy())
    wanted = 1.02 * made.distance("l2").median().item()
    facts = train_facts.median_size(made.module.float(), held, plan, inner("deepfool", "l2", None))
    assert facts["median_l2"] == pytest.approx(wanted, abs=1e-4)


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["advtrain:steps=2", "advtrain:attack=(apgd:steps=2)", "trades:steps=2",
                                  "mart:steps=2", "adv-finetune:epochs=1", "grad-reg:epochs=1"])  # fmt: skip
def test_seeds_decide(text: str) -> None:
    def weights(seed: int) -> Tensor:
        tuned = apply(text, net(), training(seed=seed))
        return torch.cat([v.flatten().double() for v in tuned.model.state_dict().values()])

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_fine_tuning_follows_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    monkeypatch.setattr(Training, "fit", lambda self, model, loss, schedule: plans.append(schedule) or model)
    base = training(epochs=9).schedule
    for name in ("adv-finetune", "grad-reg"):
        apply(name, net(), training(epochs=9))
        apply(f"{name}:epochs=2,lr=0.5", net(), training(epochs=9))
        assert [(p.epochs, p.lr, p.batch_size) for p in plans] == [(6, base.lr, 10), (2, 0.5, 10)]
        plans.clear()


def two_bars(n: int = 240, noise: float = 0.1) -> Split:
    """A strong feature that a change of 0.2 turns, beside a weak one that it does not."""
    draws = np.random.default_rng(2)
    y = np.arange(n) % 2
    x = draws.uniform(0.5 - noise, 0.5 + noise, (n, 1, 8, 8)).astype(np.float32)
    x[:, :, :4] = 0.5 + 0.05 * (2 * y[:, None, None, None] - 1)
    x[:, :, 4, 0] = np.where((y == 1) ^ (draws.random(n) < 0.1), 0.9, 0.1)[:, None]
    return Split(ArrayImages(x), y, np.arange(n))


@pytest.mark.parametrize("text", ["advtrain:eps=1/5,steps=5", "trades:eps=1/5,steps=5", "mart:eps=1/5,steps=5",
                                  "adv-finetune:eps=1/5,epochs=20,lambda=5"])  # fmt: skip
def test_the_fragile_feature_is_unlearned(text: str) -> None:
    """32 pixels that tell the class, each by 0.05, and one that mostly does, by 0.4: only the latter withstands 0.2."""
    info = DatasetInfo(("0", "1"), 1, (8, 8), {})
    plan = Training(two_bars(), info, Schedule(epochs=20, batch_size=40, lr=0.02), torch.device("cpu"), stream())
    batch = plan.data.batch(np.arange(len(plan.data)))

    def model() -> nn.Module:
        with Stream(0, "bars").as_global():
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def held(trained: nn.Module) -> float:
        worst = worst_cross_entropy(Ascent("linf", 0.2, 1, 0.2, "clean"), 2)(trained, batch.x, batch.y, stream())
        return (trained(worst).argmax(1) == batch.y).float().mean().item()

    plain = plan.fit(model())
    assert (plain(batch.x).argmax(1) == batch.y).float().mean() > 0.9
    assert held(plain) < 0.1
    start = copy.deepcopy(plain) if text.startswith("adv-finetune") else model()
    assert held(apply(text, start, plan).model) > 0.8


# --- through the command line ----------------------------------------------------------------------


def test_stacks_on_the_command_line(tmp_path: Path) -> None:
    stacks = ["prune:epochs=1+adv-finetune:preset=light,epochs=1", "prune:epochs=1+grad-reg:epochs=1",
              "grad-reg-train+adv-finetune:epochs=1", "advtrain:steps=2"]  # fmt: skip
    options = ["-m", CNN, "-a", "pgd:steps=3", "-e", "0.1", *QUICK, *(p for s in stacks for p in ("-d", s))]
    cells = {c["defense"]: c for c in evaluate(*options, output=tmp_path / "first")["cells"]}
    assert cells.keys() == {"none", *stacks}
    assert {c["status"] for c in cells.values()} == {"ok"}
    facts = cells[stacks[0]]["provenance"]["facts"]
    assert facts["prune:epochs=1"]["parameters_after"] < facts["prune:epochs=1"]["parameters_before"]
    assert facts["adv-finetune:preset=light,epochs=1"]["eps"] == "4/255"
    assert cells["advtrain:steps=2"]["provenance"]["facts"]["advtrain:steps=2"]["attack"] == "pgd:steps=2"
    assert cells["advtrain:steps=2"]["seconds"]["train"] > 0
    hashes = {d: c["provenance"]["weights_sha256"] for d, c in cells.items()}
    assert len(set(hashes.values())) == 5
    again = evaluate(*options, "-d", "none", output=tmp_path / "second")["cells"]  # shapes and weights from the cache
    assert {c["defense"]: c["provenance"]["weights_sha256"] for c in again} == hashes
    assert {c["defense"]: c["provenance"]["facts"] for c in again} == {
        d: c["provenance"]["facts"] for d, c in cells.items()
    }


class Own(nn.Module):
    """A network as a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        with Stream(0, "own").as_global():
            self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def test_a_users_own_model_is_tuned_and_stays_as_it_is() -> None:
    model, data = Own().eval(), training().data.batch(np.arange(40))
    before = copy.deepcopy(model.state_dict())
    own: dict[str, Any] = {"dataset": (data.x, data.y), "train": (data.x, data.y), "audit": "none", "eps": "8/255"}
    result = advplug.evaluate(model, "fgsm", ["adv-finetune:epochs=1", "prune:epochs=0+grad-reg:epochs=1"], **own)
    assert [c.status for c in result.cells] == ["ok"] * 3
    assert len({c.provenance["weights_sha256"] for c in result.cells}) == 3
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    result = advplug.evaluate(model, "fgsm", ["advtrain", "grad-reg-train"], **own)
    for cell, instead in zip(result.cells[1:], ("adv-finetune", "grad-reg"), strict=True):
        assert cell.status == "refused"
        assert str(cell.reason).endswith(f"is only loaded; use a model by name without weights, or {instead}")
    del own["train"]
    result = advplug.evaluate(model, "fgsm", "adv-finetune:epochs=1", **own)
    assert result.cells[1].status == "refused"
    assert "adv-finetune:epochs=1 learns from training images" in str(result.cells[1].reason)


def test_a_users_own_architecture_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    defenses = ("-d", "advtrain:steps=2", "-d", "trades:steps=2")
    cells = evaluate("-m", "py:usernets:Linear#epochs=1", *defenses, "-a", "fgsm", *QUICK, output=tmp_path)["cells"]
    assert [c["status"] for c in cells] == ["ok"] * 3
    assert len({c["provenance"]["weights_sha256"] for c in cells}) == 3


def test_two_losses_are_refused(tmp_path: Path) -> None:
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-d", "advtrain+grad-reg-train", "-a", "fgsm", "--no-baseline",
              "-o", tmp_path)  # fmt: skip
    assert ran.code == 2
    assert "advtrain and grad-reg-train each replace the training loss; a stack holds at most one" in ran.err


def test_a_warning_reaches_the_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(*_: Any) -> dict[str, Any]:
        return {"held_back": 4, "warnings": ["catastrophic overfitting: as planted"]}

    monkeypatch.setattr(train_facts, "overfitting", told)
    options = ("-m", CNN, "-d", "advtrain:attack=fgsm,eps=1/9", "-a", "fgsm", *QUICK)
    for folder in ("first", "second"):  # trained, then from the cache
        _, cell = evaluate(*options, output=tmp_path / folder)["cells"]
        assert cell["notes"] == ["advtrain:attack=fgsm,eps=1/9: catastrophic overfitting: as planted"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("advtrain:attack=(pgd+fgsm)", "attack takes one attack, like (pgd:steps=7), got 'pgd+fgsm'"),
        ("advtrain:attack=square", "square is no gradient attack in linf, l2, l1; use one like pgd"),
        ("advtrain:attack=(pgd:eps=8/255)", "'pgd:eps=8/255' cannot hold eps; write attack=(pgd),eps=8/255"),
        ("advtrain:attack=(pgd:target=next)", "'pgd:target=next' cannot hold target; write attack=(pgd)"),
        ("advtrain:attack=(pgd:steps=3),steps=4", "steps=4 contradicts 'pgd:steps=3'; give one of them"),
        ("advtrain:attack=fgsm,steps=4", "attack 'fgsm' has no parameter 'steps'"),
        ("advtrain:attack=(mifgsm),norm=l1", "advtrain: mifgsm has no l1 version; it works in l2, linf"),
        ("advtrain:attack=pgdd", "did you mean 'pgd'?"),
        ("adv-finetune:preset=light,norm=l2", "the budget of preset=light is one in linf; write eps= for norm=l2"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_trained(text: str, message: str) -> None:
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-d", text, "-a", "fgsm", "--dry-run")
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("advtrain:eps=8", "an L-inf budget above 1 has no meaning; did you mean 8/255?"),
        ("trades:norm=l2", "this dataset has no customary budget in l2; write trades:norm=l2,eps=..."),
        ("advtrain:norm=l2", "this dataset has no customary budget in l2; write advtrain:norm=l2,eps=..."),
    ],
)
def test_budgets_that_cannot_be_trained_for(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        apply(text, net(), training())
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["advtrain:share=0", "advtrain:share=1.1", "advtrain:steps=0", "trades:beta=0",
                                  "mart:weight=-1", "adv-finetune:preset=medium", "adv-finetune:epochs=0",
                                  "grad-reg:weight=0", "advtrain:norm=l0"])  # fmt: skip
def test_parameters_out_of_bounds(text: str) -> None:
    reference = parse_reference(text)
    with pytest.raises(UsageError):
        registry().get("defense", reference.name).bind(reference)


def test_the_specs_are_complete() -> None:
    for spec in advtrain.DEFENSES:
        assert isinstance(spec.caps, DefenseCaps)
        assert spec.paper
        assert all(p.info.help for p in registry().get("defense", spec.name).params())
    [objective] = registry().get("defense", "grad-reg-train").make({"weight": 1.0})
    assert isinstance(objective, Objective)
