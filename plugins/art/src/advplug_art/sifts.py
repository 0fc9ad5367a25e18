"""ART's filters of training sets: they look at features of the poisoned model, class by class.

ART gets features for images: it flattens what its classifier answers, and all images need not be in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from advplug.contracts import Sifted
from advplug.train import Training
from advplug_art.attacks import load
from advplug_art.estimators import Array
from advplug_art.features import Features, of_images
from advplug_art.poisons import AT_ONCE, silent

_POISON = "art.defences.detector.poison."


@dataclass(frozen=True)
class Classes:
    """The classes that are looked at: features (n, D), their place (n,) among `members`, rows by class."""

    features: Array
    places: Array
    members: tuple[tuple[int, Array], ...]

    def classifier(self) -> Any:
        """What ART takes for a classifier: its features are what it is handed."""
        return SimpleNamespace(
            nb_classes=len(self.members), layer_names=["features"], get_activations=lambda x, **_asked: x
        )


def features_of(model: nn.Module, training: Training, layer: str | None, who: str) -> Array:
    """Features (N, D) of all training images. Raises UsageError for a layer that the model does not have."""
    probe = training.data.batch(np.arange(1)).x.to(training.device)
    look = Features(model, (layer,) if layer else (), probe, who)
    return np.concatenate([of_images(look, batch.x) for batch in training.data.batches(AT_ONCE)])


def looked_at(features: Array, labels: Array, least: int) -> Classes:
    """The classes with at least `least` images, numbered anew."""
    members = [(int(c), np.flatnonzero(labels == c)) for c in np.unique(labels)]
    enough = tuple((c, rows) for c, rows in members if len(rows) >= least)
    rows = [rows for _, rows in enough]
    places = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    return Classes(features[np.concatenate(rows)] if rows else features[:0], places, enough)


def sifted(
    look: Callable[[Classes], list[Array]], classes: Classes, training: Training, facts: dict[str, Any]
) -> Sifted:
    """What is kept of all images: `look` says by class (n,) which are clean. No class loses all of its images."""
    kept = np.ones(len(training.data), dtype=bool)
    told: list[str] = []
    with training.stream.as_global("art"), silent():
        found = look(classes) if classes.members else []
    for (label, rows), clean in zip(classes.members, found, strict=True):
        if clean.any():
            kept[rows] = clean
        else:
            told.append(f"all images of class '{training.info.classes[label]}' were suspected, and are kept")
    names = training.info.classes
    counts = {names[c]: int((~kept[training.data.labels == c]).sum()) for c in range(len(names))}
    small = len(np.unique(training.data.labels)) - len(classes.members)
    if small:
        told.append(f"{small} classes have too few images to be looked at")
    return Sifted(kept, {**facts, "removed_by_class": counts, **({"warnings": told} if told else {})})


def activation_clustering(
    model: nn.Module,
    training: Training,
    analysis: str,
    share: float,
    cohesion: float,
    dims: int,
    reduce: str,
    layer: str | None,
) -> Sifted:
    """Chen et al. 2018: two clusters of each class's features, of which one is suspected.

    ART's analysis by size stops where no cluster is small, its silhouettes call the suspected cluster clean and leave
    the other undefined, and its distances compare coordinates of different projections. Here the first two are written
    again, and the third gets the features.
    """
    all_features = features_of(model, training, layer, "art.activation-clustering")
    width = min(dims, all_features.shape[1])

    def look(classes: Classes) -> list[Array]:
        from sklearn.metrics import silhouette_score

        hidden = load(_POISON + "activation_defence:ActivationDefence")(
            classes.classifier(), classes.features, classes.places
        )
        clusters, reduced = hidden.cluster_activations(nb_clusters=2, nb_dims=width, reduce=reduce)
        analyzer = load(_POISON + "clustering_analyzer:ClusteringAnalyzer")()
        if analysis == "smaller":
            return _clean(analyzer.analyze_by_size(clusters)[0])
        if analysis == "distance":
            return _clean(analyzer.analyze_by_distance(clusters, hidden.activations_by_class)[0])
        found = [np.bincount(c)[c] >= share * len(c) for c in clusters]
        if analysis == "relative-size":
            return found
        loose = [
            len(np.unique(c)) < 2 or silhouette_score(r, c) <= cohesion for c, r in zip(clusters, reduced, strict=True)
        ]
        return [one | spread for one, spread in zip(found, loose, strict=True)]

    classes = looked_at(all_features, training.data.labels, max(width, 3))
    return sifted(look, classes, training, {"analysis": analysis})


def _clean(assigned: Array) -> list[Array]:
    return [np.asarray(one, dtype=float) == 1 for one in assigned]


def spectral_signatures(
    model: nn.Module, training: Training, share: float, multiplier: float, layer: str | None
) -> Sifted:
    """Tran et al. 2018: the images of a class that lie furthest out along its features' first singular vector.

    ART takes the vector of centred features and measures along it from 0; here it is handed centred features.
    """
    features = features_of(model, training, layer, "art.spectral-signatures").astype(np.float64)

    def look(classes: Classes) -> list[Array]:
        for place in range(len(classes.members)):
            rows = classes.places == place
            classes.features[rows] -= classes.features[rows].mean(0)
        defence = load(_POISON + "spectral_signature_defense:SpectralSignatureDefense")(
            classes.classifier(), classes.features, classes.places, expected_pp_poison=share, eps_multiplier=multiplier
        )
        clean = np.array(defence.detect_poison()[1]) == 1
        return [clean[classes.places == place] for place in range(len(classes.members))]

    classes = looked_at(features, training.data.labels, 3)
    return sifted(look, classes, training, {"suspected_share_of_a_class": min(1.0, share * multiplier)})
