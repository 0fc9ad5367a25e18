"""Transfer: crafted on a surrogate once, judged on any victim."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

import linear
from advplug.attacks import transfer
from advplug.builtin.gradient import pgd
from advplug.builtin.transfer import transfer as made
from advplug.contracts import (
    Access,
    AttackCaps,
    Ball,
    Batch,
    Spec,
    Strength,
    Targeted,
    Threat,
    Wrap,
)
from advplug.errors import UsageError
from advplug.parse import Stack, parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing.attacks import NoGradient
from advplug.victim import Victim
from cli_tools import TINY, run


class Two(nn.Module):
    """Looks at one pixel; `sign` says which way."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.sign * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([z, -z], 1)


def batch(n: int = 4) -> Batch:
    x = torch.full((n, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = 0.55
    return Batch(x, torch.zeros(n, dtype=torch.long), torch.arange(n) + 10)


def build(surrogate: Victim, attack: str = "pgd:steps=5") -> transfer.Transfer:
    return made(surrogate, Stack((parse_reference(attack),)))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fresh() -> None:
    transfer.forget()


THREAT = Threat(Ball("linf", Fraction(1, 10)))


def test_images_are_the_surrogates_and_the_victim_is_asked_nothing() -> None:
    surrogate, victim = Victim(Two(1.0), 2, key="a"), NoGradient(Two(-1.0), 2)
    x = build(surrogate)(victim, batch(), THREAT, Stream(0, "t")).x
    inner = pgd(steps=5, keep_going=True)(Victim(Two(1.0), 2), batch(), THREAT, Stream(0, "t")).x
    assert torch.equal(x, inner)
    assert (Victim(Two(1.0), 2).decide(x).label == 1).all()
    assert x[:, 0, 0, 0].tolist() == pytest.approx([0.45] * 4), "it goes to the end of the ball"


def test_each_image_is_crafted_once_whoever_is_judged() -> None:
    surrogate = Victim(Two(1.0), 2, key="a")
    attack = build(surrogate)
    first = attack(Victim(Two(1.0), 2), batch(), THREAT, Stream(0, "t")).x
    cost = surrogate.passes.forward
    other = Victim(Two(-1.0), 2)
    again = attack(other, batch(), THREAT, Stream(0, "t")).x
    assert surrogate.passes.forward == cost
    assert other.passes.forward == 0
    assert torch.equal(first, again)
    build(surrogate)(other, batch(6), THREAT, Stream(0, "t"))
    per_image = cost // 4
    assert surrogate.passes.forward == 6 * per_image, "only the two new images"
    assert other.passes.forward == 2 * per_image, "the cost is the attack's"


@pytest.mark.parametrize(
    "change",
    [{"key": "b"}, {"eps": Fraction(1, 5)}, {"seed": 1}, {"attack": "pgd:steps=6"}, {"goal": Targeted("next")}],
)
def test_another_threat_attack_seed_or_surrogate_is_crafted_anew(change: dict) -> None:
    surrogate = Victim(Two(1.0), 2, key="a")
    targeted = replace(batch(), target=torch.ones(4, dtype=torch.long))
    build(surrogate)(Victim(Two(1.0), 2), targeted, THREAT, Stream(0, "t"))
    before = surrogate.passes.forward
    surrogate.key = change.get("key", "a")
    threat = Threat(Ball("linf", change.get("eps", Fraction(1, 10))), change.get("goal", THREAT.goal))
    attack = build(surrogate, change.get("attack", "pgd:steps=5"))
    attack(Victim(Two(1.0), 2), targeted, threat, Stream(change.get("seed", 0), "t"))
    assert surrogate.passes.forward > before


def test_results_do_not_depend_on_the_batch() -> None:
    problem = linear.problem(3, n=12)
    attack = build(Victim(problem.module, 3, key="p"))
    whole = attack(problem.victim(), problem.batch, THREAT, Stream(0, "t")).x
    transfer.forget()
    halves = [
        attack(problem.victim(), problem.batch.take(torch.arange(a, a + 6)), THREAT, Stream(0, "t")).x for a in (0, 6)
    ]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("attack", ["transfer:from=cnn", "pgd+fgsm"])
def test_what_cannot_be_handed_over_is_refused(attack: str) -> None:
    from advplug.parse import parse_stack

    with pytest.raises(UsageError, match="transfer"):
        made(Victim(Two(1.0), 2), parse_stack(attack))  # type: ignore[arg-type]


def test_a_norm_that_the_inner_attack_lacks() -> None:
    attack = build(Victim(Two(1.0), 2), "ifgsm")
    with pytest.raises(UsageError, match="ifgsm has no l1 version"):
        attack(Victim(Two(1.0), 2), batch(), Threat(Ball("l1", Fraction(1))), Stream(0, "t"))


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "KEPT_BYTES", 100)
    for name in ("a", "b", "c"):
        build(Victim(Two(1.0), 2, key=name))(Victim(Two(1.0), 2), batch(), THREAT, Stream(0, "t"))
    assert len(transfer._MEMORY.sets) == 1
    assert transfer._MEMORY.bytes == 4 * 16


def test_a_single_set_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "KEPT_BYTES", 50)
    attack, victim = build(Victim(Two(1.0), 2, key="a")), Victim(Two(1.0), 2)
    first = attack(victim, batch(), THREAT, Stream(0, "t")).x
    assert transfer._MEMORY.bytes == 3 * 16
    assert torch.equal(attack(victim, batch(), THREAT, Stream(0, "t")).x, first)


