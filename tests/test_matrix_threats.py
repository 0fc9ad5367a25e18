"""What a sweep's threat comes to: goals, norms and budgets, further victims, and the keys that name it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest

import advplug
from advplug.budgets import parse_budget
from advplug.contracts import Access, AttackCaps, Gradient, Minimise, ModelCaps, Spec, Targeted, Untargeted
from advplug.errors import UsageError
from advplug.keys import CELLS, SCHEMA
from advplug.matrix import Axes, expand
from advplug.parse import parse_reference
from advplug.plans import Bound
from advplug.registry import Source, load
from test_matrix import dataset, defense, model, plan

NAMES = ("car", "fire_truck", "cat", "Police dog", "tree")


def told(*arguments, **options):
    with pytest.raises(UsageError) as caught:
        plan(*arguments, **options)
    return str(caught.value)


class Plugin:
    """Attacks with capabilities that the built-in ones lack."""

    @staticmethod
    @advplug.hookimpl
    def advplug_attacks():
        caps = {
            "lower": AttackCaps(Access.GRADIENT, frozenset({"linf"}), frozenset({"minimise", "targeted"})),
            "both": AttackCaps(Access.GRADIENT, frozenset({"linf"}), frozenset({"minimise", "untargeted"})),
            "few": AttackCaps(Access.SCORE, frozenset({"l0"})),
            "patch": AttackCaps(Access.SCORE, frozenset({"patch"})),
            "wild": AttackCaps(Access.SCORE, frozenset({"unrestricted"})),
            "sparse": AttackCaps(Access.SCORE, frozenset({"l0", "l2"})),
            "tilt": AttackCaps(Access.SCORE, frozenset({"spatial"}), threat=("angle", "shift")),
        }
        return [
            Spec(name, f"{__name__}:{'tilt' if name == 'tilt' else 'nothing'}", c, name) for name, c in caps.items()
        ]


def nothing():
    raise AssertionError


def tilt(angle: int = 30, steps: int = 5):
    raise AssertionError


class _Point:
    @staticmethod
    def load():
        return Plugin


@cache
def known():
    found = load([(Source("odd", "odd", "1"), _Point)])
    assert not found.broken
    return found


def odd(attack, *budgets, net=None, **facts):
    axes = Axes((dataset(**facts),), (net or model(),), attacks=(parse_reference(attack),),
                budgets=tuple(map(parse_budget, budgets)))  # fmt: skip
    return {s.norm: s.budgets for s in expand(axes, known())}


# --- goals ---


@pytest.mark.parametrize(
    ("target", "goal"),
    [
        ("next", Targeted("next")), ("random", Targeted("random")), ("least-likely", Targeted("least-likely")),
        ("0", Targeted(0)), ("4", Targeted(4)), ("cat", Targeted(2)), ("'an image of a cat'", Targeted(2)),
        ("'fire truck'", Targeted(1)), ("FIRE_TRUCK", Targeted(1)), ("police_dog", Targeted(3)), ("tree", Targeted(4)),
    ],
)  # fmt: skip
def test_a_target_is_a_rule_a_number_or_the_name_of_a_class(target, goal):
    """The name may stand in a prompt, and in any case."""
    (sweep,) = plan(f"pgd:target={target}", data=dataset(classes=NAMES))
    assert sweep.goal == goal
    assert plan("pgd", data=dataset(classes=NAMES))[0].goal == Untargeted()


def test_what_is_no_target_is_told_with_what_there_is():
    assert told("pgd:target=10") == "pgd:target=10: target 10 is no class; the dataset has classes 0 to 9"
    assert told("pgd:target=rando") == (
        "pgd:target=rando: target takes next, random, least-likely, a class number or the name of one, got 'rando'; "
        "did you mean 'random'?"
    )
    two = dataset(classes=("car", "red car", "tree"))
    assert "got 'a red car'" in told("pgd:target='a red car'", data=two), "car and red car both stand in it"
    assert "; did you mean 'tree'?" in told("pgd:target=trea", data=two)
    assert "got 'ar'" in told("pgd:target=ar", data=two), "only whole words"


def test_where_classes_are_texts_any_text_is_a_target():
    gallery = replace(model(), caps=ModelCaps(task="retrieval"))
    assert plan("pgd:target='a blue dog'", net=gallery)[0].goal == Targeted("a blue dog")
    assert plan("pgd:target=3", net=gallery)[0].goal == Targeted("3")


def test_similarities_are_lowered_where_an_attack_has_no_other_goal():
    def goal(attack):
        return expand(Axes((dataset(),), (model(),), attacks=(parse_reference(attack),)), known())[0].goal

    assert (goal("lower"), goal("lower:target=next"), goal("both")) == (Minimise(), Targeted("next"), Untargeted())


# --- budgets ---


def test_a_threat_is_written_once_an_attack():
    for key, value in (("eps", "1/10"), ("norm", "l2"), ("target", "next")):
        text = f"pgd:{key}={value},{key}={value}"
        assert told(text) == f"{text}: {key} is given twice; repeat -a for another"


def test_norms_are_read_whatever_their_case():
    (sweep,) = plan("pgd:norm=L2,eps=0.5")
    assert (sweep.norm, sweep.budgets) == ("l2", (Fraction(1, 2),))
    assert told("pgd:norm=l7").startswith("eps 'l7:1': no norm is called 'l7'")
    (sweep,) = plan("pgd:norm=l2,eps=l2:0.5")
    assert sweep.budgets == (Fraction(1, 2),)
    assert told("pgd:norm=l2,eps=linf:0.1") == "pgd:norm=l2,eps=linf:0.1: norm=l2 contradicts eps=linf:0.1"
    assert told("pgd:norm=l1", budgets=["l2:1"]) == (
        "pgd:norm=l1: no budget of the -e axis is in l1; add one, like -e l1:0.5"
    )


def test_a_bare_radius_is_no_number_of_pixels_and_no_share():
    """The axis of other attacks: what has no size takes its own customary budget instead."""
    for attack, norm, own in (("few", "l0", 24), ("patch", "patch", Fraction(1, 4)), ("wild", "unrestricted", 1)):
        assert odd(attack, "8/255") == odd(attack) == {norm: (own,)}
    assert odd("few", "8/255", "l0:3", "l0:2") == {"l0": (2, 3)}
    assert odd("few:eps=5", "8/255") == {"l0": (5,)}
    assert odd("sparse", "1/2", "l0:3") == {"linf": (Fraction(1, 2),), "l0": (3,)}
    assert odd("sparse:norm=l0", "1/2") == {"l0": (24,)}
    assert odd("sparse:norm=l2", "1/2") == {"l2": (Fraction(1, 2),)}
    assert odd("sparse:norm=l2", "1/2", "l2:1/4", "l0:3") == {"l2": (Fraction(1, 4), Fraction(1, 2))}


def test_how_many_images_and_whether_budgets_were_asked_for():
    assert {(s.limit, s.asked) for s in plan("pgd")} == {(100, False)}
    assert {(s.limit, s.asked) for s in plan("pgd", limit=7, budgets=["0.1"])} == {(7, True)}
    assert {s.asked for s in plan("pgd:eps=0.1")} == {True}
    assert {s.limit for s in plan("pgd", data=dataset(evaluate=None))} == {None}


# --- further victims ---


def test_a_further_victim_is_the_attacked_model_where_it_is_called_so():
    jpeg = [(defense("j", "wrap"),)]
    own, other = (plan(f"transfer:from=({name}+prune),attack=(pgd:steps=3)", defenses=jpeg, seeds=(4,))
                  for name in ("model", "cnn"))  # fmt: skip
    for sweep in own:
        (need,) = sweep.needs.values()
        assert need.model is sweep.victim.model
        assert (need.dataset, need.seed, need.defense_label) == (sweep.victim.dataset, 4, "prune")
    assert {n.model.label for s in other for n in s.needs.values()} == {"cnn"}
    assert {s.key for s in own}.isdisjoint({s.key for s in other})
    assert plan("pgd")[0].needs == {}


# --- static images, keys ---


def test_images_of_the_baseline_are_judged_on_its_defenses():
    stacks = [(), (defense("p", "tune"),)]
    bare, defended = plan("pgd", defenses=stacks)
    assert (bare.static, bare.baseline, defended.static) == (False, None, True)
    assert defended.baseline is not None
    assert defended.baseline.key == bare.key
    assert not any(s.static for s in plan("pgd", defenses=stacks, baseline=False))
    assert [s.static for s in plan("pgd:target=least-likely", defenses=stacks)] == [False, False], "another class"
    assert [s.static for s in plan("pgd:target=random", defenses=stacks)] == [False, True]


def test_the_protocol_through_a_wall_is_a_search_for_the_model_without_it_too():
    wall = (defense("wall", "wrap", gradient=Gradient.NONE),)
    found = plan(defenses=[wall, (defense("p", "tune"),)])
    assert [(s.victim.defense_label, s.attack.label) for s in found] == [
        ("none", "autoattack"), ("none", "square"), ("wall", "square"), ("p", "autoattack"),
    ]  # fmt: skip


def test_a_cells_key_holds_the_budgets_up_to_it_only():
    """A minimum-norm attack runs once for all of them, and may search up to the largest."""
    two, three, end = ("1/255", "3/255"), ("1/255", "3/255", "5/255"), ("3/255", "5/255")
    at = Fraction(3, 255)
    for attack in ("pgd", "deepfool"):
        once = attack == "deepfool"
        short, long, last, single = (plan(attack, budgets=list(b))[0] for b in (two, three, end, two[1:]))
        assert short.key != long.key
        assert (short.cell_key(at) == long.cell_key(at)) is not once
        assert (last.cell_key(at) == long.cell_key(at)) is once
        assert (single.cell_key(at) == short.cell_key(at)) is once
        assert long.cell_key(at) != long.cell_key(Fraction(5, 255))


def test_a_threat_is_one_for_all_attacks_under_it():
    first, second = plan("pgd", "apgd:steps=5", budgets=["1/10"])
    eps = Fraction(1, 10)
    assert first.threat_key(eps) == second.threat_key(eps)
    changed = [
        plan("pgd:target=next", budgets=["1/10"])[0], plan("pgd", budgets=["1/10"], seeds=(1,))[0],
        plan("pgd", budgets=["1/10"], limit=9)[0], plan("pgd", budgets=["l2:1/10"])[0],
        plan("pgd", budgets=["1/10"], net=model("other"))[0],
    ]  # fmt: skip
    keys = {s.threat_key(eps) for s in (first, *changed)} | {first.threat_key(Fraction(1, 5))}
    assert len(keys) == 7


def test_what_describes_the_allowed_changes_is_part_of_the_threat():
    def threat(text):
        (sweep,) = expand(Axes((dataset(),), (model(),), attacks=(parse_reference(text),)), known())
        return sweep.threat_key(Fraction(1))

    assert threat("tilt") == threat("tilt:steps=9") == threat("tilt:angle=30")
    assert threat("tilt") != threat("tilt:angle=10")
    (tilted,) = expand(Axes((dataset(),), (model(),), attacks=(parse_reference("tilt:angle=10"),)), known())
    assert tilted.shape == "angle=10"
    assert plan("pgd")[0].shape == ""


def test_keys_are_those_of_what_was_stored_before():
    """Other values lose every stored result: change them only together with SCHEMA or CELLS."""
    (sweep,) = plan("deepfool:target=next", budgets=["8/255", "4/255"], seeds=(3,))
    caps = replace(sweep.attack.caps, minimum_norm=False, threat=("angle",))
    attack = Bound("attack", {"object": "attack"}, caps, params={"angle": 30, "steps": 9})
    fixed = replace(sweep, attack=attack, static=True, needs={"from": replace(sweep.victim, seed=4)})
    eps = Fraction(4, 255)
    keys = [key[:16] for key in (fixed.key, fixed.cell_key(eps), fixed.threat_key(eps))]
    assert (SCHEMA, CELLS, keys) == (1, 3, ["71d928430eff8905", "32cd32fa753a3931", "d17c20a1df402379"])


def test_cells_in_which_answers_are_drawn_have_a_version_of_their_own(monkeypatch):
    def keys():
        sure, drawn = plan("pgd", budgets=["1/10"], defenses=[(defense("noise", "wrap", stochastic=True),)])
        aimed = replace(sure, needs={"from": drawn.victim})
        return [sweep.key for sweep in (sure, drawn, aimed)]

    before = keys()
    monkeypatch.setattr("advplug.matrix.RANDOMISED", 99)
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, False, False]
