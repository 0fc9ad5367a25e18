"""Where models look: saliency, GradientShap and LIME on clean and adversarial images, through Captum (an extra).

The models are built again, from the cache of weights where it has them, and must be those that were evaluated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from advplug.errors import AdvplugError, CellFailure, UsageError
from advplug.evidence import Array
from advplug.report.images import called, strip, tile
from advplug.report.parts import (
    DASH,
    Data,
    Entry,
    Grid,
    Section,
    Strip,
    Value,
    attack_of,
    beside,
    grouped,
    tabulated,
    victim,
    word,
)
from advplug.results import Cell
from advplug.stored.samples import Sample
from advplug.studies.shown_names import spelled_out

if TYPE_CHECKING:
    from torch import Tensor

    from advplug.build import Built
    from advplug.victim import Victim

VICTIMS, IMAGES = 4, 4
"""Explained at most."""
PIXELS = 112
"""A side is shown with at most twice as many."""
PATCHES = 8
"""LIME's patches along a side."""
_SHAP, _LIME = 24, 192
"""Samples of an image."""
_NOISE = 0.05
METHODS = ("saliency", "GradientShap", "LIME")
_POSITIVE, _NEGATIVE = np.array([213, 94, 0]), np.array([0, 114, 178])
"""Colours of what speaks for the answer and against it; white is nothing."""


@dataclass(frozen=True)
class Explained:
    """One victim's `k` images, clean and adversarial by turns (2k, C, H, W) uint8: the answers (2k,) and, by method,
    what each pixel adds to the answer's logit (2k, H, W)."""

    cell: Cell
    sample: Sample
    images: Array
    answers: Array
    maps: dict[str, Array]


def explanations(data: Data, device: str = "auto", offline: bool = False) -> Section | None:
    """The section; None where the folder has no images. What could not be explained is said with its reason.

    Raises UsageError without Captum, and for a device that is not there.
    """
    try:
        import captum  # noqa: F401
    except ImportError:
        raise UsageError(
            "--explain needs captum: pip install 'advplug[explain]'; without it leave --explain out"
        ) from None
    from advplug.artifacts import Artifacts
    from advplug.build import Builder
    from advplug.progress import Silent

    chosen = _chosen(data)
    if not chosen:
        return None
    builder = Builder(Artifacts(), device, offline, Silent())
    grids: list[Grid] = []
    items = []
    for cell in chosen[:VICTIMS]:
        try:
            found = explain(spelled_out(cell, data.result.run.names), data.samples[cell.key], builder)
        except AdvplugError as error:
            items.append(Entry("fair", "not explained", victim(cell), str(error)))
            continue
        grids.append(_grid(replace(found, cell=cell), data.classes.get(cell.dataset, ())))
    lead: tuple[str, ...] = _LEAD
    if len(chosen) > VICTIMS:
        lead += (f"The first {VICTIMS} of {len(chosen)} victims are explained.",)
    return Section("explanations", "Explanations", lead, grids=tuple(grids), items=tuple(items))


_LEAD = (
    "What speaks for the class that the model answers to the image above, pixel by pixel: orange for it, blue against "
    "it; each map has a scale of its own. Saliency is the size of the gradient of the answer's logit, GradientShap "
    "weighs it with the distance from black and mean images, LIME fits a linear model to the logits of images with "
    "black patches. Gradients of a defended model pass the defense as it declares.",
    "A map says where a model is sensitive, not that it is right or robust.",
)


def _chosen(data: Data) -> list[Cell]:
    """Of each victim the cell that changed most of the kept images' answers, at the smallest budget."""
    cells = [c for c in data.done if c.key in data.samples and len(data.samples[c.key])]
    victims = grouped(cells, lambda c: (c.dataset, c.model, c.defense, c.seed))
    return [max(own, key=lambda c: int(_changed(data.samples[c.key]).sum())) for own in victims.values()]


