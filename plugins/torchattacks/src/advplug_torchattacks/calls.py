"""Calls of torchattacks' classes, with what single ones need beyond the table."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from advplug.ball import columns
from advplug.contracts import Batch, Targeted, Threat
from advplug.errors import CellFailure
from advplug.perturbations import MinimumNorm
from advplug.wrapping import AsModule, tally_square
from advplug_torchattacks.rows import PREFIX, Row

log = logging.getLogger("advplug")

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
TARGETS = 9
"""Wrong classes that the published AutoAttack tries; torchattacks would try all of them."""
PAIRS = 4096
"""Values of an image up to which JSMA's tables over pairs of them fit into memory (about half a gigabyte)."""


class Around(nn.Module):
    """The victim with its input and its answer changed."""

    def __init__(self, inner: nn.Module, row: Row, gray: bool) -> None:
        super().__init__()
        self.inner = inner
        self._positive, self._gray = row.positive, gray

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x[:, :1] if self._gray else x)
        # Margins and their gradients stay as they are: the shift is the same for all classes, and a constant.
        return logits - logits.detach().amin(1, keepdim=True) + 1 if self._positive else logits


@dataclass(frozen=True)
class Setting:
    """One call: the victim as a module, its images (B, C, H, W), the threat and the attack's parameters."""

    module: AsModule
    part: Batch
    threat: Threat
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """A row with its parameters, callable as `Wrapped` expects it."""

    row: Row
    given: Mapping[str, Any]
    library: Any

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        """Images like `part.x`; the clean ones where the library's have values that are not finite.

        That happens where it divides by a gradient that vanished, and such an image was not attacked.
        Raises CellFailure for images and class counts that the class cannot take.
        """
        if threat.eps < self._least(threat) and not isinstance(threat.perturbation, MinimumNorm):
            return part.x
        if not isinstance(threat.goal, Targeted):
            part = replace(part, target=None)
        setting = Setting(module, part, threat, self.given)
        arguments = self.row.arguments(self.given, threat.eps)
        extra = ARGUMENTS.get(self.row.attack)
        if extra is not None:
            arguments |= extra(setting)
        gray = self.row.colour and part.x.shape[1] == 1
        around = Around(module, self.row, gray) if gray or self.row.positive else module
        attack = getattr(self.library, self.row.attack)(around, **arguments)
        with warnings.catch_warnings():
            # NumPy 2 warns of how SparseFool turns a tensor into an array.
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept", DeprecationWarning)
            made = RUNS.get(self.row.attack, self._run)(attack, setting)
        made = made.detach()[:, :1] if gray else made.detach()
        finite = made.flatten(1).isfinite().all(1)
        if not finite.all():
            lost = int((~finite).sum())
            log.warning("%s%s: NaN on %d images, which come back as they were", PREFIX, self.row.name, lost)
        return torch.where(columns(finite, made), made, part.x.to(made))

    def _least(self, threat: Threat) -> float:
        """The budget below which nothing can be changed."""
        return 1.0 if threat.norm == "l0" else 1e-12

    def _run(self, attack: Any, setting: Setting) -> Tensor:
        part = setting.part
        x = part.x.expand(-1, 3, -1, -1) if self.row.colour else part.x
        return _by_label(attack, replace(part, x=x), self.row.both_labels)


def _seed() -> int:
    """A seed for a class that sets the global one itself; it depends on the run's, which is set by now."""
    return int(torch.randint(2**31 - 1, ()))


def _classes_for_dlr(setting: Setting) -> None:
    if setting.given["loss"] != "dlr":
        return
    needed = 3 if setting.part.target is None else 4
    if setting.module.classes < needed:
        raise CellFailure(f"loss=dlr needs {needed} classes, there are {setting.module.classes}; use loss=ce")


def _apgd(setting: Setting) -> dict[str, Any]:
    _classes_for_dlr(setting)
    return {"norm": NORMS[setting.threat.norm], "seed": _seed()}


def _upgd(setting: Setting) -> dict[str, Any]:
    _classes_for_dlr(setting)
    return {}


def _apgdt(setting: Setting) -> dict[str, Any]:
    tried = min(setting.given["n_targets"], setting.module.classes - 1)
    return {"norm": NORMS[setting.threat.norm], "seed": _seed(), "n_classes": tried + 1}


def _autoattack(setting: Setting) -> dict[str, Any]:
    tried = min(TARGETS, setting.module.classes - 1)
    return {"norm": NORMS[setting.threat.norm], "seed": _seed(), "n_classes": tried + 1}


