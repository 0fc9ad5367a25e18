"""The conformance kit itself: each planted fault is caught by its own check, and the sound twin passes all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import (
    Access,
    AttackCaps,
    Crafted,
    DatasetCaps,
    DatasetInfo,
    DefenseCaps,
    Gradient,
    MetricCaps,
    ModelCaps,
    Objective,
    Schedule,
    Spec,
    Strength,
    Trace,
    TrainingData,
    Tune,
    Tuned,
    Wrap,
)
from advplug.data import ArrayImages, Dataset, Split
from advplug.estimate import Estimate, rate
from advplug.registry import Entry, Source, registry
from advplug.testing import check_attack, check_dataset, check_defense, check_metric, check_model
from advplug.testing.problems import EPS, SHAPE, linear_problem

WHITE = AttackCaps(Access.GRADIENT, frozenset({"linf"}), frozenset({"untargeted", "targeted"}))
LABELS = AttackCaps(Access.DECISION, frozenset({"linf"}), strength=Strength.FLOOR)
PLANTED: dict[str, Callable[..., Any]] = {}
_numbers = itertools.count()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers a factory under a fresh name, beside everything that is registered already."""

    def register(kind: str, caps: Any, factory: Callable[..., Any]) -> str:
        name = f"planted-{next(_numbers)}"
        spec = Spec(name, f"planted:{name}", caps, "planted", params=())
        entry = Entry(kind, spec, Source("planted", "planted", "1"))
        known = registry()
        tables = {**known.tables, kind: MappingProxyType({**known.tables[kind], name: entry})}
        grown = replace(known, tables=MappingProxyType(tables))
        PLANTED[f"planted:{name}"] = factory
        for module in ("attacks", "defenses", "sources", "metrics"):
            monkeypatch.setattr(f"advplug.testing.{module}.registry", lambda: grown)
        return name

    monkeypatch.setattr(
        "advplug.registry.load_target", lambda target, label: PLANTED.get(target) or _real(target, label)
    )
    return register


from advplug.registry import load_target as _real  # noqa: E402 - as it is before any test changes it


def breaches(check: Callable[..., Any], name: str, **more: Any) -> str:
    """The text of the failure; empty if there is none."""
    try:
        check(name, **more)
    except AssertionError as error:
        return str(error)
    return ""


# --- the linear problem ----------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_radius_is_exact_and_the_box_far(norm: str, targeted: bool) -> None:
    """Moving along the dual direction by 0.999 radii fails, by 1.001 radii it gives the class that is wanted."""
    problem = linear_problem(norm, targeted=targeted)
    weight, batch = problem.module.weight.detach(), problem.batch
    goal = (batch.y + (2 if targeted else 1)) % problem.classes
    difference = weight[goal] - weight[batch.y]
    if norm == "linf":
        step = difference.sign()
    elif norm == "l2":
        step = difference / difference.norm(dim=1, keepdim=True)
    else:
        step = torch.zeros_like(difference)
        top = difference.abs().argmax(1, keepdim=True)
        step.scatter_(1, top, difference.gather(1, top).sign())
    for share in (0.999, 1.001):
        x = batch.x + (share * problem.radius[:, None] * step).view(-1, *SHAPE).float()
        assert ((problem.victim().decide(x).label == goal) == (share > 1)).all()
        assert 0 < float(x.min()) < float(x.max()) < 1
    assert torch.equal(problem.victim().decide(batch.x).label, batch.y)
    eps = float(EPS[norm])
    assert torch.allclose(problem.radius, eps * torch.linspace(0.5, 1.5, len(batch)).double(), rtol=1e-5)


# --- attacks ---------------------------------------------------------------------------------------