def _changed(sample: Sample) -> Array:
    return np.asarray(sample.before != sample.after)


def explain(cell: Cell, sample: Sample, builder: Any) -> Explained:
    """Explains up to `IMAGES` of the sample's images, first those whose answer changed.

    Raises UsageError where the victim cannot be named anew, as objects of one's own cannot, or where what is built
    now has other weights than what was evaluated; CellFailure where the model cannot be explained.
    """
    import torch

    built = _built(cell, builder)
    rows = np.argsort(~_changed(sample), kind="stable")[:IMAGES]
    images = np.stack([sample.clean[rows], sample.adversarial[rows]], axis=1).reshape(-1, *sample.clean.shape[1:])
    x = torch.from_numpy(images).float().div(255).to(built.victim.device)
    built.victim.reseed("explained")
    labels = built.victim.logits(x).argmax(1)
    try:
        with built.victim.frozen(), _seeded(built):
            maps = dict(_maps(built.victim, x, labels))
    except (RuntimeError, ValueError, AssertionError) as error:  # of a model that Captum cannot follow
        raise CellFailure(f"Captum cannot explain it: {' '.join(str(error).split())}") from error
    part = Sample(sample.index[rows], sample.y[rows], sample.clean[rows], sample.adversarial[rows],
                  sample.before[rows], sample.after[rows], sample.attacked[rows])  # fmt: skip
    return Explained(cell, part, images, labels.cpu().numpy(), maps)


def _built(cell: Cell, builder: Any) -> Built:
    from advplug.parse import parse_reference, parse_stack
    from advplug.plans import VictimPlan, bind, bind_stack
    from advplug.registry import registry

    known = registry()
    plan = VictimPlan(
        bind(known, "dataset", parse_reference(cell.dataset)),
        bind(known, "model", parse_reference(cell.model)),
        bind_stack(known, parse_stack(cell.defense)),
        cell.seed,
    )
    built: Built = builder.build(plan, 1)
    if built.weights_sha256 != cell.provenance.get("weights_sha256"):
        raise UsageError("the weights that are made now are not those that were evaluated; run the evaluation anew")
    return built


@contextmanager
def _seeded(built: Built) -> Iterator[None]:
    """Captum draws from the global generators, and warns of what is meant here."""
    from advplug.rng import Stream

    with Stream(built.seed, "explain").as_global(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _maps(victim: Victim, x: Tensor, labels: Tensor) -> Iterator[tuple[str, Array]]:
    """By method (n, H, W), what each pixel adds to the logit of its image's label (n,)."""
    import torch
    from captum.attr import GradientShap, Lime, Saliency

    from advplug.contracts import Gradient

    def attacked(images: Tensor) -> Tensor:
        victim.reseed("explained")
        return victim.attacked(images)

    def deployed(images: Tensor) -> Tensor:
        victim.reseed("explained")
        return victim.logits(images)

    if victim.gradient is not Gradient.NONE:
        found = Saliency(attacked).attribute(x.clone().requires_grad_(), target=labels)
        yield METHODS[0], _flat(found.amax(1))
        baselines = torch.stack([torch.zeros_like(x[0]), x.mean(0)])
        shap = GradientShap(attacked).attribute(
            x.clone().requires_grad_(), baselines=baselines, n_samples=_SHAP, stdevs=_NOISE, target=labels
        )
        yield METHODS[1], _flat(shap.sum(1))
    lime, mask = Lime(deployed), _patches(x)
    parts = [
        lime.attribute(x[i : i + 1], target=labels[i : i + 1], feature_mask=mask, n_samples=_LIME,
                       perturbations_per_eval=min(32, victim.batch_size))
        for i in range(len(x))
    ]  # fmt: skip
    yield METHODS[2], _flat(torch.cat(parts)[:, 0])


def _flat(maps: Tensor) -> Array:
    made: Array = maps.detach().cpu().double().numpy()
    return made


def _patches(x: Tensor) -> Tensor:
    """(1, 1, H, W): the number of the patch that a pixel belongs to, shared by its channels."""
    import torch

    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device) * min(PATCHES, height) // height
    columns = torch.arange(width, device=x.device) * min(PATCHES, width) // width
    return (rows[:, None] * min(PATCHES, width) + columns)[None, None]


