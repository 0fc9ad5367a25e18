"""Laws of matrices, on random ones: every cell once, in whatever order; exclude, include, scales, flags, variants."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advplug.budgets import parse_budget
from advplug.errors import UsageError
from advplug.matrix import Sweep
from advplug.session import Request
from advplug.studies.plan import Flags, Planned, plan_file, spec_text
from test_matrix import defense, model, plan

Cell = tuple[str, str, str, str, str, Fraction, int]
"""(dataset, model, defense, attack, norm, budget, seed)."""


def cells(sweeps: list[Sweep]) -> Counter[Cell]:
    return Counter(
        (s.victim.dataset.label, s.victim.model.label, s.victim.defense_label, s.attack.label, s.norm, eps,
         s.victim.seed)
        for s in sweeps for eps in s.budgets
    )  # fmt: skip


def some(values: list[Any], least: int = 1, most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=least, max_size=most, unique=True)


# --- crossing ---

DEFENSES = {name: (defense(name, "tune"),) for name in "pq"} | {"none": ()}
DEFENSES["p+q"] = (*DEFENSES["p"], *DEFENSES["q"])
AXES: Mapping[str, st.SearchStrategy[Any]] = {
    "attacks": some(["fgsm", "pgd", "pgd:steps=3", "ifgsm:target=3"]),
    "defenses": some(["none", "p", "q", "p+q"], 0),
    "budgets": some(["8/255", "l2:0.5", "2/255", "0.1", "l2:2"]),
    "seeds": some([0, 1, 5], most=2),
    "baseline": st.booleans(),
}


def crossed(axes: Mapping[str, Any], net: str = "net") -> list[Sweep]:
    rest = {"seeds": tuple(axes["seeds"]), "baseline": axes["baseline"]}
    stacks = [DEFENSES[name] for name in axes["defenses"]]
    return plan(*axes["attacks"], defenses=stacks, budgets=axes["budgets"], net=model(net), **rest)


@given(st.fixed_dictionaries(dict(AXES)))
@settings(max_examples=40)
def test_every_cell_is_there_once(axes: dict[str, Any]) -> None:
    found = crossed(axes)
    attacked = set(axes["defenses"]) or {"none"}
    if axes["baseline"]:
        attacked.add("none")
    points = [("l2" if "l2" in text else "linf", Fraction(text.removeprefix("l2:"))) for text in axes["budgets"]]
    attacks = [text.removesuffix(":target=3") for text in axes["attacks"]]
    assert cells(found) == Counter(
        ("data", "net", d, a, norm, eps, seed)
        for d, a, (norm, eps), seed in itertools.product(attacked, attacks, points, axes["seeds"])
    )
    assert all(a < b for s in found for a, b in itertools.pairwise(s.budgets))
    assert len({s.key for s in found}) == len(found)
    keys = [s.cell_key(eps) for s in found for eps in s.budgets]
    assert len(set(keys)) == len(keys)


@given(st.fixed_dictionaries(dict(AXES)), st.randoms())
@settings(max_examples=25)
def test_the_order_of_what_is_crossed_changes_no_key(axes: dict[str, Any], random: Any) -> None:
    """Nor does writing something twice, or a budget in other words."""
    shuffled = {k: random.sample(v, len(v)) if isinstance(v, list) else v for k, v in axes.items()}
    again = {k: [*v, *v[:1]] if isinstance(v, list) else v for k, v in shuffled.items()}
    again["budgets"] = [*again["budgets"], str(parse_budget(again["budgets"][0]).eps) if "l2" not in
                        again["budgets"][0] else "l2:4/8" if "l2:0.5" in again["budgets"] else "l2:2.0"]  # fmt: skip
    keys = [sorted(s.key for s in crossed(a)) for a in (axes, shuffled, again)]
    assert keys[0] == keys[1] == keys[2]


@given(st.fixed_dictionaries(dict(AXES)), st.fixed_dictionaries(dict(AXES)))
@settings(max_examples=25)
def test_what_is_added_leaves_the_cells_that_were_there(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Results are found again by key: a larger matrix computes the new cells only. Smaller budgets come first in a
    sweep, so those of `other` are above."""
    top = max(map(_radius, one["budgets"]))
    above = [b for b in other["budgets"] if _radius(b) > top]
    both = {k: v if isinstance(v, bool) else list(dict.fromkeys([*v, *other[k]])) for k, v in one.items()}
    both["budgets"] = [*one["budgets"], *above]
    keys = [{s.cell_key(eps) for s in crossed(axes) for eps in s.budgets} for axes in (one, both)]
    if not one["defenses"] and both["defenses"] and not one["baseline"]:
        assume("none" in both["defenses"])  # without a baseline, defenses take the undefended model's place
    assert keys[0] <= keys[1]


