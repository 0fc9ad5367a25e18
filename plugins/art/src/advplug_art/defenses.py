"""Factories of ART's input and output defenses. Torch and ART are imported only when one is made.

Input defenses change pixels, output defenses probabilities. ART computes both in NumPy, where gradients end; what
an attacker differentiates instead is said at each factory. Defaults are ART's unless the docstring says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal

from advplug.contracts import Defense, Param

PIXELS = (0.0, 1.0)

Draws = Annotated[int, Param("samples that an attacker draws for a gradient", ge=1)]


# --- input -----------------------------------------------------------------------------------------


def feature_squeezing(
    bit_depth: Annotated[int, Param("bits that each channel of a pixel keeps", ge=1, le=16)] = 8,
) -> Defense:
    """Rounds pixels to 2^bit_depth levels; attacked through the rounded image with the identity's gradient."""
    from art.defences.preprocessor import FeatureSqueezing

    from advplug_art.defense_stages import input_stage

    squeeze = FeatureSqueezing(PIXELS, bit_depth)
    return (input_stage(lambda x: squeeze(x)[0]),)


def jpeg(
    quality: Annotated[int, Param("JPEG quality, from 1 (worst) to 100", ge=1, le=100)] = 50,
) -> Defense:
    """JPEG in RGB for 3 channels, channel by channel otherwise; attacked with the identity's gradient.

    As in ART, pixels are cut off to 8 bits, not rounded, before they are compressed.
    """
    from art.defences.preprocessor import JpegCompression

    from advplug_art.defense_stages import input_stage

    compress = JpegCompression(PIXELS, quality, channels_first=True)
    return (input_stage(lambda x: compress(x)[0]),)


def spatial_smoothing(
    window_size: Annotated[int, Param("side of the window in pixels", ge=1, le=64)] = 3,
) -> Defense:
    """The median of a window around each pixel, images mirrored at their borders."""
    from art.defences.preprocessor import SpatialSmoothing

    from advplug_art.defense_stages import smoothing_stage

    smooth = SpatialSmoothing(window_size, channels_first=True, clip_values=PIXELS)
    return (smoothing_stage(lambda x: smooth(x)[0], window_size),)


def total_var_min(
    prob: Annotated[float, Param("share of the pixels that are kept, drawn anew each time", gt=0, lt=1)] = 0.3,
    norm: Annotated[int, Param("norm of the differences between neighbours", ge=1, le=2)] = 2,
    lamb: Annotated[float, Param("weight of the total variation; ART: 0.5", ge=0)] = 0.1,
    solver: Annotated[Literal["L-BFGS-B", "CG"], Param("SciPy's optimiser")] = "L-BFGS-B",
    max_iter: Annotated[int, Param("iterations for each channel", ge=1)] = 10,
    draws: Draws = 4,
) -> Defense:
    """Optimises each channel of each image; attacked with the identity's gradient, averaged over draws.

    ART's weight of 0.5 smooths small images away: on handwritten digits it costs a linear model 15 points of clean
    accuracy, 0.1 less than one. Its derivative loses the sign of differences in odd norms above 1, and with Newton-CG
    it takes hundreds of times as long, so neither is offered.
    """
    import numpy as np
    from art.defences.preprocessor import TotalVarMin

    from advplug_art.defense_stages import Array, input_stage

    minimise = TotalVarMin(prob, norm, lamb, solver, max_iter, clip_values=PIXELS)

    def rebuilt(x: Array) -> Array:
        last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        made: Array = minimise(last)[0].transpose(0, 3, 1, 2)
        return made

    return (input_stage(rebuilt, stochastic=True, draws=draws),)


def gaussian_augmentation(
    sigma: Annotated[float, Param("standard deviation in pixel units; ART: 1", gt=0)] = 0.05,
    draws: Draws = 8,
) -> Defense:
    """Noise on every query, clipped to [0, 1]; its gradient is exact.

    ART's default of 1 is the width of the whole range of pixels and drowns every image; here it is 0.05.
    """
    import numpy as np
    from art.defences.preprocessor import GaussianAugmentation

    from advplug_art.defense_stages import Array, noise_stage

    add = GaussianAugmentation(sigma, augmentation=False, apply_fit=False, apply_predict=True)

    def noise(x: Array) -> Array:
        made: Array = add(np.zeros_like(x))[0]
        return made

    return (noise_stage(noise, draws),)


# --- output ----------------------------------------------------------------------------------------
#
# All of them are attacked through the logits inside: their own outputs have no gradient, or one that misleads.


def class_labels() -> Defense:
    """One-hot answers. ART marks the labels of a whole batch in every row, so images are handed over singly."""
    import numpy as np
    from art.defences.postprocessor import ClassLabels

    from advplug_art.defense_stages import Array, output_stage

    label = ClassLabels()

    def labelled(p: Array) -> Array:
        return np.concatenate([label(row[None]) for row in p])

    return (output_stage(labelled),)


def gaussian_noise(
    scale: Annotated[float, Param("standard deviation of the noise on probabilities", gt=0)] = 0.2,
) -> Defense:
    """Noise on every answer, then clipped at 0 and normalised."""
    from art.defences.postprocessor import GaussianNoise

    from advplug_art.defense_stages import output_stage

    return (output_stage(GaussianNoise(scale), stochastic=True),)


def high_confidence(
    cutoff: Annotated[float, Param("least probability that is answered", gt=0, le=1)] = 0.25,
) -> Defense:
    """Probabilities below the cutoff become 0; an image without any other is rejected."""
    from art.defences.postprocessor import HighConfidence

    from advplug_art.defense_stages import output_stage, reaches

    return (output_stage(HighConfidence(cutoff), accepts=reaches(cutoff)),)


def reverse_sigmoid(
    beta: Annotated[float, Param("size of the distortion", gt=0)] = 1.0,
    gamma: Annotated[float, Param("slope of the distortion", gt=0)] = 0.1,
) -> Defense:
    """Distorted probabilities, in double precision.

    The label stays for beta and gamma up to 1 unless all probabilities are tiny; the order of the others does not.
    """
    from art.defences.postprocessor import ReverseSigmoid

    from advplug_art.defense_stages import output_stage

    return (output_stage(ReverseSigmoid(beta, gamma)),)


def rounded(
    decimals: Annotated[int, Param("decimals that probabilities keep", ge=1, le=12)] = 3,
) -> Defense:
    """Rounded probabilities; where the best ones become equal, the first class is answered."""
    from art.defences.postprocessor import Rounded

    from advplug_art.defense_stages import output_stage

    return (output_stage(Rounded(decimals)),)