# --- the page ---


def _grid(found: Explained, classes: tuple[str, ...]) -> Grid:
    answers = called(found.answers, classes)
    changed = tuple(i % 2 == 1 and answers[i] != answers[i - 1] for i in range(len(answers)))
    what = f"{attack_of(found.cell)}, {found.cell.norm} {found.cell.eps}"
    name = victim(found.cell)
    told = f"Clean and adversarial images by turns ({what}); {name} answers {', '.join(answers)}"
    images = found.images if found.images.shape[1] in (1, 3) else found.images[:, :1]
    strips = [Strip("image, answer", told, strip(_smaller(images)), tuple(answers), changed)]
    for method, maps in found.maps.items():
        alt = f"{method} of {name} on the images above; how alike clean and adversarial maps are is in the table below"
        strips.append(Strip(method, alt, strip(_smaller(coloured(maps)))))
    true = called(found.sample.y, classes)
    header = tuple(t for t in true for _ in range(2))
    small = ("clean", "attacked") * len(true)
    side = _smaller(images).shape[-1]
    title = f"{name} on {found.cell.dataset}{beside(found.cell)}: {what}"
    return Grid(title, f"{len(true)} images", header, tuple(strips), tile(side), True, small,
                table=_alike(found, true, answers))  # fmt: skip


def _smaller(images: Array) -> Array:
    """Images uint8 (n, C, H, W), averaged over squares of pixels where they are large."""
    n, channels, height, width = images.shape
    by = max(1, max(height, width) // PIXELS)
    if by == 1:
        return images
    height, width = height // by, width // by
    squares = images[:, :, : height * by, : width * by].reshape(n, channels, height, by, width, by)
    return np.asarray(squares.mean(axis=(3, 5)).round().astype(np.uint8))


def coloured(maps: Array) -> Array:
    """Maps (n, H, W) as uint8 (n, 3, H, W): white is 0, the full colours are the 99th percentile of the sizes."""
    most = np.quantile(np.abs(maps), 0.99, axis=(1, 2), keepdims=True)
    most = np.maximum(most, np.abs(maps).max(axis=(1, 2), keepdims=True) * (most == 0))
    share = np.clip(np.divide(maps, most, out=np.zeros_like(maps), where=most > 0), -1, 1)[..., None]
    pixels = 255 + np.where(share >= 0, share * (_POSITIVE - 255), -share * (_NEGATIVE - 255))
    return np.moveaxis(pixels.round().astype(np.uint8), -1, 1)


def _alike(found: Explained, true: Sequence[str], answers: Sequence[str]) -> Any:
    """How alike the maps of an image and its adversarial twin are."""
    columns: dict[str, Any] = {
        "image": lambda i: word(f"no. {found.sample.index[i]}"),
        "true class": lambda i: word(true[i]),
        "answer clean": lambda i: word(answers[2 * i]),
        "answer adversarial": lambda i: word(answers[2 * i + 1]),
    }
    for method, maps in found.maps.items():
        columns[method] = lambda i, maps=maps: _correlation(maps[2 * i], maps[2 * i + 1])
    caption = f"Rank correlation (Spearman) of clean and adversarial maps: {victim(found.cell)}"
    return tabulated(caption, columns, range(len(true)))


def _correlation(one: Array, other: Array) -> Value:
    """1 for the same order of pixels, 0 for none in common."""
    from scipy.stats import spearmanr

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return DASH
    found = float(spearmanr(one.ravel(), other.ravel()).statistic)
    return Value(f"{found:+.2f}", found)
