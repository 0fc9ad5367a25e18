"""The figures every cell is reported with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from advplug.contracts import MetricCaps, Spec
from advplug.estimate import Estimate, mean, median, rate
from advplug.evidence import Array, Evidence, worst_case

Values = Mapping[str, Estimate | None]


def share(bits: Array) -> Estimate | None:
    """The mean of (n, d) bits with a Wilson interval over images; the spread is over the d draws."""
    per_image = bits.mean(axis=1)
    spread = float(bits.mean(axis=0).std(ddof=1)) if bits.shape[1] > 1 and len(bits) else None
    return rate(float(per_image.sum()), len(per_image), spread)


def accuracy() -> Callable[[Evidence], Values]:
    """Clean accuracy, and robust accuracy by where the attack was crafted."""

    def measure(evidence: Evidence) -> Values:
        def robust(success: Array | None) -> Estimate | None:
            return None if success is None or evidence.minimised else share(evidence.robust(success))

        worst = None if evidence.minimised else share(worst_case(evidence.robust_by_origin()))
        return {
            "clean_accuracy": share(evidence.clean),
            "robust_accuracy": worst,
            "static_robust_accuracy": robust(evidence.static),
            "bare_robust_accuracy": robust(evidence.bare),
            "adaptive_robust_accuracy": robust(evidence.adaptive),
            "robust_accuracy_8bit": robust(evidence.rounded),
        }

    return measure


def attack_success() -> Callable[[Evidence], Values]:
    """Attack success rate over the images that were right and not yet the target."""

    def measure(evidence: Evidence) -> Values:
        if evidence.minimised:
            return {"attack_success_rate": None}
        broken = ~worst_case(evidence.robust_by_origin())
        right = evidence.attacked & (evidence.clean.mean(axis=1) >= 0.5)
        return {"attack_success_rate": share(broken[right])}

    return measure


def rejection() -> Callable[[Evidence], Values]:
    """Share of the images without attack that the victim does not answer: a detector's false positives."""

    def measure(evidence: Evidence) -> Values:
        return {"clean_rejection_rate": None if evidence.rejected is None else share(evidence.rejected)}

    return measure


def distance() -> Callable[[Evidence], Values]:
    """Median size of the successful perturbations, in L2 and L-inf (pixel units)."""

    def measure(evidence: Evidence) -> Values:
        broken = evidence.attacked & (evidence.adaptive.mean(axis=1) >= 0.5)
        return {
            f"{norm}_median": None if sizes is None else median(np.asarray(sizes[broken]))
            for norm, sizes in (("l2", evidence.l2), ("linf", evidence.linf))
        }

    return measure


def minimum_norm() -> Callable[[Evidence], Values]:
    """Median size of the smallest successful change over all images; nothing where half of them withstand.

    Under a targeted goal over the images that were attacked.
    """

    def measure(evidence: Evidence) -> Values:
        if evidence.found is None:
            return {"minimum_norm_median": None}
        return {"minimum_norm_median": finite(median(evidence.found[~np.isnan(evidence.found)]))}

    def finite(middle: Estimate | None) -> Estimate | None:
        if middle is None or not np.isfinite(middle.value):
            return None
        high = middle.high if middle.high is not None and np.isfinite(middle.high) else None
        return Estimate(middle.value, middle.low, high, middle.n)

    return measure


def similarity() -> Callable[[Evidence], Values]:
    """Mean cosine of an image and its own texts, without attack and by where the attack was crafted.

    Of an attack that lowers it; `adversarial_similarity` is the lowest of each image, `similarity_drop` the share of
    the clean similarity that it takes away.
    """

    def measure(evidence: Evidence) -> Values:
        clean = evidence.similarity(evidence.cosine)
        found: dict[str, Estimate | None] = dict.fromkeys(_SIMILARITY)
        if clean is None:
            return found
        found["clean_similarity"] = mean(clean)
        if evidence.minimised:
            lowest = np.min(evidence.similarity_by_origin(), axis=0)
            found["adversarial_similarity"] = mean(lowest)
            for name in ("static", "bare", "adaptive"):
                values = evidence.similarity(getattr(evidence, f"cosine_{name}"))
                found[f"{name}_similarity"] = None if values is None else mean(values)
            rounded = evidence.similarity(evidence.cosine_rounded)
            found["similarity_8bit"] = None if rounded is None else mean(rounded)
            if clean.mean() > 0:
                found["similarity_drop"] = Estimate(1 - float(lowest.mean() / clean.mean()), None, None, evidence.n)
        return found

    return measure


_SIMILARITY = (
    "clean_similarity", "adversarial_similarity", "static_similarity", "bare_similarity", "adaptive_similarity",
    "similarity_8bit", "similarity_drop",
)  # fmt: skip


def queries() -> Callable[[Evidence], Values]:
    """Median number of questions that a score- or decision-based attack asked for an attacked image."""

    def measure(evidence: Evidence) -> Values:
        asked = evidence.queries
        return {"queries_median": None if asked is None else median(np.asarray(asked[evidence.attacked]))}

    return measure


METRICS = [
    Spec(
        "accuracy",
        "advplug.builtin.metrics:accuracy",
        MetricCaps(
            (
                "clean_accuracy",
                "robust_accuracy",
                "static_robust_accuracy",
                "bare_robust_accuracy",
                "adaptive_robust_accuracy",
                "robust_accuracy_8bit",
            )
        ),
        "clean and robust accuracy: worst case, static, bare, adaptive, after 8-bit rounding",
    ),
    Spec(
        "attack-success",
        "advplug.builtin.metrics:attack_success",
        MetricCaps(("attack_success_rate",)),
        "share of the correctly classified images that the attack breaks",
    ),
    Spec(
        "rejection",
        "advplug.builtin.metrics:rejection",
        MetricCaps(("clean_rejection_rate",)),
        "share of the images without attack that a detector rejects: its false positives",
    ),
    Spec(
        "distance",
        "advplug.builtin.metrics:distance",
        MetricCaps(("l2_median", "linf_median")),
        "median L2 and L-inf size of the successful perturbations",
    ),
    Spec(
        "minimum-norm",
        "advplug.builtin.metrics:minimum_norm",
        MetricCaps(("minimum_norm_median",)),
        "median smallest successful change, in the threat's norm, of attacks that seek it",
    ),
    Spec(
        "similarity",
        "advplug.builtin.metrics:similarity",
        MetricCaps(_SIMILARITY),
        "mean cosine of images and their own texts: clean, worst case, static, bare, adaptive, after 8-bit rounding",
    ),
    Spec(
        "queries",
        "advplug.builtin.metrics:queries",
        MetricCaps(("queries_median",)),
        "median number of questions an attacked image cost, of attacks that count them",
    ),
]
