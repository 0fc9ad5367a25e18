"""Retrieval both ways, with and without attack on the images. Pure numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from advplug.contracts import MetricCaps, Spec
from advplug.estimate import Estimate, rate
from advplug.evidence import Array, Evidence

CUTS = (1, 5, 10)


def text_ranks(cosine: Array, right: Array) -> Array:
    """(n,): how many wrong texts are as near to each image as its nearest right one; both arguments are (n, C).

    A tie is no hit, nor is what is no number: a tower that answers every image alike has found nothing.
    """
    best = np.where(right, cosine, -np.inf).max(axis=1)
    return np.asarray((~(cosine < best[:, None]) & ~right).sum(axis=1))


def image_ranks(own: Array, others: Array, right: Array) -> Array:
    """(C,): how many wrong images are as near to each text as its nearest right one.

    Cosines (n, C) of the right images are taken from `own`, those of the wrong ones from `others`.
    """
    best = np.where(right, own, -np.inf).max(axis=0)
    return np.asarray((~(others < best[None]) & ~right).sum(axis=0))


def recalls(ranks: Array) -> list[Estimate | None]:
    """The share of the queries whose rank lies below 1, 5 and 10."""
    return [rate(float((ranks < k).sum()), len(ranks)) for k in CUTS]


def retrieval() -> Callable[[Evidence], Mapping[str, Estimate | None]]:
    """Recall at 1, 5 and 10 over the evaluated images and all of their captions.

    Text retrieval asks with images. Image retrieval asks with texts, in a gallery of attacked images or in one where
    only the images asked for are attacked. Of several places where an attack was crafted each image takes what is
    furthest from its own captions.
    """

    def measure(evidence: Evidence) -> Mapping[str, Estimate | None]:
        if evidence.right is None or evidence.cosine is None:
            return dict.fromkeys(VALUES)
        clean, right = evidence.cosine, evidence.right.astype(bool)
        attacked = furthest(evidence)
        measured = (
            text_ranks(clean, right),
            text_ranks(attacked, right),
            image_ranks(clean, clean, right),
            image_ranks(attacked, attacked, right),
            image_ranks(attacked, clean, right),
        )
        return dict(zip(VALUES, [value for ranks in measured for value in recalls(ranks)], strict=True))

    return measure


def furthest(evidence: Evidence) -> Array:
    """(n, C): each image's cosines where it was crafted to the lowest similarity with its own texts."""
    made = [c for c in (evidence.cosine_adaptive, evidence.cosine_static, evidence.cosine_bare) if c is not None]
    similarity = np.stack([np.asarray(evidence.similarity(c)) for c in made])
    return np.asarray(np.stack(made)[similarity.argmin(axis=0), np.arange(evidence.n)])


KINDS = (
    "text_recall",
    "text_recall_attacked",
    "image_recall",
    "image_recall_attacked_gallery",
    "image_recall_attacked_own",
)
VALUES = tuple(f"{kind}_at_{k}" for kind in KINDS for k in CUTS)

METRICS: list[Spec] = [
    Spec(
        "retrieval",
        "advplug_clip.retrieval:retrieval",
        MetricCaps(
            VALUES,
            shown=(
                ("text_recall_at_1", "text R@1 %"),
                ("text_recall_attacked_at_1", "text R@1 under attack %"),
                ("image_recall_at_1", "image R@1 %"),
                ("image_recall_attacked_gallery_at_1", "image R@1, gallery attacked %"),
            ),
        ),
        "recall at 1, 5 and 10 of texts by images and of images by texts, clean and attacked",
    )
]