def _radius(budget: str) -> float:
    return float(Fraction(budget.removeprefix("l2:")))


@given(st.fixed_dictionaries(dict(AXES)))
@settings(max_examples=25)
def test_undefended_models_come_before_what_is_compared_with_them(axes: dict[str, Any]) -> None:
    before: set[str] = set()
    for sweep in crossed(axes):
        assert (sweep.baseline is None) == (not axes["baseline"] or not sweep.victim.defense)
        if sweep.baseline is not None:
            assert sweep.baseline.key in before
            assert replace(sweep.baseline, victim=sweep.victim, static=True) == sweep
        before.add(sweep.key)


# --- files ---

FILE: Mapping[str, st.SearchStrategy[Any]] = {
    "models": some(["cnn", "cnn-a", "cnn:epochs=1"], most=2),
    "defenses": some(["jpeg", "prune", "jpeg+prune", "none"], 0, 2),
    "attacks": some(["fgsm", "pgd", "pgd:steps=3"], most=2),
    "eps": some(["2/255", "8/255", "1e-3", "l2:0.5"], most=2),
    "seeds": some([0, 3], most=2),
}
BLOCKS = st.fixed_dictionaries({}, optional=dict(FILE)).map(lambda b: {k: v for k, v in b.items() if v})
MATRICES = st.fixed_dictionaries(dict(FILE)).map(lambda b: {k: v for k, v in b.items() if v})
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "model": some(["cnn", "cnn-a", "cnn:epochs=1", "cnn*", "*-?"], most=2),
        "defense": some(["jpeg", "prune", "none", "jpeg+prune", "jpeg*", "?rune"], most=2),
        "attack": some(["pgd", "pgd:steps=3", "fgsm", "*gd"], most=2),
        "eps": some(["2/255", "l2:0.5", "linf:1/1000", "0.5"], most=2),
        "seed": some([0, 1, 3], most=2),
    },
).filter(bool)


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Planned]:
    path = tmp_path_factory.mktemp("laws") / "m.yaml"

    def read(matrix: dict[str, Any] | str, scale: str | None = None, flags: Flags | None = None) -> Planned:
        path.write_text(matrix if isinstance(matrix, str) else yaml.safe_dump(matrix))
        return plan_file(path, Request(models=()), scale, flags)

    return read


def left(planned: Callable[..., Planned], matrix: dict[str, Any], **rest: Any) -> Counter[Cell]:
    try:
        return cells(planned(matrix, **rest).sweeps)
    except UsageError as error:
        if "nothing is left of the matrix; exclude less" not in str(error):
            raise
        return Counter()


MEANT: Mapping[str, Mapping[str, set[str]]] = {
    "model": {
        "cnn": {"cnn", "cnn:epochs=1"}, "cnn*": {"cnn", "cnn-a", "cnn:epochs=1"}, "*-?": {"cnn-a"},
        "cnn-a": {"cnn-a"}, "cnn:epochs=1": {"cnn:epochs=1"},
    },
    "defense": {"jpeg*": {"jpeg", "jpeg+prune"}, "?rune": {"prune"}},
    "attack": {"pgd": {"pgd", "pgd:steps=3"}, "*gd": {"pgd", "pgd:steps=3"}},
}  # fmt: skip
"""What a pattern means, where that is not just the reference itself: a name means every reference of that name."""


def excluded(cell: Cell, entry: dict[str, Any]) -> bool:
    _, net, stack, attack, norm, eps, seed = cell
    said = {"model": net, "defense": stack, "attack": attack}
    named = (any(label in MEANT[key].get(p, {p}) for p in entry[key]) for key, label in said.items() if key in entry)
    budgets = [parse_budget(text) for text in entry.get("eps", [])]
    return (
        all(named)
        and ("seed" not in entry or seed in entry["seed"])
        and (not budgets or any(b.eps == eps and b.norm in (None, norm) for b in budgets))
    )


