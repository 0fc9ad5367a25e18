"""The one adapter for ART's attacks on training data: who is poisoned, what ART is handed, what becomes of its images.

All of them change images of one class by little and leave the labels alone. A `Craft` is one attack of ART, a `Goal`
says what for: for some test images, or for images with a trigger.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.contracts import DatasetInfo, Poisoned, Targets, Trigger
from advplug.data import Split
from advplug.decisions import round_to_8_bits
from advplug.errors import CellFailure, UsageError, did_you_mean
from advplug.rng import Stream
from advplug.victim import Victim
from advplug_art.attacks import load, quiet
from advplug_art.estimators import Array
from advplug_art.features import Features, device_of

AT_ONCE = 256
"""Images of a class that a gradient or a measure is taken over, at most."""


class Network(nn.Module):
    """A copy of the surrogate's weights, in evaluation mode for good. ART sees a model on the CPU, with parameters.

    Wraps around the surrogate are left out: poisons are made with the network alone.
    """

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        net = copy.deepcopy(victim.module).eval()
        for parameter in net.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        self._held = (net,)  # in a tuple, so that ART does not move it
        self._device, self._dtype = device_of(net)

    @property
    def net(self) -> nn.Module:
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.to(self._device, self._dtype))
        return logits.to(x.device)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.net.parameters(recurse)

    def train(self, mode: bool = True) -> Network:
        return self

    def features(self, layers: tuple[str, ...], shape: tuple[int, ...], who: str) -> Callable[[Tensor], list[Tensor]]:
        """Images to their features at each layer, (B, D) on the images' device, as `Features` has them."""
        found = Features(self.net, layers, torch.zeros(1, *shape, device=self._device, dtype=self._dtype), who)
        return lambda x: [part.to(x) for part in found(x.to(self._device, self._dtype))]


@dataclass(frozen=True)
class Case:
    """One goal, and the images that may be poisoned for it.

    `x` (N, C, H, W) are training images of class `wanted`, of which `count` are to be poisoned; `goal` (M, C, H, W) is
    to be taken for that class: a test image, or images with a trigger. Arrays of float32 in [0, 1].
    """

    who: str
    network: Network
    info: DatasetInfo
    x: Array
    wanted: int
    count: int
    goal: Array
    stream: Stream
    layers: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def classes(self) -> int:
        return len(self.info.classes)

    @cached_property
    def features(self) -> Callable[[Tensor], list[Tensor]]:
        return self.network.features(self.layers, self.shape, self.who)

    def drawn(self) -> Array:
        """Rows of `x`, `count` of them, drawn without replacement."""
        order = torch.randperm(len(self.x), generator=self.stream.generator("rows"))
        rows: Array = order[: self.count].numpy()
        return rows

    def hot(self, n: int) -> Array:
        """`n` rows with a single 1, at the wanted class."""
        rows: Array = np.eye(self.classes, dtype=np.float32)[np.full(n, self.wanted)]
        return rows

    def estimator(self, **more: Any) -> Any:
        """ART's classifier around the network; its activations are the case's features, whatever layer ART names."""
        made = load("art.estimators.classification:PyTorchClassifier")(
            model=self.network,
            loss=nn.CrossEntropyLoss(),
            input_shape=self.shape,
            nb_classes=self.classes,
            clip_values=(0.0, 1.0),
            channels_first=True,
            device_type="cpu",
            **more,
        )

        def activations(x: Any, layer: Any = None, batch_size: int = 0, framework: bool = False) -> Any:
            images = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            with torch.set_grad_enabled(framework):
                found = torch.cat(self.features(images), 1)
            return found if framework else found.numpy()

        made.get_activations = activations
        return made


Craft = Callable[[Case], tuple[Array, Array]]
"""A case to the rows of `Case.x` (k,) that are poisoned and their images (k, C, H, W)."""
Measure = Callable[[Case, Array], float]
"""How far images (k, C, H, W) have come toward the goal."""


