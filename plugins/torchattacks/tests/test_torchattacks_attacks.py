"""What the attacks do: closed forms, agreement with the native ones, a small trained net, class counts, odd images."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from advplug.contracts import AttackCaps, Ball, Batch, Crafted, MinimumNorm, Targeted, Threat, Untargeted
from advplug.errors import CellFailure
from advplug.parse import Reference
from advplug.perturbations import CUSTOMARY, perturbation
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing.problems import linear_problem
from advplug.victim import Victim

pytest.importorskip("torchattacks")

NAMES = [e.name for e in registry().entries("attack") if e.name.startswith("ta.")]
EPS = {"linf": Fraction(3, 20), "l2": Fraction(1), "l1": Fraction(8), "l0": Fraction(10)}
BUDGETS = {**CUSTOMARY, **EPS}
CHEAP: dict[str, dict[str, Any]] = {
    "ta.apgdt": {"steps": 20, "n_targets": 3},
    "ta.cw": {"steps": 100},
    "ta.eaden": {"binary_search_steps": 4, "max_iterations": 30},
    "ta.eadl1": {"binary_search_steps": 4, "max_iterations": 30},
    "ta.onepixel": {"steps": 3},
    "ta.spsa": {"nb_iter": 3, "nb_sample": 64},
    "ta.square": {"queries": 200},
}


def caps_of(name: str) -> AttackCaps:
    caps = registry().get("attack", name).spec.caps
    assert isinstance(caps, AttackCaps)
    return caps


def run(name: str, victim: Victim, batch: Batch, norm: str, eps: Fraction, seed: int = 0, **params: Any) -> Crafted:
    """One call, checked against its perturbation set."""
    entry, caps = registry().get("attack", name), caps_of(name)
    allowed = MinimumNorm(norm, eps) if caps.minimum_norm else perturbation(norm, eps)
    threat = Threat(allowed, Untargeted() if batch.target is None else Targeted(), caps.access)
    made: Crafted = entry.make(entry.bind(Reference(name)) | params)(victim, batch, threat, Stream(seed, "attack"))
    assert made.x.shape == batch.x.shape
    assert allowed.check(batch.x, made.x).all()
    return made


class Net(nn.Module):
    """Two convolutions on images of any size, with normalisation inside."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(8 * width, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body((x - 0.5) * 2)
        return logits


@pytest.fixture(scope="module")
def digits() -> tuple[Victim, Batch]:
    """A net that reads handwritten digits, drawn in one of three colours, and images that it gets right."""
    data, labels = load_digits(return_X_y=True)
    y = torch.from_numpy(labels).long()
    tint = torch.tensor([[1.0, 0.6, 0.6], [0.6, 1.0, 0.6], [0.6, 0.6, 1.0]])[torch.arange(len(y)) % 3]
    x = torch.from_numpy(data).float().view(-1, 1, 8, 8) / 16 * tint[:, :, None, None]
    with Stream(0, "net").as_global():
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(8):
            for rows in torch.randperm(1400).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    net.eval()
    held = Batch(x[1400:], y[1400:], torch.arange(1400, len(y)))
    right = net(held.x).argmax(1) == held.y
    assert right.float().mean() > 0.8
    return Victim(net, 10), held.take(right.nonzero().flatten()[:8])


def random_victim(classes: int, shape: tuple[int, int, int] = (3, 8, 8), images: int = 3) -> tuple[Victim, Batch]:
    """An untrained net and noise, labelled as it sees it."""
    with Stream(classes, "random").as_global():
        net = Net(shape[0], classes, 4).eval()
        x = torch.rand(images, *shape)
    return Victim(net, classes), Batch(x, net(x).argmax(1), torch.arange(images))


# --- a small trained net -------------------------------------------------------------------------


def test_all_finish_and_flip_an_image_on_a_small_net(digits: tuple[Victim, Batch]) -> None:
    victim, batch = digits
    lines, flipped = [], []
    for name in NAMES:
        caps = caps_of(name)
        norm = sorted(caps.norms)[-1]
        clock, before = time.perf_counter(), victim.passes.forward
        made = run(name, victim, batch, norm, BUDGETS[norm], **CHEAP.get(name, {}))
        seconds, asked = time.perf_counter() - clock, (victim.passes.forward - before) / len(batch)
        flips = int((victim.decide(made.x).label != batch.y).sum())
        flipped += [name] if flips else []
        row = f"{name:14s} ok {norm:12s} {flips:2d} of {len(batch)} {seconds:6.2f} s {asked:7.1f} images asked"
        lines.append(row)
    print("\n".join(lines))  # pytest -s shows it
    assert len(NAMES) == 36
    assert set(NAMES) - set(flipped) <= {"ta.gn"}  # noise proves nothing