@given(matrix=MATRICES, entries=st.lists(ENTRIES, max_size=3))
@settings(max_examples=40)
def test_exclude_leaves_what_no_entry_matches(planned: Callable[..., Planned], matrix: Any, entries: Any) -> None:
    """Whatever their order, and however often they stand there."""
    whole = cells(planned(matrix).sweeps)
    expected = Counter({cell: 1 for cell in whole if not any(excluded(cell, entry) for entry in entries)})
    assert set(whole.values()) == {1}
    for written in (entries, entries[::-1], entries * 2):
        assert left(planned, {**matrix, "exclude": written}) == expected


@given(matrix=MATRICES, blocks=st.lists(BLOCKS, min_size=1, max_size=2), entries=st.lists(ENTRIES, max_size=1))
@settings(max_examples=30)
def test_include_adds_blocks_as_files_of_their_own(
    planned: Callable[..., Planned], matrix: Any, blocks: Any, entries: Any
) -> None:
    """Less nothing that is excluded, each cell once."""
    own = left(planned, {**matrix, "exclude": entries})
    for block in blocks:
        own |= cells(planned({**matrix, **block}).sweeps)
    for order in (blocks, blocks[::-1]):
        found = planned({**matrix, "exclude": entries, "include": order})
        assert set(cells(found.sweeps)) == set(own)
        keys = [s.key for s in found.sweeps]
        assert len(set(keys)) == len(keys)
        victims = [key for key, _ in itertools.groupby(s.victim.key for s in found.sweeps)]
        assert len(set(victims)) == len(victims)


@given(matrix=MATRICES, scales=st.dictionaries(st.sampled_from("ab"), BLOCKS, min_size=1), n=st.integers(1, 99))
@settings(max_examples=30)
def test_a_scale_is_the_file_with_its_keys_in_place(
    planned: Callable[..., Planned], matrix: Any, scales: Any, n: int
) -> None:
    for name, keys in scales.items():
        found = planned({**matrix, "n": 7, "scales": {**scales, name: {**keys, "n": n}}}, name)
        plain = planned({**matrix, **keys, "n": n})
        assert [s.key for s in found.sweeps] == [s.key for s in plain.sweeps]
        assert {s.limit for s in found.sweeps} == {n}
        assert found.request == plain.request


@given(matrix=MATRICES, flags=BLOCKS, blocks=st.lists(BLOCKS, max_size=1), baseline=st.booleans())
@settings(max_examples=30)
def test_flags_are_the_file_with_their_keys_in_place(
    planned: Callable[..., Planned], matrix: Any, flags: Any, blocks: Any, baseline: bool
) -> None:
    found = planned(
        {**matrix, "include": blocks}, None, Flags({k: tuple(v) for k, v in flags.items()}, baseline=baseline)
    )
    others = [{k: v for k, v in block.items() if k not in flags} for block in blocks]
    plain = planned({**matrix, **flags, "baseline": baseline, "include": others})
    assert [s.key for s in found.sweeps] == [s.key for s in plain.sweeps]


@given(matrix=MATRICES, blocks=st.lists(BLOCKS, max_size=1), entries=st.lists(ENTRIES, max_size=2))
@settings(max_examples=60)
def test_variants_and_the_spec_change_nothing(
    planned: Callable[..., Planned], matrix: Any, blocks: Any, entries: Any
) -> None:
    """Names of one's own for references, and the matrix as it is written into a run's folder."""
    whole = {**matrix, "include": blocks, "exclude": entries}
    assume(left(planned, whole))
    first = planned(whole)
    names = {"cnn:epochs=1": "small", "pgd:steps=3": "short", "jpeg": "squash"}
    text = yaml.safe_dump(whole)
    for reference, name in names.items():
        text = text.replace(f"- {reference}\n", f"- {name}\n").replace(f"- {reference}+", f"- {name}+")
    named = planned(text + yaml.safe_dump({"variants": {name: reference for reference, name in names.items()}}))
    again = planned(spec_text(first.matrix, "advplug run"))
    for other in (named, again):
        assert [s.key for s in other.sweeps] == [s.key for s in first.sweeps]
        assert other.request.seeds == first.request.seeds