@dataclass(frozen=True)
class Recipe:
    """What an attack makes of a case: by `craft`, within `eps` of each pixel (None: no bound but the attack's own).

    `finish` is put on the images at the end, in 8 bits; `objective` names what `measure` gives.
    """

    who: str
    surrogate: Victim
    share: float
    craft: Craft
    objective: str
    measure: Measure
    eps: float | None = None
    layers: tuple[str, ...] = ()
    finish: Callable[[Tensor], Tensor] | None = None

    def count(self, images: int, name: str) -> int:
        """How many of a class's images are poisoned. Raises UsageError where that is none."""
        count = int(self.share * images + 1e-9)
        if count < 1:
            raise UsageError(
                f"{self.who}: share={self.share:g} of the {images} images of class '{name}' is none; use a larger share"
            )
        return count

    def make(self, case: Case) -> tuple[Array, Array, dict[str, Any]]:
        """Rows of `case.x`, their poisoned images as bytes, and facts. Raises CellFailure for what is no such image."""
        with case.stream.as_global("art"), silent(), torch.enable_grad():
            rows, images = self.craft(case)
        before = torch.from_numpy(case.x[rows])
        after = torch.from_numpy(np.asarray(images, dtype=np.float32))
        if after.shape != before.shape or not bool(after.isfinite().all()):
            raise CellFailure(f"{self.who} made {tuple(after.shape)} of {tuple(before.shape)}, or no numbers")
        if self.eps is not None:
            # Rounding, in float32, may overshoot by a little.
            after = torch.minimum(torch.maximum(after, before - self.eps), before + self.eps)
        after = round_to_8_bits(before, after.clamp(0, 1))
        told = {
            "poisons": len(rows),
            "largest_change": round(float((after - before).abs().max()), 4),
            self.objective: {
                "before": round(self.measure(case, case.x[rows]), 4),
                "after": round(self.measure(case, after.numpy()), 4),
            },
        }
        if self.finish is not None:
            after = self.finish(after)
        return rows, (after * 255).round().byte().numpy(), told


def images_of(data: Split, rows: Array) -> Array:
    """Images (k, C, H, W), float32 in [0, 1], in memory of their own."""
    return data.batch(rows).x.contiguous().numpy().copy()


