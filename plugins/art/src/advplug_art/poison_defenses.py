"""Factories of ART's defenses against poisons. Torch and ART are imported only when one is at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from advplug.contracts import Defense, Param, Sift, Sifted, Tune, Tuned
from advplug.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from advplug.train import Training

SHARE, COHESION = 0.35, 0.1
"""ART's thresholds of activation clustering."""

Layer = Annotated[str | None, Param("layer whose output is looked at; none: what enters the last layer")]


def activation_clustering(
    analysis: Annotated[
        Literal["smaller", "relative-size", "silhouette", "distance"],
        Param(
            "which cluster of a class is suspected: the smaller; one below a share; that, if clusters are apart; "
            "one that is nearer to another class"
        ),
    ] = "relative-size",
    share: Annotated[
        float | None, Param("most poisons expected, as a share of a class; none: 0.35", gt=0, lt=0.5)
    ] = None,
    cohesion: Annotated[
        float | None, Param("least silhouette of clusters that are apart; none: 0.1", ge=-1, lt=1)
    ] = None,
    reduce: Annotated[Literal["PCA", "FastICA"], Param("how features are reduced")] = "PCA",
    dims: Annotated[int, Param("dimensions that are left of them", ge=1)] = 10,
    layer: Layer = None,
) -> Defense:
    """Removes one of two clusters of a class's features. Raises UsageError for thresholds that the analysis ignores."""
    if share is not None and analysis in ("smaller", "distance"):
        raise UsageError(f"art.activation-clustering: analysis={analysis} knows no share; use relative-size")
    if cohesion is not None and analysis != "silhouette":
        raise UsageError(f"art.activation-clustering: analysis={analysis} knows no cohesion; use silhouette")

    def apply(trained: Callable[[], nn.Module], training: Training) -> Sifted:
        from advplug_art import sifts

        return sifts.activation_clustering(
            trained(), training, analysis, SHARE if share is None else share,
            COHESION if cohesion is None else cohesion, dims, reduce, layer,
        )  # fmt: skip

    return (Sift(apply),)


def spectral_signatures(
    share: Annotated[float, Param("most poisons expected, as a share of a class", gt=0, lt=1)] = 0.33,
    multiplier: Annotated[float, Param("how many times as many images of each class are removed", gt=0)] = 1.5,
    layer: Layer = None,
) -> Defense:
    """Removes the images of each class that lie furthest out: share times multiplier, poisoned or not."""

    def apply(trained: Callable[[], nn.Module], training: Training) -> Sifted:
        from advplug_art import sifts

        return sifts.spectral_signatures(trained(), training, share, multiplier, layer)

    if share * multiplier >= 1:
        raise UsageError("art.spectral-signatures: share times multiplier must stay below 1; nothing would be left")
    return (Sift(apply),)


def neural_cleanse(
    mitigation: Annotated[
        Literal["unlearning", "pruning"], Param("retrained on the found trigger under true labels, or neurons removed")
    ] = "unlearning",
    clean: Annotated[float, Param("share of the clean training images that the defender owns", gt=0, le=1)] = 0.1,
    steps: Annotated[int, Param("passes over these images for each class, at most (ART: 1000)", ge=1)] = 100,
    lr: Annotated[float, Param("Adam's rate", gt=0)] = 0.1,
    success: Annotated[float, Param("share of images that a trigger has to take to its class", gt=0, le=1)] = 0.99,
    weight: Annotated[float, Param("weight of a trigger's size to begin with", gt=0)] = 1e-3,
    threshold: Annotated[float, Param("anomaly index beyond which a class is suspected", gt=0)] = 2.0,
    epochs: Annotated[int | None, Param("of unlearning; none: 1", ge=1)] = None,
) -> Defense:
    """Looks for a trigger smaller than the others, and for neurons that fire for it, or unlearns it.

    Raises UsageError for epochs of pruning, which has none.
    """
    if epochs is not None and mitigation == "pruning":
        raise UsageError("art.neural-cleanse: pruning has no epochs; use mitigation=unlearning")

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_art import cleanse

        search = cleanse.Search(steps, lr, success, weight)
        return cleanse.cleansed(model, training, mitigation, search, threshold, clean, epochs or 1)

    return (Tune(apply),)