def _smoothing(setting: Setting) -> dict[str, Any]:
    kind = setting.given["noise_type"]
    # The engine sizes batches, and the library's name of the distribution is misspelt.
    batch_max = len(setting.part) * setting.given["noise_batch_size"]
    return {"noise_type": "guassian" if kind == "gaussian" else kind, "batch_max": batch_max}


def _square(setting: Setting) -> dict[str, Any]:
    height, width = setting.part.x.shape[2:]
    p_init = setting.given["p_init"]
    if setting.threat.norm == "l2":
        shorter = min(height, width)
        if shorter < 5:
            raise CellFailure(f"{PREFIX}square needs images of 5 x 5 pixels in L2, these are {height} x {width}")
        # The square's side is rounded up to an odd number, and must not outgrow the image.
        p_init = min(p_init, (shorter - 1) ** 2 / (height * width))
    # Beside the search it asks for the clean images, for the start and for the end.
    return {
        "norm": NORMS[setting.threat.norm],
        "seed": _seed(),
        "p_init": p_init,
        "n_queries": setting.given["queries"] - 3,
    }


def _spsa(setting: Setting) -> dict[str, Any]:
    if setting.given["lr"] is not None:
        return {}
    return {"lr": setting.threat.eps * min(1.0, 2.5 / setting.given["nb_iter"])}


def _onepixel(setting: Setting) -> dict[str, Any]:
    height, width = setting.part.x.shape[2:]
    return {"pixels": min(int(setting.threat.eps), height * width)}


def _pixle(setting: Setting) -> dict[str, Any]:
    sides = (setting.given["patch_min"], setting.given["patch_max"])
    return {"x_dimensions": sides, "y_dimensions": sides}


def _fab(setting: Setting) -> dict[str, Any]:
    return {"norm": NORMS[setting.threat.norm]}


ARGUMENTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "APGD": _apgd,
    "APGDT": _apgdt,
    "AutoAttack": _autoattack,
    "FAB": _fab,
    "OnePixel": _onepixel,
    "PGDRS": _smoothing,
    "PGDRSL2": _smoothing,
    "Pixle": _pixle,
    "SPSA": _spsa,
    "Square": _square,
    "UPGD": _upgd,
}
"""Arguments that depend on more than the parameters and eps, by class."""


def _run_fab(attack: Any, setting: Setting) -> Tensor:
    # The class's own loop drops what is beyond its eps, and knows no L1; the single run seeks the smallest change.
    with torch.no_grad():
        made: Tensor = attack.attack_single_run(setting.part.x, setting.part.y)
    return made


def _run_jsma(attack: Any, setting: Setting) -> Tensor:
    """Always with targets of its own: without, it takes the class after the label among ten."""
    part = setting.part
    values = part.x[0].numel()
    if values > PAIRS:
        raise CellFailure(f"{PREFIX}jsma compares all pairs of an image's values; at most {PAIRS}, these have {values}")
    attack.set_mode_targeted_by_label(quiet=True)
    target = (part.y + 1) % setting.module.classes if part.target is None else part.target
    made: Tensor = attack(part.x, target)
    return made


def _run_square(attack: Any, setting: Setting) -> Tensor:
    tally_square(attack, setting.module, setting.part.x)
    return _by_label(attack, setting.part)


def _run_on_cpu(attack: Any, setting: Setting) -> Tensor:
    # It indexes NumPy arrays with the labels; the module takes its input to the victim's device.
    attack.set_device(torch.device("cpu"))
    return _by_label(attack, setting.part)


def _run_pixle(attack: Any, setting: Setting) -> Tensor:
    mapped = attack.get_pixel_mapping

    def transposed(*args: Any, **kwargs: Any) -> list[tuple[int, int]]:
        # Places come as (column, row) and are used as (row, column), beyond the edge of images that are not square.
        return [(row, column) for column, row in mapped(*args, **kwargs)]

    attack.get_pixel_mapping = transposed
    return _by_label(attack, setting.part)


def _by_label(attack: Any, part: Batch, both_labels: bool = False) -> Tensor:
    """Toward the targets where there are some, which then stand in the place of the labels."""
    labels = part.y
    if part.target is not None and both_labels:
        attack.set_mode_targeted_by_function(lambda _images, _labels: part.target, quiet=True)
    elif part.target is not None:
        attack.set_mode_targeted_by_label(quiet=True)
        labels = part.target
    made: Tensor = attack(part.x, labels)
    return made


RUNS: dict[str, Callable[[Any, Setting], Tensor]] = {
    "FAB": _run_fab,
    "JSMA": _run_jsma,
    "OnePixel": _run_on_cpu,
    "Pixle": _run_pixle,
    "Square": _run_square,
}
"""Classes that are not called in the common way."""
