"""Budgets as people write them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from advplug.budgets import Budget, customary, parse_budget, resolve
from advplug.errors import UsageError


@pytest.mark.parametrize(
    ("text", "norm", "eps"),
    [
        ("8/255", None, Fraction(8, 255)),
        ("0.1", None, Fraction(1, 10)),
        ("1e-3", None, Fraction(1, 1000)),
        ("0", None, Fraction(0)),
        ("1", None, Fraction(1)),
        ("l2:0.5", "l2", Fraction(1, 2)),
        ("L2: 3", "l2", Fraction(3)),
        ("linf:8 / 255", "linf", Fraction(8, 255)),
        ("0.5/255", None, Fraction(1, 510)),
    ],
)
def test_budgets_are_exact(text, norm, eps):
    assert parse_budget(text) == Budget(eps, norm)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8/0", "divides by zero"),
        ("-0.1", "negative"),
        ("nan", "not a number"),
        ("inf", "not a number"),
        ("", "not a number"),
        ("eight", "not a number"),
        ("linf:2", "L-inf budget above 1"),
        ("linf:8", "did you mean 8/255"),
        ("l3:1", "no norm is called 'l3'"),
        ("8/255/2", "not a number"),
    ],
)
def test_what_is_no_budget_says_why(text, says):
    with pytest.raises(UsageError, match=says):
        parse_budget(text)


def test_a_bare_eps_takes_the_only_norm_or_linf():
    assert resolve(Budget(Fraction(3)), frozenset({"l2"})) == ("l2", Fraction(3))
    assert resolve(Budget(Fraction(1, 2)), frozenset({"l2", "linf"})) == ("linf", Fraction(1, 2))
    assert resolve(Budget(Fraction(3)), frozenset({"l2", "linf"}), "l2") == ("l2", Fraction(3))
    with pytest.raises(UsageError, match="above 1"):
        resolve(Budget(Fraction(3), None), frozenset({"l2", "linf"}))


def test_customary_budgets():
    budgets = {"linf": Fraction(1, 10), "l2": Fraction(2)}
    assert customary(budgets, frozenset({"linf", "l2"})) == Budget(Fraction(1, 10), "linf")
    assert customary(budgets, frozenset({"l2"})) == Budget(Fraction(2), "l2")
    with pytest.raises(UsageError, match="no customary budget in l1"):
        customary(budgets, frozenset({"l1"}))