@pytest.mark.parametrize("change", ["draws", "batch norm"])
def test_what_depends_on_more_than_the_image_is_crafted_anew_and_alike(change: str) -> None:
    noise = Wrap(lambda f, x, rng: f(x + 0.2 * torch.randn(x.shape, generator=rng)), stochastic=True)
    surrogate = Victim(Two(1.0), 2, (noise,) if change == "draws" else (), key="a")
    surrogate.batch_dependent = change == "batch norm"
    attack = build(surrogate)
    first = attack(Victim(Two(1.0), 2), batch(6), THREAT, Stream(0, "t")).x
    cost = surrogate.passes.forward
    attack(Victim(Two(1.0), 2), batch(3), THREAT, Stream(0, "t"))
    again = attack(Victim(Two(1.0), 2), batch(6), THREAT, Stream(0, "t")).x
    assert surrogate.passes.forward > 2 * cost
    assert torch.equal(first, again), "whatever was crafted in between"


def test_it_is_registered_with_its_own_victim() -> None:
    entry = registry().get("attack", "transfer")
    assert isinstance(entry.spec, Spec)
    bound = entry.bind(parse_reference("transfer:from=(cnn+prune),attack=(pgd:steps=40)"))
    assert [str(v) for v in entry.needs(bound).values()] == ["cnn+prune"]


def test_a_matrix_in_one_command(tmp_path) -> None:
    matrix = ("transfer", "-m", "cnn", "-m", "cnn:seed=1", "-a", "pgd:steps=5", "-e", "0.3", "--dataset", TINY)
    done = run(*matrix, "-q", "-o", tmp_path / "r")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    table = {line[0]: line[-2:] for line in lines if line and line[0] in ("(no", "cnn", "cnn:seed=1")}
    assert float(table["cnn"][0]) < float(table["(no"][0]), "on itself it is a white-box attack"
    assert float(table["cnn:seed=1"][1]) < float(table["(no"][1])
    cells = run(*matrix, "--json", "-q", "-o", tmp_path / "r").json["cells"]
    assert len(cells) == 4
    assert {parse_reference(c["attack"]).get("from") for c in cells} == {"cnn", "cnn:seed=1"}


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("pgdd", "no attack is called 'pgdd'; did you mean 'pgd'?"),
        ("pgd:stepz=4", "attack 'pgd' has no parameter 'stepz'; did you mean 'steps'?"),
        ("deepfool", "deepfool has no images of a given budget to hand over"),
        ("spatial", "what spatial does cannot be read off its images"),
    ],
)
def test_a_mistake_in_the_crafting_attack_is_found_before_anything_is_trained(attack: str, message: str) -> None:
    for command in (
        ("transfer", "-m", "cnn", "-m", "resnet18", "-a", attack),
        ("eval", "-m", "cnn", "-a", f"transfer:from=cnn,attack=({attack})"),
    ):
        done = run(*command, "--dry-run")
        assert (done.code, done.out) == (2, "")
        assert message in done.err


def test_it_can_do_what_the_crafting_attack_can() -> None:
    entry = registry().get("attack", "transfer")

    def caps(attack: str) -> AttackCaps:
        found = entry.spec.caps_of(entry.bind(parse_reference(f"transfer:from=cnn{attack}")))
        assert isinstance(found, AttackCaps)
        return found

    assert caps("") == entry.spec.caps
    assert caps(",attack=ifgsm").norms == {"linf", "l2"}
    assert caps(",attack=(noise)").strength == Strength.FLOOR
    assert all(caps(f",attack={name}").access is Access.DECISION for name in ("pgd", "square"))
    done = run("transfer", "-m", "cnn", "-m", "resnet18", "-a", "ifgsm", "-e", "l1:4", "--dry-run")
    assert "transfer:from=cnn,attack=ifgsm has no l1 version; it works in l2, linf" in done.out


def test_one_model_makes_no_matrix() -> None:
    done = run("transfer", "-m", "cnn", "-m", "cnn")
    assert done.code == 2
    assert "at least two different models" in done.err