def ifgsm(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    """Sound: twenty signed steps on the margin, projected."""
    x, sign = batch.x.clone(), 1.0
    labels = batch.y
    if batch.target is not None and str(threat.goal) != "untargeted":
        labels, sign = batch.target, -1.0
    for _ in range(20 if threat.eps else 0):
        leaf = x.requires_grad_()
        loss = nn.functional.cross_entropy(victim.attacked(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        moved = leaf.detach() + sign * threat.eps / 5 * gradient.sign()
        x = torch.minimum(torch.maximum(moved, batch.x - threat.eps), batch.x + threat.eps).clamp(0, 1)
    return Crafted(x.detach())


def after(change: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """The sound attack, with a fault: `change` (victim, batch, images) gives what is returned instead."""

    def attack(victim: Any, batch: Any, threat: Any, rng: Any) -> Any:
        crafted = ifgsm(victim, batch, threat, rng)
        changed = change(victim, batch, crafted.x)
        return crafted if changed is None else Crafted(changed) if isinstance(changed, Tensor) else changed

    return attack


def overshoots(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    return Crafted((batch.x + 1.01 * threat.eps).clamp(0, 1))


def leaves_the_box(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    x = ifgsm(victim, batch, threat, rng).x
    return Crafted(torch.where(x == x.amax(), 1.1, x) if threat.eps else x)


def always_noisy(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    x = ifgsm(victim, batch, threat, rng).x
    return Crafted(torch.where(x == batch.x, x + 1e-7, x) if threat.eps else batch.x + 1e-4)


def draws(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    generator = rng.generator("start")
    start = batch.x + threat.eps * (2 * torch.rand(batch.x.shape, generator=generator) - 1)
    x = ifgsm(victim, batch, threat, rng).x
    return Crafted(torch.where(x == batch.x + threat.eps, x, 0.5 * (x + start)))


def first_image_only(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    x = batch.x.clone()
    x[:1] = ifgsm(victim, batch.take(torch.tensor([0])), threat, rng).x
    return Crafted(x)


def global_draws(victim: Any, batch: Any, x: Tensor) -> None:
    torch.rand(1)


def global_numpy(victim: Any, batch: Any, x: Tensor) -> None:
    np.random.rand()


def training_mode(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module.train()


def freezes(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module.requires_grad_(False)


def fills_gradients(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module(x).sum().backward()


def changes_weights(victim: Any, batch: Any, x: Tensor) -> None:
    with torch.no_grad():
        next(victim.module.parameters()).add_(1e-6)


def forgets_hook(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module.register_forward_hook(lambda *_: None)


def changes_input(victim: Any, batch: Any, x: Tensor) -> Tensor:
    kept = x.clone()
    batch.x.mul_(0.999)
    return kept


def changes_labels(victim: Any, batch: Any, x: Tensor) -> None:
    batch.y.add_(1)


def double(victim: Any, batch: Any, x: Tensor) -> Tensor:
    return x.double()


def bare_tensor(victim: Any, batch: Any, threat: Any, rng: Any) -> Any:
    return batch.x


def short_trace(victim: Any, batch: Any, x: Tensor) -> Crafted:
    bits, counts = torch.zeros(1, dtype=torch.bool), torch.zeros(1)
    return Crafted(x, Trace(bits, bits, counts, counts, counts))


def squares_only(victim: Any, batch: Any, x: Tensor) -> Tensor:
    side = int(x[0, 0].numel() ** 0.5)
    return x.reshape(len(x), -1, side, side).reshape(x.shape)


def gives_up(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    return Crafted(batch.x.clone())


def untargeted_always(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    return ifgsm(victim, replace(batch, target=None), threat, rng)


def reseeds(model: Any, training: Any) -> Tuned:
    torch.manual_seed(0)
    return Tuned(model)


def asks_scores(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    victim.logits(batch.x)
    return Crafted(batch.x.clone())


ATTACK_FAULTS: list[tuple[Callable[..., Any], AttackCaps, str]] = [
    (overshoots, WHITE, "linf: stays inside the ball"),
    (leaves_the_box, WHITE, "linf: stays inside the ball"),
    (gives_up, WHITE, "linf: flips beyond the exact radius: 3 of 3 images"),
    (untargeted_always, WHITE, "linf: targeted"),
    (always_noisy, WHITE, "linf: eps = 0 returns the input"),
    (draws, WHITE, "linf: same seed, same images: another seed gives other images"),
    (first_image_only, WHITE, "linf: does not depend on the batch"),
    (after(global_draws), WHITE, "it leaves changed: the global random state of torch"),
    (after(global_numpy), WHITE, "it leaves changed: the global random state of NumPy"),
    (after(training_mode), WHITE, "the model's train and eval modes"),
    (after(freezes), WHITE, "the parameters' requires_grad"),
    (after(fills_gradients), WHITE, "the parameters' gradients"),
    (after(changes_weights), WHITE, "the model's weights"),
    (after(forgets_hook), WHITE, "the model's hooks"),
    (after(changes_input), WHITE, "Batch.x"),
    (after(changes_labels), WHITE, "Batch.y"),
    (after(double), WHITE, "linf: runs: it returned images of dtype torch.float64"),
    (bare_tensor, WHITE, "linf: runs: it must return Crafted, it returned Tensor"),
    (after(short_trace), WHITE, "linf: trace: trace.any_iterate must be (B,)"),
    (after(squares_only), WHITE, "linf: leaves inputs and model as they were: raised RuntimeError"),
    (asks_scores, LABELS, "linf: uses the access it declares: it declares access 'decision' and asked for scores"),
    (ifgsm, replace(LABELS, access=Access.SCORE), "linf: uses the access it declares: raised RuntimeError"),
    (ifgsm, replace(WHITE, norms=frozenset({"l7"})), "declaration: norms must be among linf, l2, l1"),
    (ifgsm, replace(WHITE, goals=frozenset({"evil"})), "declaration: goals must be among"),
]  # fmt: skip


def test_the_sound_attack_passes(plant: Callable[..., str]) -> None:
    results = check_attack(plant("attack", WHITE, lambda: ifgsm))
    assert [r.name for r in results if r.ok is None] == ["linf: uses the access it declares", "linf: trace"]


@pytest.mark.parametrize(("attack", "caps", "found"), ATTACK_FAULTS)
def test_faults_of_attacks_are_found(
    attack: Callable[..., Any], caps: AttackCaps, found: str, plant: Callable[..., str]
) -> None:
    assert found in breaches(check_attack, plant("attack", caps, lambda: attack))


def test_a_soundness_breach_needs_a_leaving_of_the_ball(plant: Callable[..., str]) -> None:
    def cheats(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
        return ifgsm(
            victim, batch, replace(threat, perturbation=replace(threat.perturbation, eps=Fraction(1, 20))), rng
        )

    text = breaches(check_attack, plant("attack", WHITE, lambda: cheats))
    assert "linf: flips nothing within the exact radius: 5 images flipped" in text
    assert "linf: stays inside the ball" in text


# --- defenses --------------------------------------------------------------------------------------


def plain(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x)


def rounds(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner((x * 15).round() / 15)


def straight(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x + ((x * 15).round() / 15 - x).detach())


def half_detached(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(0.5 * x + 0.5 * x.detach())


def noisy(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x + 0.01 * torch.randn(x.shape, generator=rng, dtype=x.dtype))


def globally_noisy(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x + 0.01 * torch.randn_like(x))


def inverts(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(1 - x)


def in_place(inner: Any, x: Tensor, rng: Any) -> Tensor:
    x.data.mul_(0.9)
    return inner(x)


def batch_mean(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x - 0.1 * x.mean(0, keepdim=True))


def two_columns(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x)[:, :2]


WRAP = DefenseCaps(("wrap",))
NOISY = DefenseCaps(("wrap",), stochastic=True)
BPDA = DefenseCaps(("wrap",), gradient=Gradient.BPDA)
WRAP_FAULTS: list[tuple[tuple[Any, ...], DefenseCaps, str]] = [
    ((Wrap(rounds),), WRAP, "wrap: gradient as declared: the gradient vanishes for 100% of the images"),
    ((Wrap(half_detached),), WRAP, "wrap: gradient as declared: finite differences agree for 0% of the images"),
    ((Wrap(straight),), WRAP, "wrap: gradient as declared: finite differences agree for"),
    ((Wrap(rounds, Gradient.BPDA),), BPDA, "wrap: gradient as declared: the gradient vanishes"),
    ((Wrap(noisy),), WRAP, "wrap: randomness as declared: stochastic=False, but the output changes"),
    ((Wrap(plain, stochastic=True),), NOISY, "stochastic=True, but the output does not change"),
    ((Wrap(globally_noisy, stochastic=True),), NOISY, "the same generator state gives other logits"),
    ((Wrap(globally_noisy, stochastic=True),), NOISY, "wrap: logits: it leaves changed: the global random state"),
    ((Wrap(inverts),), WRAP, "wrap: clean accuracy: it costs"),
    ((Wrap(plain, accepts=lambda x, z: z[:, 0] > 1e9),), replace(WRAP, rejects=True), "wrap: clean accuracy: it costs"),
    ((Wrap(plain, accepts=lambda x, z: z[:, 0]),), replace(WRAP, rejects=True), "wrap: accepts"),
    ((Wrap(in_place),), WRAP, "wrap: logits: it changes its input in place"),
    ((Wrap(batch_mean),), WRAP, "wrap: answers image by image: logits change"),
    ((Wrap(two_columns),), WRAP, "wrap: logits: logits must be (32, 6), they are (32, 2)"),
    ((Wrap(plain),), NOISY, "declaration: its caps say stochastic=True"),
    ((Wrap(plain),), BPDA, "declaration: its caps say gradient=bpda, its wraps say exact"),
    ((Wrap(plain),), replace(WRAP, rejects=True), "declaration: its caps say rejects=True"),
    ((Wrap(plain),), DefenseCaps(("tune",)), "declaration: its caps declare the stages ('tune',)"),
    (("wrap",), WRAP, "factory: str is no stage"),
    ((), WRAP, "factory: a factory must return a tuple of stages"),
]


@pytest.mark.parametrize(
    ("stages", "caps"),
    [
        ((Wrap(plain),), WRAP),
        ((Wrap(noisy, stochastic=True, draws=4),), NOISY),
        ((Wrap(rounds, Gradient.BPDA, (straight,)),), BPDA),
        ((Wrap(plain, accepts=lambda x, z: z[:, 0] < 1e9),), replace(WRAP, rejects=True)),
        ((Wrap(plain), Wrap(rounds, Gradient.BPDA, (straight,))), replace(BPDA, stages=("wrap", "wrap"))),
    ],
)
def test_sound_wraps_pass(stages: Any, caps: DefenseCaps, plant: Callable[..., str]) -> None:
    assert breaches(check_defense, plant("defense", caps, lambda: stages)) == ""


@pytest.mark.parametrize(("stages", "caps", "found"), WRAP_FAULTS)
def test_faults_of_wraps_are_found(stages: Any, caps: DefenseCaps, found: str, plant: Callable[..., str]) -> None:
    assert found in breaches(check_defense, plant("defense", caps, lambda: stages))


def smooth(model: Any, x: Tensor, y: Tensor, rng: Any) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)


def train_in_eval(model: Any, x: Tensor, y: Tensor, rng: Any) -> Tensor:
    return smooth(model.eval(), x, y, rng)


def thin(split: Split, rng: Any) -> Split:
    return split.subset(np.arange(0, len(split), 2))


def shuffled(split: Split, rng: Any) -> Split:
    return split.subset(np.random.permutation(len(split)))


def relabels(split: Split, rng: Any) -> Split:
    split.labels[:] = 0
    return split


def same(model: Any, training: Any) -> Tuned:
    return Tuned(model)


def fits(model: Any, training: Any) -> Tuned:
    return Tuned(training.fit(model))


def wrong_head(model: Any, training: Any) -> Tuned:
    with training.stream.as_global():
        return Tuned(nn.Sequential(model, nn.Linear(10, 3)))


def widened(model: Any, training: Any) -> Tuned:
    with training.stream.as_global():
        return Tuned(nn.Sequential(model, nn.Linear(10, 10)), {"shape": torch.tensor([10])})


STAGE_FAULTS: list[tuple[Any, str, str]] = [
    (Objective(lambda m, x, y, r: smooth(m, x, y, r).detach()), "objective", "objective: raised RuntimeError"),
    (Objective(lambda m, x, y, r: m(x)), "objective", "objective: loss must be a scalar tensor"),
    (Objective(lambda m, x, y, r: smooth(m, x, y, r) / 0), "objective", "objective: the loss is inf"),
    (Objective(train_in_eval), "objective", "objective: it leaves the model in another mode"),
    (TrainingData(shuffled), "data", "data: it leaves changed: the global random state of NumPy"),
    (TrainingData(relabels), "data", "data: it changes the labels in place"),
    (TrainingData(lambda s, r: s.subset(np.arange(1))), "data", "data: 1 images are left"),
    (TrainingData(lambda s, r: None), "data", "data: it must return a Split, it returned NoneType"),
    (Tune(lambda m, t: m), "tune", "tune: it must return Tuned"),
    (Tune(wrong_head), "tune", "tune: the tuned model's logits have another shape"),
    (Tune(reseeds), "tune", "tune: it changes the original model or the process"),
    (Tune(widened), "tune", "tune: structure without rebuild cannot be restored"),
    (Tune(lambda m, t: Tuned(nn.Sequential(m))), "tune", "tune: raised RuntimeError"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "kind"), [(Objective(smooth), "objective"), (TrainingData(thin), "data"), (Tune(same), "tune"),
                        (Tune(fits), "tune")],
)  # fmt: skip
def test_sound_training_stages_pass(stage: Any, kind: str, plant: Callable[..., str]) -> None:
    assert breaches(check_defense, plant("defense", DefenseCaps((kind,)), lambda: (stage,))) == ""


@pytest.mark.parametrize(("stage", "kind", "found"), STAGE_FAULTS)
def test_faults_of_training_stages_are_found(stage: Any, kind: str, found: str, plant: Callable[..., str]) -> None:
    assert found in breaches(check_defense, plant("defense", DefenseCaps((kind,)), lambda: (stage,)))


# --- models and datasets ---------------------------------------------------------------------------


class Net(nn.Module):
    """A linear classifier of digits of any size, with a fault on request."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.linear = nn.LazyLinear(10)
        self.secret = float(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "in place":
            x.sub_(0.5)
        x = x.detach() if self.fault == "detached" else x
        x = x - x.mean(0, keepdim=True) if self.fault == "batch" else x
        logits: Tensor = self.linear(x.flatten(1))
        if self.fault == "probabilities":
            return logits.softmax(1)
        if self.fault == "hidden state":
            return logits + self.secret
        return logits[:, :5] if self.fault == "columns" else logits.double() if self.fault == "double" else logits


class Source_:
    """A model source with a fault on request."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.number = next(_numbers)

    def identity(self) -> Mapping[str, Any]:
        if self.fault == "identity":
            return {"n": self.number}
        return {"x": object()} if self.fault == "json" else {}

    def misfit(self, info: DatasetInfo) -> str | None:
        return "too small; use another" if self.fault == "misfit" else None

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        return Schedule()

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        if self.fault == "dtype":
            torch.set_default_dtype(torch.float64)
        net = Net(self.fault)
        net(torch.zeros(1, info.channels, *info.size))
        if self.fault == "unseeded":
            with torch.no_grad():
                net.linear.weight.add_(self.number + next(_numbers))
        return net


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ""),
        ("misfit", ""),
        ("identity", "identity: identity() changes"),
        ("json", "identity: identity() must be JSON-ready"),
        ("unseeded", "same seed, same weights: two builds from one seed differ"),
        ("dtype", "builds: it leaves changed: torch's default dtype"),
        ("probabilities", "logits: these look like probabilities"),
        ("columns", "logits: logits must be (B, K) = (4, 10), they are (4, 5)"),
        ("double", "logits: logits must be float32"),
        ("in place", "logits: it changed its input in place"),
        ("detached", "input gradients: raised RuntimeError"),
        ("batch", "answers image by image: logits change by"),
        ("hidden state", "weights can be stored and restored: its state_dict does not hold"),
    ],
)
def test_faults_of_models_are_found(fault: str, found: str, plant: Callable[..., str]) -> None:
    text = breaches(check_model, plant("model", ModelCaps(), lambda: Source_(fault)))
    torch.set_default_dtype(torch.float32)
    assert found in text
    assert bool(found) == bool(text)


class Images_:
    """A dataset source with a fault on request."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.number = next(_numbers)

    def info(self) -> DatasetInfo:
        names = ("a", "a") if self.fault == "names" else ("a", "b")
        budgets = {} if self.fault == "budgets" else {"linf": Fraction(9 if self.fault == "eps" else 1, 8)}
        return DatasetInfo(names, 1, (4, 4), budgets)

    def fingerprint(self) -> str:
        return str(self.number) if self.fault == "fingerprint" else "fixed"

    def load(self, offline: bool = False) -> Dataset:
        if self.fault == "global":
            np.random.rand()
        draws = np.random.default_rng(self.number if self.fault == "order" else 0)
        x = draws.random((40, 1, 4, 5 if self.fault == "shape" else 4), dtype=np.float32)
        x = x + 1 if self.fault == "range" else x
        y = draws.integers(0, 3 if self.fault == "labels" else 2, 40)
        index = np.zeros(40, dtype=int) if self.fault == "index" else np.arange(40)
        y[0] = 2 if self.fault == "labels" else y[0]
        train, test = slice(0, 30), slice(20 if self.fault == "leak" else 30, 40)
        return Dataset(self.info(), *(Split(ArrayImages(x[s]), y[s], index[s]) for s in (train, test)))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ""),
        ("names", "facts: class names must differ"),
        ("budgets", "facts: it needs a customary budget"),
        ("eps", "facts: pixels lie in [0, 1]"),
        ("fingerprint", "fingerprint: fingerprint() changes"),
        ("global", "leaves the process as it was: it leaves changed: the global random state of NumPy"),
        ("order", "train split is the same each time"),
        ("shape", "train split: images must be (8, 1, 4, 4)"),
        ("range", "train split: images must hold numbers in [0, 1]"),
        ("labels", "train split: labels 0 to 2 for 2 classes"),
        ("index", "train split: index holds a position twice"),
        ("leak", "test images are not trained on: 10 of 64"),
    ],
)
def test_faults_of_datasets_are_found(fault: str, found: str, plant: Callable[..., str]) -> None:
    text = breaches(check_dataset, plant("dataset", DatasetCaps(embedded=True), lambda: Images_(fault)))
    assert found in text
    assert bool(found) == bool(text)


# --- metrics ---------------------------------------------------------------------------------------


def mean_of(fault: str) -> Callable[[Any], Mapping[str, Any]]:
    def measure(evidence: Any) -> Mapping[str, Any]:
        value = rate(float(evidence.clean.mean(1).sum()), evidence.n)
        if fault == "nan":
            value = Estimate(float("nan"), None, None, evidence.n)
        if fault == "order":
            value = rate(float(evidence.y[0]) / 3, evidence.n)
        if fault == "writes":
            evidence.clean[:] = True
        if fault == "optional":
            value = rate(float(evidence.static.sum()) / evidence.draws, evidence.n)
        return {"other" if fault == "name" else "mine": value.value if fault == "number" and value else value}

    return measure


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ""),
        ("nan", "mine is nan; None means unknown"),
        ("order", "mine changes with the order of the images"),
        ("writes", "it changed the evidence"),
        ("name", "it returned ['other'], its caps say ['mine']"),
        ("number", "mine must be an Estimate or None"),
        ("optional", "an attack that tells nothing of itself: raised AttributeError"),
    ],
)
def test_faults_of_metrics_are_found(fault: str, found: str, plant: Callable[..., str]) -> None:
    text = breaches(check_metric, plant("metric", MetricCaps(("mine",)), lambda: mean_of(fault)))
    assert found in text
    assert bool(found) == bool(text)
