"""The authors' attacks as calls on one batch, and the ensembles that run them one after the other.

Every call takes (module, batch, threat) and returns images like `batch.x`, the clean ones where it failed. The global
generators are seeded before (`advplug.wrapping`), and their seed is handed to each attack, as AutoAttack does with its.
The authors' `AutoAttack` class itself is not used: its checks end any running trace function and write to a logger
of their own; what it does between the checks is in `Ensemble`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from advplug.contracts import Batch, Targeted, Threat
from advplug.errors import CellFailure
from advplug.wrapping import AsModule, Call, tally_square

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
L1_TARGETS, L1_RESTARTS = 5, 5
"""What AutoAttack's standard version takes in L1 in place of 9 target classes and 1 start."""

_SILENT = logging.Logger("silent", logging.CRITICAL + 1)


def _logits(module: AsModule) -> Callable[[Tensor], Tensor]:
    """Logits in the precision of the images, in memory of their own: Square overwrites them."""
    return lambda x: module(x).to(x.dtype, copy=True)


def _passes(module: AsModule, draws: int) -> int:
    """How often to ask for a gradient until `draws` samples are averaged; a fixed victim always answers the same."""
    return -(-draws // module.draws) if module.stochastic else 1


class TargetedCrossEntropy(APGDAttack_targeted):  # type: ignore[misc]
    """APGD-T with cross-entropy towards the target, for class counts at which the targeted DLR is undefined."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        return -torch.nn.functional.cross_entropy(x, self.y_target, reduction="none")


@dataclass(frozen=True)
class Apgd:
    """Auto-PGD on `loss` ('ce' or 'dlr'); in L1 by way of three and two times the radius, as in AutoAttack."""

    loss: str
    steps: int
    restarts: int = 1
    draws: int = 1

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        return _apgd(APGDAttack, self, module, part, threat, loss=self.loss)


@dataclass(frozen=True)
class ApgdTargeted:
    """Auto-PGD on the targeted DLR, towards the likeliest `targets` other classes in turn."""

    steps: int
    targets: int
    restarts: int = 1
    draws: int = 1

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        kind = APGDAttack_targeted if module.classes >= 4 else TargetedCrossEntropy
        return _apgd(kind, self, module, part, threat, n_target_classes=min(self.targets, module.classes - 1))


def _apgd(kind: Any, run: Apgd | ApgdTargeted, module: AsModule, part: Batch, threat: Threat, **further: Any) -> Tensor:
    attack = kind(
        _logits(module), n_iter=run.steps, norm=NORMS[threat.norm], n_restarts=run.restarts, eps=threat.eps,
        seed=torch.initial_seed(), eot_iter=_passes(module, run.draws), use_largereps=threat.norm == "l1",
        device=part.x.device, logger=_SILENT, **further,
    )  # fmt: skip
    made: Tensor = attack.perturb(part.x, part.y)
    return made


@dataclass(frozen=True)
class Fab:
    """FAB; changes beyond eps count as failures."""

    steps: int
    restarts: int

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        return _fab(module, part, threat, n_iter=self.steps, n_restarts=self.restarts)


@dataclass(frozen=True)
class FabTargeted:
    """FAB towards the likeliest `targets` other classes in turn, each from the clean image."""

    steps: int
    targets: int

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        targets = min(self.targets, module.classes - 1)
        return _fab(module, part, threat, n_iter=self.steps, targeted=True, n_target_classes=targets)


def _fab(module: AsModule, part: Batch, threat: Threat, **further: Any) -> Tensor:
    attack = FABAttack_PT(
        _logits(module), norm=NORMS[threat.norm], eps=threat.eps, seed=torch.initial_seed(), device=part.x.device,
        **further,
    )  # fmt: skip
    made: Tensor = attack.perturb(part.x, part.y)
    return made


@dataclass(frozen=True)
class Square:
    """Square on the deployed system, without gradients; `steps` queries a restart, and a few beside them."""

    steps: int
    restarts: int = 1
    first: float = 0.8
    rescale: bool = False

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        height, width = part.x.shape[2:]
        if threat.norm != "linf" and not tiles(height, width):
            raise CellFailure(
                f"Square's start in {threat.norm} does not fit images of {height} x {width} pixels; "
                "use linf, or aa.apgd-t and aa.fab-t"
            )
        targeted, deployed = isinstance(threat.goal, Targeted), module.deployed()
        attack = SquareAttack(
            _logits(deployed), p_init=self.first, n_queries=self.steps,
            eps=threat.eps, norm=NORMS[threat.norm], n_restarts=self.restarts, seed=torch.initial_seed(),
            targeted=targeted, device=part.x.device, resc_schedule=self.rescale,
        )  # fmt: skip
        tally_square(attack, deployed, part.x)
        made: Tensor = attack.perturb(part.x, part.target if targeted else part.y)
        return made


def tiles(height: int, width: int) -> bool:
    """Whether the start that Square makes in L2 and L1 (tiles of a fifth of the height) stays inside the image."""
    side = height // 5
    if side < 2:
        return side == 1
    margin = (height - 5 * side) // 2
    return all(margin + length // side * side <= length for length in (height, width))


@dataclass(frozen=True)
class Ensemble:
    """Attacks one after the other, each on what the deployed system still gets right.

    An image that fooled an attack's own view of a defense, but not the deployed system, is kept until a later attack
    does better, and stays among those to attack.
    """

    def parts(self, classes: int, norm: str) -> Iterator[Call]:
        raise NotImplementedError

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        x = part.x.clone()
        held = ~module.fooled(x, part, threat)
        for run in self.parts(module.classes, threat.norm):
            rows = held.nonzero().flatten()
            if not len(rows):
                break
            left = part.take(rows)
            made = run(module, left, threat).to(x)
            changed = (made != left.x).flatten(1).any(1)
            x[rows.to(x.device)[changed]] = made[changed]
            held[rows] = ~module.fooled(made, left, threat)
        return x


@dataclass(frozen=True)
class Standard(Ensemble):
    steps: int
    targets: int
    queries: int

    def parts(self, classes: int, norm: str) -> Iterator[Call]:
        l1 = norm == "l1"
        yield Apgd("ce", self.steps, L1_RESTARTS if l1 else 1)
        yield ApgdTargeted(self.steps, min(self.targets, L1_TARGETS) if l1 else self.targets)
        yield FabTargeted(self.steps, self.targets)
        yield Square(self.queries)


@dataclass(frozen=True)
class Plus(Ensemble):
    steps: int
    restarts: int
    targets: int
    queries: int

    def parts(self, classes: int, norm: str) -> Iterator[Call]:
        yield Apgd("ce", self.steps, self.restarts)
        if classes >= 3:
            yield Apgd("dlr", self.steps, self.restarts)
        yield Fab(self.steps, self.restarts)
        yield Square(self.queries)
        yield ApgdTargeted(self.steps, self.targets)
        yield FabTargeted(self.steps, self.targets)


@dataclass(frozen=True)
class Rand(Ensemble):
    steps: int
    draws: int

    def parts(self, classes: int, norm: str) -> Iterator[Call]:
        yield Apgd("ce", self.steps, draws=self.draws)
        if classes >= 3:
            yield Apgd("dlr", self.steps, draws=self.draws)
