"""Defenses of ART: one row each, and what was left out with the reason. Imports no torch and no ART."""

from __future__ import annotations

from collections.abc import Mapping

from advplug.contracts import DefenseCaps, Gradient, Spec

_STAND_IN = DefenseCaps(("wrap",), Gradient.BPDA, stand_ins=1)
_THREE_STAND_INS = DefenseCaps(("wrap",), Gradient.BPDA, stand_ins=3)
_RANDOM = DefenseCaps(("wrap",), stochastic=True)
_RANDOM_STAND_IN = DefenseCaps(("wrap",), Gradient.BPDA, stochastic=True, stand_ins=1)
_SCORES = DefenseCaps(("wrap",), Gradient.BPDA, keeps_scores=False, stand_ins=1)
_RANDOM_SCORES = DefenseCaps(("wrap",), Gradient.BPDA, stochastic=True, keeps_scores=False, stand_ins=1)
_REJECTING = DefenseCaps(("wrap",), Gradient.BPDA, rejects=True, keeps_scores=False, stand_ins=1)

_SQUEEZING = "Xu et al. 2017, arXiv 1704.01155"
_STEALING = "Tramer et al. 2016, arXiv 1609.02943"

# Name, factory, capabilities, summary, paper.
_ROWS = (
    (
        "art.feature-squeezing",
        "feature_squeezing",
        _STAND_IN,
        "Rounds pixels to a few bits",
        f"{_SQUEEZING}, section III-A",
    ),
    (
        "art.gaussian-augmentation",
        "gaussian_augmentation",
        _RANDOM,
        "Adds fresh Gaussian noise to the pixels of every query",
        "Zantedeschi et al. 2017, arXiv 1707.06728",
    ),
    (
        "art.jpeg",
        "jpeg",
        _STAND_IN,
        "Compresses every image as JPEG",
        "Das et al. 2017, arXiv 1705.02900; Dziugaite et al. 2016, arXiv 1608.00853",
    ),
    (
        "art.spatial-smoothing",
        "spatial_smoothing",
        _THREE_STAND_INS,
        "Replaces every pixel by the median around it",
        f"{_SQUEEZING}, section III-B",
    ),
    (
        "art.total-var-min",
        "total_var_min",
        _RANDOM_STAND_IN,
        "Rebuilds images from some of their pixels with little total variation",
        "Guo et al. 2017, arXiv 1711.00117, section 4",
    ),
    (
        "art.class-labels",
        "class_labels",
        _SCORES,
        "Answers the label alone: probability 1 for it",
        _STEALING,
    ),
    (
        "art.gaussian-noise",
        "gaussian_noise",
        _RANDOM_SCORES,
        "Adds Gaussian noise to the probabilities that are answered",
        "Chandrasekaran et al. 2018, arXiv 1811.02054",
    ),
    (
        "art.high-confidence",
        "high_confidence",
        _REJECTING,
        "Withholds probabilities below a cutoff, and the answer where none reaches it",
        _STEALING,
    ),
    (
        "art.reverse-sigmoid",
        "reverse_sigmoid",
        _SCORES,
        "Distorts probabilities so that several inputs share an answer",
        "Lee et al. 2018, arXiv 1806.00054",
    ),
    (
        "art.rounded",
        "rounded",
        _SCORES,
        "Rounds the probabilities that are answered",
        _STEALING,
    ),
)

DEFENSES: list[Spec] = [
    Spec(name, f"advplug_art.defenses:{factory}", caps, summary, paper) for name, factory, caps, summary, paper in _ROWS
]

_LABELS = "mixes or softens labels while a model is trained; it leaves inputs and answers alone at test time"

LEFT_OUT: Mapping[str, str] = {
    "CutMix": _LABELS,
    "CutMixPyTorch": _LABELS,
    "CutMixTensorFlowV2": _LABELS,
    "Cutout": "blanks a random square to augment training images; ART leaves it out at test time",
    "CutoutPyTorch": "as Cutout",
    "CutoutTensorFlowV2": "as Cutout",
    "LabelSmoothing": _LABELS,
    "Mixup": _LABELS,
    "MixupPyTorch": _LABELS,
    "MixupTensorFlowV2": _LABELS,
    "Mp3Compression": "for audio",
    "Mp3CompressionPyTorch": "for audio",
    "PixelDefend": "needs a PixelCNN trained on the data set, and ART ships none",
    "Preprocessor": "the base class",
    "Resample": "for audio",
    "SpatialSmoothingPyTorch": "needs kornia and mirrors borders another way than SpatialSmoothing, "
    "whose exact gradient art.spatial-smoothing has",
    "SpatialSmoothingTensorFlowV2": "needs TensorFlow; art.spatial-smoothing is the same filter",
    "ThermometerEncoding": "gives the model more channels than the image has, so only a model built for it fits",
    "VideoCompression": "for video",
    "VideoCompressionPyTorch": "for video",
    "Postprocessor": "the base class",
}
"""Classes of `art.defences.preprocessor` and `art.defences.postprocessor` without a defense here, and why."""