@pytest.mark.parametrize("name", [n for n in NAMES if "targeted" in caps_of(n).goals])
def test_targets_are_reached(name: str, digits: tuple[Victim, Batch]) -> None:
    """Toward the runner-up class, wide budgets reach the target for some image, also in gray."""
    victim, batch = digits
    runner_up = victim.logits(batch.x).topk(2).indices[:, 1]
    batch = replace(batch, target=runner_up).take(torch.arange(6))
    norm = sorted(caps_of(name).norms)[-1]
    made = run(name, victim, batch, norm, Fraction(2) * EPS[norm], **CHEAP.get(name, {}))
    assert (victim.decide(made.x).label == batch.target).any()


# --- closed forms and agreement ------------------------------------------------------------------


def native(name: str, norm: str, **params: Any) -> Tensor:
    problem = linear_problem(norm)
    entry = registry().get("attack", name)
    attack = entry.make(entry.bind(Reference(name)) | params)
    threat = Threat(Ball(norm, problem.eps))
    made: Tensor = attack(problem.victim(), problem.copy(), threat, Stream(0, "attack")).x
    return made


def wrapped(name: str, norm: str, **params: Any) -> Tensor:
    problem = linear_problem(norm)
    return run(name, problem.victim(), problem.copy(), norm, problem.eps, **params).x


def test_fgsm_is_the_native_one() -> None:
    assert torch.equal(wrapped("ta.fgsm", "linf"), native("fgsm", "linf"))


@pytest.mark.parametrize(
    ("name", "own", "params"),
    [("ta.bim", "ifgsm", {}), ("ta.mifgsm", "mifgsm", {}), ("ta.pgd", "pgd", {"random_start": False})],
)
def test_iterative_ones_agree_with_the_native_ones(name: str, own: str, params: dict[str, Any]) -> None:
    theirs = wrapped(name, "linf", steps=10, **params)
    ours = native(own, "linf", steps=10, keep_going=True, **params)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "norm", "low", "high"),
    [
        ("ta.deepfool", "l2", 1.0, 1.021),
        ("ta.fab", "linf", 1.0, 1.01),
        ("ta.fab", "l2", 1.0, 1.01),
        ("ta.fab", "l1", 1.0, 1.01),
        ("ta.cw", "l2", 1.0, 1.13),
        ("ta.eadl1", "l1", 1.0, 1.5),
    ],
)
def test_minimum_norm_ones_reach_the_exact_distance(name: str, norm: str, low: float, high: float) -> None:
    problem = linear_problem(norm)
    x = wrapped(name, norm)
    assert (problem.victim().decide(x).label != problem.batch.y).all()
    ratio = Ball(norm, problem.eps).measure(problem.batch.x, x) / problem.radius
    assert ratio.min() >= low - 1e-5
    assert ratio.max() <= high


# --- what the adapter works around ---------------------------------------------------------------


class Shifted(nn.Module):
    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x) + self.by
        return logits


@pytest.mark.parametrize("name", ["ta.cw", "ta.eadl1", "ta.eaden"])
def test_negative_logits_change_nothing(name: str) -> None:
    norm = sorted(caps_of(name).norms)[-1]
    problem = linear_problem(norm)
    lowered = Victim(Shifted(problem.module, -50.0), problem.classes)
    params = CHEAP[name]
    there = run(name, lowered, problem.copy(), norm, problem.eps, **params).x
    here = run(name, problem.victim(), problem.copy(), norm, problem.eps, **params).x
    assert (problem.victim().decide(there).label != problem.batch.y).all()
    torch.testing.assert_close(there, here, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["ta.mifgsm", "ta.vmifgsm", "ta.tifgsm", "ta.deepfool"])
