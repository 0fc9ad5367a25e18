"""Perturbation budgets as people write them: `8/255`, `0.1`, `l2:0.5`; kept as exact fractions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from advplug.contracts import Norm
from advplug.errors import UsageError, did_you_mean
from advplug.params import fraction
from advplug.perturbations import CUSTOMARY, SETS


@dataclass(frozen=True)
class Budget:
    """A radius in pixel units; `norm` is None where it was not written."""

    eps: Fraction
    norm: Norm | None = None

    def __str__(self) -> str:
        return f"{self.norm}:{self.eps}" if self.norm else str(self.eps)


def parse_budget(text: str) -> Budget:
    """Raises UsageError for anything that is no radius: `8/0`, `nan`, negative, `linf:2`."""
    norm, colon, number = text.strip().rpartition(":")
    norm = norm.strip().lower()
    if colon and norm not in SETS:
        raise UsageError(
            f"eps '{text}': no norm is called '{norm}'{did_you_mean(norm, SETS)}; norms: {', '.join(SETS)}"
        )
    # A bare radius has no norm yet: whether it is too large is known once an attack takes it.
    return Budget(check_eps(text, _fraction(text, number), norm or "l2"), norm or None)


def check_eps(text: str, eps: Fraction, norm: Norm) -> Fraction:
    """`eps` where it is a possible radius in `norm`, otherwise UsageError."""
    if eps < 0:
        raise UsageError(f"eps '{text}' is negative; a budget is a radius of at least 0")
    if norm == "linf" and eps > 1:
        hint = f"did you mean {eps}/255?" if eps <= 255 else "write it like 8/255"
        raise UsageError(f"eps '{text}': pixels lie in [0, 1], an L-inf budget above 1 has no meaning; {hint}")
    if norm == "l0" and eps.denominator != 1:
        raise UsageError(f"eps '{text}': an L0 budget is a number of pixels; write it like l0:10")
    if norm in ("spatial", "patch") and eps > 1:
        raise UsageError(f"eps '{text}': a {norm} budget is a share between 0 and 1; write it like {norm}:0.5")
    if norm == "unrestricted" and eps != 1:
        raise UsageError(f"eps '{text}': unrestricted changes have no size; the only budget is unrestricted:1")
    return eps


def _fraction(text: str, number: str) -> Fraction:
    try:
        return fraction(number)
    except ZeroDivisionError:
        raise UsageError(f"eps '{text}' divides by zero; write it like 8/255") from None
    except ValueError:
        raise UsageError(f"eps '{text}' is not a number; write it like 8/255, 0.1 or l2:0.5") from None


def resolve(budget: Budget, norms: frozenset[Norm], explicit: Norm | None = None) -> tuple[Norm, Fraction]:
    """The norm and radius an attack that supports `norms` takes from `budget`.

    A bare eps takes the attack's only norm, or L-inf where it has several.
    """
    norm = budget.norm or explicit or (next(iter(norms)) if len(norms) == 1 else "linf")
    return norm, check_eps(str(budget), budget.eps, norm)


def customary(budgets: Mapping[Norm, Fraction], norms: frozenset[Norm], explicit: Norm | None = None) -> Budget:
    """The dataset's customary budget in `explicit`, or in the first norm that the attack supports."""
    order = [explicit] if explicit else [n for n in SETS if n in norms]
    for norm in order:
        if norm in budgets or norm in CUSTOMARY:
            return Budget(budgets[norm] if norm in budgets else CUSTOMARY[norm], norm)
    wanted = " or ".join(order)
    raise UsageError(f"this dataset has no customary budget in {wanted}; give one, like -e {order[0]}:0.5")
