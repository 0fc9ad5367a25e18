"""Detectors, which answer or reject: parameters and specs. Torch is imported only when one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Calibrated, Defense, DefenseCaps, Gradient, Param, Spec, Wrap
from advplug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from advplug.train import Training

FPR = 0.05
IMAGES = 1000
AT_ONCE = 64
"""Images that are scored together; another number would change no figure by more than float32 does."""


def feature_squeezing(
    squeezers: Annotated[
        Literal["auto", "mnist", "cifar", "imagenet"],
        Param("what is compared: the paper's best for that data; auto: by the images' channels and size"),
    ] = "auto",
    fpr: Annotated[
        float | None, Param("share of the training images that the threshold rejects; none: 0.05", gt=0, lt=1)
    ] = None,
    images: Annotated[int | None, Param("training images that the threshold is taken from; none: 1000", ge=1)] = None,
    threshold: Annotated[
        float | None, Param("score beyond which an image is rejected, instead of one taken from images", ge=0, le=2)
    ] = None,
) -> Defense:
    """Rejects images whose probabilities change by more than a threshold (L1) when detail is taken away.

    Raises UsageError where both a threshold and how to find it are given; `Calibrated.measure` raises it where
    there are no training images.
    """
    _agreeing(fpr, images, threshold)

    def measure(inner: Callable[[Tensor], Tensor], training: Training) -> Mapping[str, Any]:
        import torch

        from advplug.defenses.squeezing import PRESETS, preset_for, score, threshold_at
        from advplug.splits import subset

        name = preset_for(training.info) if squeezers == "auto" else squeezers
        told = {"preset": name, "squeezers": list(PRESETS[name])}
        if threshold is not None:
            return {"threshold": threshold, **told}
        if not len(training.data):
            raise UsageError(
                "feature-squeezing takes its threshold from training images, and this dataset has none; "
                "give one, as feature-squeezing:threshold=1"
            )
        some = training.data.subset(subset(training.data.labels, images or IMAGES))
        with torch.no_grad():
            parts = [score(inner, batch.x, PRESETS[name]) for batch in some.batches(AT_ONCE, training.device)]
        found = threshold_at(torch.cat(parts), fpr or FPR)
        return {"threshold": found, "fpr": fpr or FPR, "calibration_images": len(some), **told}

    return (Calibrated(measure, _wrap),)


def _agreeing(fpr: float | None, images: int | None, threshold: float | None) -> None:
    if threshold is not None and (fpr is not None or images is not None):
        raise UsageError("feature-squeezing: give threshold, or fpr and images to find it, not both")


def _caps(params: Mapping[str, Any]) -> DefenseCaps:
    _agreeing(params["fpr"], params["images"], params["threshold"])
    return CAPS if params["threshold"] is None else replace(CAPS, needs_data=False)


def _wrap(figures: Mapping[str, Any]) -> Wrap:
    from advplug.defenses.squeezing import PRESETS, rejection

    def forward(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        return inner(x)

    return Wrap(forward, Gradient.BPDA, rejection=rejection(figures["threshold"], PRESETS[figures["preset"]]))


CAPS = DefenseCaps(
    ("wrap",), Gradient.BPDA, rejects=True, needs_data=True, loaded="feature-squeezing:threshold=1", stand_ins=1
)

DEFENSES: list[Spec] = [
    Spec(
        "feature-squeezing",
        "advplug.builtin.detectors:feature_squeezing",
        CAPS,
        "Rejects images whose answer changes when they are squeezed: fewer bits, median, non-local means",
        "Xu et al. 2017, arXiv 1704.01155; attacked with its score: He et al. 2017, arXiv 1706.04701",
        narrow=_caps,
    )
]