# --- test images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnTargets:
    """Test images that the surrogate gets right are to be taken for `wanted` (None: a class drawn for each).

    For each, a share of the images of its wanted class is poisoned; no image serves two targets.
    """

    recipe: Recipe
    targets: int
    wanted: str | None

    def __call__(self, data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        """Raises UsageError where there are too few such test images, or too few images of a class."""
        recipe, network = self.recipe, Network(self.recipe.surrogate)
        rows, wanted = self._chosen(network, test, info, rng)
        taken: list[Array] = []
        made: list[Array] = []
        told: list[dict[str, Any]] = []
        for row, goal in zip(rows, wanted, strict=True):
            members = np.flatnonzero(data.labels == goal)
            count = recipe.count(len(members), info.classes[goal])
            free = np.setdiff1d(members, np.concatenate(taken)) if taken else members
            if len(free) < count:
                raise UsageError(
                    f"{recipe.who}: too few images of class '{info.classes[goal]}' are left for all targets; "
                    "use fewer targets or a smaller share"
                )
            case = Case(
                recipe.who, network, info, images_of(data, free), goal, count, images_of(test, np.array([row])),
                rng.child("target", int(test.index[row])), recipe.layers,
            )  # fmt: skip
            picked, images, facts = recipe.make(case)
            taken.append(free[picked])
            made.append(images)
            told.append({"index": int(test.index[row]), "wanted": info.classes[goal], **facts})
        found = Targets(rows, np.array(wanted))
        return finished(
            recipe.who, data, np.concatenate(taken), np.concatenate(made), {"by_target": told}, targets=found
        )

    def _chosen(self, network: Network, test: Split, info: DatasetInfo, rng: Stream) -> tuple[Array, list[int]]:
        who, classes = self.recipe.who, len(info.classes)
        fixed = None if self.wanted is None else class_of(self.wanted, info, who, "wanted")
        right = answers(network, test) == test.labels
        able = np.flatnonzero(right & (test.labels != fixed) if fixed is not None else right)
        if len(able) < self.targets:
            raise UsageError(
                f"{who}: targets={self.targets}, but the surrogate gets only {len(able)} test images right that "
                "could be targets; use fewer"
            )
        order = torch.randperm(len(able), generator=rng.generator("targets"))[: self.targets].numpy()
        rows = able[order]
        draws = torch.randint(1, classes, (self.targets,), generator=rng.generator("wanted")).numpy()
        drawn = [int((test.labels[row] + step) % classes) for row, step in zip(rows, draws, strict=True)]
        return rows, drawn if fixed is None else [fixed] * self.targets


@torch.no_grad()
def answers(network: Network, data: Split) -> Array:
    """The classes (N,) that the network answers."""
    return np.concatenate([network(batch.x).argmax(1).cpu().numpy() for batch in data.batches(AT_ONCE)])


# --- triggers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """A square in the lower right corner: `pattern` (C, side, side) in 8 bits."""

    pattern: Tensor

    def put(self, x: Tensor) -> Tensor:
        """A copy of images (B, C, H, W) with the patch."""
        side = self.pattern.shape[-1]
        marked = x.clone()
        marked[:, :, -side:, -side:] = self.pattern.to(x)
        return marked

    def put_on_array(self, x: Array) -> Array:
        """`put`, as one of ART's perturbations."""
        marked: Array = self.put(torch.from_numpy(x)).numpy()
        return marked

    def apply(self, x: Tensor, _index: Tensor) -> Tensor:
        """`put`, as `Trigger.apply`: the same for every image."""
        return self.put(x)


def patch(kind: str, side: int, info: DatasetInfo, rng: Stream, who: str) -> Patch:
    """A white square, a checkerboard or noise in all channels. Raises UsageError where it covers the image."""
    if side >= min(info.size):
        height, width = info.size
        raise UsageError(f"{who}: a patch of {side} pixels does not fit into {height} x {width}; use a smaller size")
    place = torch.arange(side)
    board = ((place[:, None] + place) % 2 == 0).float().expand(info.channels, side, side)
    noise = torch.randint(0, 256, (info.channels, side, side), generator=rng.generator("patch")) / 255
    return Patch({"white": torch.ones_like(board), "checkerboard": board, "noise": noise}[kind].contiguous())


@dataclass(frozen=True)
class OnTrigger:
    """Images with a patch are to be taken for class `target`, a share of whose images is poisoned.

    `source` is the one class whose images are meant; "" is one that is drawn, None all of them.
    """

    recipe: Callable[[Patch], Recipe]
    who: str
    kind: str
    side: int
    target: str
    source: str | None

    def __call__(self, data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        """Raises UsageError for classes that are none, or a patch that does not fit."""
        mark = patch(self.kind, self.side, info, rng, self.who)
        recipe, goal = self.recipe(mark), class_of(self.target, info, self.who, "target")
        source = self._source(goal, info, rng)
        members = np.flatnonzero(data.labels == goal)
        count = recipe.count(len(members), info.classes[goal])
        shown = np.flatnonzero(data.labels != goal if source is None else data.labels == source)
        if len(shown) < 1:
            raise UsageError(f"{self.who}: there are no training images of the source class; name another source")
        order = torch.randperm(len(shown), generator=rng.generator("shown"))[: max(AT_ONCE, count)].numpy()
        triggered = mark.put_on_array(images_of(data, shown[order]))
        network = Network(recipe.surrogate)
        case = Case(
            self.who, network, info, images_of(data, members), goal, count, triggered, rng.child("craft"), recipe.layers
        )
        picked, images, facts = recipe.make(case)
        told = {"target": info.classes[goal], "source": "all" if source is None else info.classes[source]}

        def wanted(y: Tensor) -> Tensor:
            asked = torch.full_like(y, goal)
            return asked if source is None else torch.where(y == source, asked, y)

        return finished(self.who, data, members[picked], images, told | facts, trigger=Trigger(mark.apply, wanted))

    def _source(self, target: int, info: DatasetInfo, rng: Stream) -> int | None:
        if self.source is None:
            return None
        if self.source:
            found = class_of(self.source, info, self.who, "source")
            if found == target:
                raise UsageError(f"{self.who}: source and target are the same class; name two")
            return found
        step = int(torch.randint(1, len(info.classes), (1,), generator=rng.generator("source")))
        return (target + step) % len(info.classes)


# --- both ------------------------------------------------------------------------------------------


def class_of(text: str, info: DatasetInfo, who: str, key: str) -> int:
    """The class of that number or name. Raises UsageError."""
    if text.isdecimal() and int(text) < len(info.classes):
        return int(text)
    lowered = [name.lower() for name in info.classes]
    if lowered.count(text.lower()) == 1:
        return lowered.index(text.lower())
    hint = did_you_mean(text, info.classes) or f"; the dataset has classes 0 to {len(info.classes) - 1}"
    raise UsageError(f"{who}: {key} takes a class number or the name of one, got '{text}'{hint}")


def finished(
    who: str,
    data: Split,
    rows: Array,
    images: Array,
    facts: dict[str, Any],
    trigger: Trigger | None = None,
    targets: Targets | None = None,
) -> Poisoned:
    """`data` with other images (k, C, H, W), bytes, at `rows` (k,); those that rounding left as they were are no
    poisons. Raises UsageError where that is true of all."""
    order = np.argsort(rows)
    rows, images = rows[order], images[order]
    before = data.batch(rows).x.mul(255).round().byte().numpy()
    differs = (before != images).any(axis=(1, 2, 3))
    rows, images = rows[differs], images[differs]
    if not len(rows):
        raise UsageError(f"{who}: no image has changed in 8 bits; use a larger eps or more steps")
    mask = np.zeros(len(data), dtype=bool)
    mask[rows] = True
    told = {**facts, "poisons": len(rows), "share_of_training_set": round(len(rows) / max(1, len(data)), 5)}
    return Poisoned(data.changed(rows, images), mask, data.subset(rows), trigger, targets, told)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """`quiet`, and without what ART prints: its progress bars cannot be switched off."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", module="sklearn")  # clusters that are not apart, and the like
        yield