def test_a_vanished_gradient_leaves_the_image_alone(
    name: str, digits: tuple[Victim, Batch], caplog: pytest.LogCaptureFixture
) -> None:
    _, batch = digits
    flat = Victim(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)), 10)
    with torch.no_grad():
        flat.module[2].weight.zero_()
    y = flat.decide(batch.x).label
    x = run(name, flat, replace(batch, y=y), sorted(caps_of(name).norms)[0], Fraction(1, 10)).x
    assert torch.equal(x, batch.x)
    assert (f"{name}: NaN on 8 images" in caplog.text) == (name == "ta.deepfool")  # the others step by signs


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_class_counts(classes: int) -> None:
    """Ten are above."""
    victim, batch = random_victim(classes, images=1)
    short = CHEAP | {"ta.autoattack": {"version": "rand"}, "ta.apgd": {"steps": 10}}
    for name in NAMES:
        caps = caps_of(name)
        if classes >= caps.min_classes:
            norm = sorted(caps.norms)[0]
            run(name, victim, batch, norm, BUDGETS[norm], **short.get(name, {}))


def test_dlr_says_how_many_classes_it_needs() -> None:
    victim, batch = random_victim(2)
    for name in ("ta.apgd", "ta.upgd"):
        with pytest.raises(CellFailure, match="needs 3 classes"):
            run(name, victim, batch, "linf", Fraction(1, 10), loss="dlr")


def test_targeted_dlr_of_upgd_has_a_gradient(digits: tuple[Victim, Batch]) -> None:
    """Given the target for a label, too, its difference of both logits would be zero."""
    victim, batch = digits
    batch = replace(batch, target=victim.logits(batch.x).topk(2).indices[:, 1])
    x = run("ta.upgd", victim, batch, "linf", Fraction(3, 10), loss="dlr").x
    assert (victim.decide(x).label == batch.target).any()


def test_autoattack_tries_nine_targets_of_a_hundred() -> None:
    from advplug_torchattacks.calls import ARGUMENTS, Setting

    problem = linear_problem("linf")
    for classes, wanted in ((100, 10), (5, 5)):
        module: Any = type("Module", (), {"classes": classes})()
        setting = Setting(module, problem.batch, Threat(Ball("linf", Fraction(1, 10))), {"n_targets": 9})
        assert ARGUMENTS["AutoAttack"](setting)["n_classes"] == wanted
        assert ARGUMENTS["APGDT"](setting)["n_classes"] == wanted


