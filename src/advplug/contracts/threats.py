"""What an attacker wants, may do and needs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TypeAlias

from advplug.perturbations import Perturbation

Norm: TypeAlias = str
"""One of `perturbations.SETS`: 'linf', 'l2', 'l1', 'l0', 'spatial', 'patch' or 'unrestricted'."""


class Access(StrEnum):
    """What an attacker needs of the victim."""

    GRADIENT = "gradient"
    SCORE = "score"
    DECISION = "decision"
    TRAINING_SET = "training-set"


class Strength(IntEnum):
    """What a failed attack proves: nothing (FLOOR) up to APGD-strength evidence (STRONG)."""

    FLOOR = 0
    ONE_STEP = 1
    ITERATIVE = 2
    STRONG = 3


@dataclass(frozen=True)
class Untargeted:
    """Any wrong answer is a success."""

    def __str__(self) -> str:
        return "untargeted"


@dataclass(frozen=True)
class Targeted:
    """Only the target class is a success.

    `to` is 'next' (label + 1), 'random' (any other class), 'least-likely' (the smallest clean score),
    the index of a class, or the text of one, where classes are texts.
    """

    to: str | int = "next"

    def __str__(self) -> str:
        return f"targeted:{self.to}"


@dataclass(frozen=True)
class Minimise:
    """The less an image resembles its own texts, the better; nothing counts as a success.

    `score` is 'similarity': the mean cosine between an image and its own texts.
    """

    score: str = "similarity"

    def __str__(self) -> str:
        return f"minimise:{self.score}"


Goal: TypeAlias = Untargeted | Targeted | Minimise


@dataclass(frozen=True)
class Threat:
    """One point: what may change, to what end, with which access, for how many queries."""

    perturbation: Perturbation
    goal: Goal = Untargeted()
    access: Access = Access.GRADIENT
    queries: int | None = None

    @property
    def norm(self) -> Norm:
        return self.perturbation.norm

    @property
    def eps(self) -> float:
        return float(self.perturbation.eps)
