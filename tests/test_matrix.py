"""Axes to sweeps, and the refusals: no torch needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest

from advplug.budgets import parse_budget
from advplug.contracts import (
    Access,
    AttackCaps,
    DatasetCaps,
    DatasetInfo,
    DefenseCaps,
    Gradient,
    ModelCaps,
    Schedule,
    Strength,
    Targeted,
)
from advplug.errors import UsageError
from advplug.matrix import Axes, expand, standard_protocol
from advplug.parse import parse_reference, parse_stack
from advplug.plans import Bound, bind, bind_stack
from advplug.registry import registry

INFO = DatasetInfo(tuple("abcdefghij"), 1, (32, 32), {"linf": Fraction(1, 10), "l2": Fraction(2)}, evaluate=100)


@dataclass(frozen=True)
class Data:
    facts: DatasetInfo = INFO

    def info(self) -> DatasetInfo:
        return self.facts

    def fingerprint(self) -> str:
        return "pixels"


@dataclass(frozen=True)
class Model:
    trained: bool = True
    reason: str | None = None

    def identity(self) -> Mapping[str, Any]:
        return {}

    def misfit(self, info: DatasetInfo) -> str | None:
        return self.reason

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        return Schedule() if self.trained else None


def dataset(**facts):
    return Bound("data", {"object": "data", "facts": str(facts)}, DatasetCaps(), Data(replace(INFO, **facts)))


def model(name="net", **options):
    return Bound(name, {"object": name}, ModelCaps(), Model(**options))


def defense(name, *stages, **caps):
    return Bound(name, {"object": name}, DefenseCaps(stages, **caps))


def plan(*attacks, defenses=((),), budgets=(), data=None, net=None, **rest):
    axes = Axes(
        (data or dataset(),),
        (net or model(),),
        tuple(defenses),
        tuple(map(parse_reference, attacks)),
        tuple(map(parse_budget, budgets)),
        **rest,
    )
    return expand(axes, registry())


def test_the_baseline_comes_first_and_once():
    prune, quantise = (defense("p", "tune"),), (defense("q", "tune"),)
    found = plan("ifgsm", "pgd", defenses=[prune, quantise])
    assert [s.victim.defense_label for s in found] == ["none", "none", "p", "p", "q", "q"]
    assert [s.victim.defense_label for s in plan("pgd", defenses=[prune], baseline=False)] == ["p"]
    assert len({s.key for s in found}) == len(found)


def test_equal_recipes_appear_once_whatever_their_spelling():
    steps = _default("pgd", "steps")
    assert len(plan("pgd", f"pgd:steps={steps}", f"pgd:steps={steps + 1}")) == 2
    assert len(plan("pgd", budgets=["0.1", "1/10", "linf:0.10"])[0].budgets) == 1


def _default(attack, name):
    return next(p.default for p in registry().get("attack", attack).params() if p.name == name)


def test_budgets_are_one_ascending_sweep_a_norm():
    found = plan("pgd", budgets=["8/255", "l2:0.5", "2/255", "l2:1/4"])
    assert {s.norm: s.budgets for s in found} == {
        "linf": (Fraction(2, 255), Fraction(8, 255)),
        "l2": (Fraction(1, 4), Fraction(1, 2)),
    }


def test_no_cell_is_there_twice_where_an_attack_names_a_budget_of_the_axis():
    steps = _default("pgd", "steps")
    found = plan("pgd", "ifgsm", f"pgd:eps=2/255,steps={steps}", "pgd:eps=3/255", defenses=[(defense("p", "tune"),)],
                 budgets=["1/255", "2/255"])  # fmt: skip
    axis, alone = (Fraction(1, 255), Fraction(2, 255)), (Fraction(3, 255),)
    of_each = [("pgd", axis), ("pgd", alone), ("ifgsm", axis)]
    assert [(s.attack.label, s.budgets) for s in found] == of_each * 2
    assert [s.victim.defense_label for s in found] == ["none"] * 3 + ["p"] * 3


def test_budgets_default_to_the_datasets_own():
    assert [(s.norm, s.budgets) for s in plan("pgd", "pgd:norm=l2")] == [
        ("linf", (Fraction(1, 10),)),
        ("l2", (Fraction(2),)),
    ]


def test_an_eps_in_the_reference_leaves_the_axis():
    found = plan("pgd:eps=1/20", "fgsm", budgets=["0.2", "0.3"])
    assert [s.budgets for s in found] == [(Fraction(1, 20),), (Fraction(1, 5), Fraction(3, 10))]
    with pytest.raises(UsageError, match="contradicts"):
        plan("pgd:norm=l2,eps=linf:0.1")


def test_a_norm_in_the_reference_takes_its_part_of_the_axis():
    (sweep,) = plan("pgd:norm=l2", budgets=["l2:1", "linf:0.1"])
    assert (sweep.norm, sweep.budgets) == ("l2", (Fraction(1),))
    with pytest.raises(UsageError, match="no budget of the -e axis is in l1"):
        plan("pgd:norm=l1", budgets=["l2:1"])


def test_without_attacks_the_standard_protocol_can_reach_trusted():
    found = plan()
    assert [s.attack.label for s in found] == ["autoattack"]
    assert all(s.attack.caps.strength is Strength.STRONG for s in found)
    blocked = replace(found[0].victim, defense=(defense("wall", "wrap", gradient=Gradient.NONE),))
    assert [str(r) for r in standard_protocol(blocked)] == ["square"]


def test_keys_follow_everything_that_changes_a_result_and_nothing_else():
    base = plan("pgd")[0]
    assert plan("pgd")[0].key == base.key
    others = [
        plan("pgd:steps=7")[0],
        plan("pgd", budgets=["0.2"])[0],
        plan("pgd", net=model("other"))[0],
        plan("pgd", data=dataset(channels=3))[0],
        plan("pgd", seeds=(1,))[0],
        plan("pgd", limit=50)[0],
        plan("pgd:target=next")[0],
        plan("pgd", defenses=[(defense("p", "tune"),)], baseline=False)[0],
    ]
    assert len({s.key for s in [base, *others]}) == 9


def test_goals():
    assert plan("pgd:target=3")[0].goal == Targeted(3)
    assert plan("pgd:target=least-likely")[0].goal == Targeted("least-likely")
    with pytest.raises(UsageError, match="classes 0 to 9"):
        plan("pgd:target=10")
    with pytest.raises(UsageError, match="did you mean 'random'"):
        plan("pgd:target=rando")


def refusal(*args, **kwargs):
    return str(plan(*args, **kwargs)[-1].refused)


def test_refusals_say_what_would_work():
    tuned = model("loaded", trained=False)
    assert "has no l1 version; it works in l2, linf" in refusal("fgsm:norm=l1,eps=3")
    assert "needs 3 channels" in refusal("pgd", net=model(reason="needs 3 channels"))
    assert "holds video data" in refusal("pgd", data=dataset(modality="video"))
    data_stage = [(defense("filter", "data"),)]
    assert "is only loaded; use a model by name" in refusal("pgd", net=tuned, defenses=data_stage)
    two = [(defense("a", "wrap", rejects=True), defense("b", "wrap", rejects=True))]
    assert "a and b are two detectors; a stack holds at most one" in refusal("pgd", defenses=two)
    certified = [(defense("a", "wrap", certifies="l2"), defense("b", "wrap", certifies="l2"))]
    assert "two certifying defenses" in refusal("pgd", defenses=certified)
    losses = [(defense("a", "objective"), defense("b", "tune", "objective"))]
    assert "a and b each replace the training loss; a stack holds at most one" in refusal("pgd", defenses=losses)
    opaque = [(defense("argmax", "wrap", gradient=Gradient.NONE),)]
    assert "argmax passes no gradient" in refusal("pgd", defenses=opaque)
    assert plan("noise", defenses=opaque)[-1].refused is None


def test_training_set_attacks_need_a_model_that_is_trained():
    from advplug.judging import judge

    poison = Bound("poison", {}, AttackCaps(Access.TRAINING_SET, frozenset({"linf"})))
    victim = plan("pgd", net=model("loaded", trained=False))[0].victim
    refused, _ = judge(victim, poison, "linf", plan("pgd")[0].goal, INFO)
    assert "needs a model that is trained, loaded is only loaded" in str(refused)


def test_goals_an_attack_does_not_have_are_refused():
    from advplug.judging import judge

    only = Bound("deep", {}, AttackCaps(Access.GRADIENT, frozenset({"linf"})))
    refused, _ = judge(plan("pgd")[0].victim, only, "linf", Targeted("next"), INFO)
    assert str(refused) == "deep cannot run targeted; it runs untargeted"


def test_too_few_classes_are_refused_with_a_way_out():
    from advplug.judging import judge

    needs_four = Bound("dlr-t", {}, AttackCaps(Access.GRADIENT, frozenset({"linf"}), min_classes=4))
    three = dataset(classes=("a", "b", "c"))
    victim = plan("pgd", data=three)[0].victim
    refused, _ = judge(victim, needs_four, "linf", plan("pgd")[0].goal, three.value.info())
    assert "needs at least 4 classes, the dataset has 3; use apgd:loss=margin" in str(refused)


def test_notes_tell_what_the_engine_adds():
    noisy = [(defense("noise", "wrap", stochastic=True, gradient=Gradient.BPDA),)]
    notes = plan("pgd", defenses=noisy)[-1].notes
    assert any("EOT" in n for n in notes)
    assert any("BPDA" in n for n in notes)


def test_the_weakest_gradient_and_any_randomness_count():
    stack = (defense("a", "wrap", gradient=Gradient.BPDA), defense("b", "wrap", stochastic=True))
    victim = plan("pgd", defenses=[stack])[-1].victim
    assert victim.gradient is Gradient.BPDA
    assert victim.stochastic
    assert victim.wrapped


def test_stacks_and_unknown_names():
    with pytest.raises(UsageError, match="no defense is called 'prun'; did you mean 'prune'"):
        bind_stack(registry(), parse_stack("prun"))
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        bind(registry(), "attack", parse_reference("pgd:step=4"))


def test_the_undefended_model_meets_what_its_defended_versions_do():
    """A defense without any gradient is judged by random search, and so is the baseline it is compared with."""
    sweeps = plan(defenses=[(defense("argmax", "wrap", gradient=Gradient.NONE),)])
    assert [(s.victim.defense_label != "none", s.attack.label) for s in sweeps] == [
        (False, "autoattack"), (False, "square"), (True, "square"),
    ]  # fmt: skip


def test_what_learns_needs_images_and_a_vote_no_detector_inside_it():
    bare = {"data": dataset(trainable=False), "net": model(trained=False)}
    tunes = [(defense("tuned", "tune", needs_data=True),)]
    assert "tuned learns from training images, data has none; add some" in refusal("pgd", defenses=tunes, **bare)
    given = [(defense("d", "wrap", needs_data=True, loaded="d:threshold=1"),)]
    assert refusal("pgd", defenses=given, **bare).endswith("or use d:threshold=1")
    voted = (defense("detector", "wrap", rejects=True), defense("vote", "wrap", asks_many=True))
    assert "vote asks what is inside it several times an image" in refusal("pgd", defenses=[voted])
    assert refusal("pgd", defenses=[voted[::-1]]) == "None"
    losses = [(defense("a", "objective"), defense("b", "objective", loaded="b:train=no"))]
    assert refusal("pgd", defenses=losses).endswith("a stack holds at most one; use b:train=no for the other")