@pytest.mark.parametrize("name", ["ta.apgd", "ta.square"])
def test_the_seed_of_the_run_is_honoured(name: str) -> None:
    """These set the global seed themselves, to the same number each time unless told otherwise."""
    victim, batch = random_victim(10)
    params = {"steps": 3} if name == "ta.apgd" else {"queries": 10}
    eps = Fraction(1, 10)
    one, again, two = (run(name, victim, batch, "linf", eps, seed=s, **params).x for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("colour", ["ta.tifgsm", "ta.pifgsm", "ta.pifgsmpp"])
def test_gray_images_are_attacked_as_colour_images_would_be(colour: str) -> None:
    """A victim of colour images that looks at one channel only is attacked there in the same way."""
    victim, batch = random_victim(10, (1, 8, 8))

    class FirstChannel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = victim.module(x[:, :1])
            return logits

    tinted = Victim(FirstChannel(), 10)
    gray = run(colour, victim, batch, "linf", Fraction(1, 10)).x
    there = run(colour, tinted, replace(batch, x=batch.x.expand(-1, 3, -1, -1)), "linf", Fraction(1, 10)).x
    assert torch.equal(gray, there[:, :1])
    assert not torch.equal(gray, batch.x)


@pytest.mark.parametrize("shape", [(3, 5, 9), (1, 9, 5)])
@pytest.mark.parametrize("name", ["ta.pixle", "ta.square", "ta.onepixel", "ta.jsma"])
def test_images_need_not_be_square(name: str, shape: tuple[int, int, int]) -> None:
    victim, batch = random_victim(10, shape)
    for norm in sorted(caps_of(name).norms):
        for seed in range(4):
            run(name, victim, batch, norm, EPS[norm], seed, **CHEAP.get(name, {}))


def test_images_that_are_too_small_or_too_large_are_refused() -> None:
    victim, batch = random_victim(10, (3, 4, 4))
    with pytest.raises(CellFailure, match="5 x 5"):
        run("ta.square", victim, batch, "l2", Fraction(1))
    victim, batch = random_victim(10, (3, 40, 40), images=1)
    with pytest.raises(CellFailure, match="4096"):
        run("ta.jsma", victim, batch, "l0", Fraction(4))


OPTIONS = [
    (name, spec.name, value)
    for name in NAMES
    for spec in registry().get("attack", name).params()
    for value in (spec.choices or ([not spec.default] if spec.kind == "bool" else []))
    if value != spec.default and name != "ta.autoattack"  # which takes long
]


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_choices_and_switches_change_what_is_done(name: str, option: str, value: Any) -> None:
    norm = "linf" if "linf" in caps_of(name).norms else sorted(caps_of(name).norms)[0]
    short = CHEAP | {"ta.apgd": {"steps": 10}, "ta.pixle": {"restarts": 2, "patch_max": 3}}
    done = []
    for chosen in ({}, {option: value}):
        problem = linear_problem(norm)
        victim = problem.victim()
        x = run(name, victim, problem.copy(), norm, problem.eps, **short.get(name, {}), **chosen).x
        done.append((x, victim.passes.forward))
    assert not torch.equal(done[0][0], done[1][0]) or done[0][1] != done[1][1]


# --- budgets and queries -------------------------------------------------------------------------


def test_steps_scale_with_the_budget() -> None:
    from advplug_torchattacks.table import ROWS

    rows = {row.name: row for row in ROWS}
    expected = {"pgd": 0.25, "mifgsm": 0.1, "ffgsm": 1.25}
    for name, share in expected.items():
        given = {p.name: p.default for p in rows[name].params}
        for eps in (0.01, 0.3):
            assert rows[name].arguments(given, eps)["alpha"] == pytest.approx(share * eps)
        assert rows[name].arguments(given | {"alpha": Fraction(2, 255)}, 0.3)["alpha"] == pytest.approx(2 / 255)
    single = {p.name: p.default for p in rows["pgd"].params} | {"steps": 1}
    assert rows["pgd"].arguments(single, 0.1)["alpha"] == pytest.approx(0.1)


def test_squares_queries_are_each_images_own(digits: tuple[Victim, Batch]) -> None:
    victim, batch = digits
    before = victim.passes.forward
    made = run("ta.square", victim, batch, "linf", Fraction(1, 10), queries=60)
    assert made.trace is not None
    assert made.trace.queries is not None
    asked, spent = made.trace.queries, victim.passes.forward - before
    broken = victim.decide(made.x).label != batch.y
    assert int(asked.sum()) == spent
    assert 0 < int(broken.sum()) < len(batch)
    assert (asked[~broken] == 60).all()
    assert (asked[broken] < 60).any()


@pytest.mark.parametrize(
    ("name", "params", "most"),
    [
        ("ta.square", {"queries": 50}, 50),
        ("ta.spsa", {"nb_iter": 3, "nb_sample": 32, "queries": None}, 192),
        ("ta.spsa", {"queries": 200}, 200),
        ("ta.onepixel", {"queries": 90}, 90),
        ("ta.pixle", {"queries": 30}, 30),
        ("ta.pixle", {"restarts": 2, "max_iterations": 3}, 13),
    ],
)
def test_queries_stay_within_their_budget(name: str, params: dict[str, Any], most: int) -> None:
    """On a victim that no change fools, so that every search runs to its end."""
    problem = linear_problem("linf")
    stubborn = Victim(Shifted(problem.module, 0.0), problem.classes)
    stubborn.module.by = 1e3 * nn.functional.one_hot(problem.batch.y[:1], problem.classes).float()  # type: ignore[assignment]
    batch = problem.copy(torch.tensor([0, 5, 10]))
    assert (stubborn.decide(batch.x).label == batch.y).all()
    norm = sorted(caps_of(name).norms)[0]
    before = stubborn.passes.forward
    made = run(name, stubborn, batch, norm, EPS[norm], **params)
    assert made.trace is not None
    assert made.trace.queries is not None
    assert made.trace.queries.tolist() == [(stubborn.passes.forward - before) // 3] * 3
    assert most * 0.5 <= int(made.trace.queries.max()) <= most
