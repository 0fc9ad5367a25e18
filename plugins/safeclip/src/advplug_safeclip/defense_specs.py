"""SafeCLIP, RoCLIP and CleanCLIP: parameters and specs. Torch is imported only when they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from advplug.contracts import Defense, DefenseCaps, Fit, Param, Spec, Tune, Tuned
from advplug_safeclip.settings import GENTLE, PRESETS, PUBLISHED, Views, check, preset_for

if TYPE_CHECKING:
    from torch import nn

    from advplug.train import Training

DrawnAs: TypeAlias = Annotated[
    Literal["gentle", "published"], Param("how views are drawn unless the parameters below say otherwise")
]
Epochs: TypeAlias = Annotated[int | None, Param("passes over the pairs; none: those of the model's own training", ge=1)]
BatchSize: TypeAlias = Annotated[int | None, Param("pairs an update; none: the preset's, or the model's", ge=2)]
Rate: TypeAlias = Annotated[float | None, Param("highest learning rate; none: the preset's, or the model's", gt=0)]
Crop: TypeAlias = Annotated[float | None, Param("least share of an image's area that a view shows", gt=0, le=1)]
Flip: TypeAlias = Annotated[bool | None, Param("mirror half of the views")]
Jitter: TypeAlias = Annotated[float | None, Param("share of the views whose colours change", ge=0, le=1)]
Colour: TypeAlias = Annotated[
    float | None, Param("brightness, contrast and saturation by factors of 1 minus to 1 plus this", ge=0, le=1)
]
Hue: TypeAlias = Annotated[float | None, Param("largest turn of hues, as a share of a full one", ge=0, le=0.5)]
Grey: TypeAlias = Annotated[float | None, Param("share of the views without colour", ge=0, le=1)]
Blur: TypeAlias = Annotated[float | None, Param("largest spread of a view's blur in pixels", ge=0)]
Words: TypeAlias = Annotated[
    float | None,
    Param("share of a caption's words that a view changes: synonyms, insertions, swaps, omissions", ge=0, le=1),
]


def safeclip(
    preset: Annotated[
        Literal["published", "small"] | None,
        Param("published: as SafeCLIP's code, for large data; small: for a few thousand pairs; none: by their number"),
    ] = None,
    unimodal: Annotated[int | None, Param("first epochs, each modality by itself", ge=0)] = None,
    multimodal: Annotated[int | None, Param("slow contrastive epochs after them, on all pairs", ge=1)] = None,
    epochs: Annotated[
        int | None, Param("filtered epochs; none: the preset's, or a third more than the model's own", ge=1)
    ] = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    slow_lr: Annotated[
        float | None, Param("rate of the multimodal epochs; none: the preset's, or the model's", gt=0)
    ] = None,
    decay: Annotated[float | None, Param("weight decay", ge=0)] = None,
    beta2: Annotated[float | None, Param("AdamW's second beta; none: the preset's", gt=0, lt=1)] = None,
    rise: Annotated[int | None, Param("updates over which a rate rises, a tenth of a phase's at most", ge=0)] = None,
    mixture: Annotated[
        Literal["free", "anchored"] | None,
        Param("free: of cosines, as published; anchored: of how they differ from those of pairs that are none"),
    ] = None,
    threshold: Annotated[float | None, Param("least posterior of a safe pair", gt=0, lt=1)] = None,
    floor: Annotated[
        float | None, Param("share of the pairs that is safe in the first filtered epoch, at least", gt=0, le=1)
    ] = None,
    growth: Annotated[float | None, Param("by how much that share grows in each further one", ge=0, le=1)] = None,
    cap: Annotated[float | None, Param("largest share of the pairs that is ever safe", gt=0, le=1)] = None,
    refit: Annotated[bool | None, Param("let the mixture choose in each filtered epoch, not in the first only")] = None,
    looks: Annotated[
        int | None, Param("views of a pair that its score is the mean of; 0: of the pair as it is", ge=0)
    ] = None,
    views: Annotated[int | None, Param("views of each pair in a contrastive update", ge=1, le=2)] = None,
    bank: Annotated[
        int | None, Param("features that neighbours are found among in unimodal epochs; 0: each its own", ge=0)
    ] = None,
    crop: Crop = None,
    flip: Flip = None,
    jitter: Jitter = None,
    colour: Colour = None,
    hue: Hue = None,
    grey: Grey = None,
    blur: Blur = None,
    words: Words = None,
) -> Defense:
    """Contrastive training on pairs that look safe, of each modality by itself on the others. Needs captions."""
    given = {name: value for name, value in locals().items() if name != "preset" and value is not None}
    check(preset, given)

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_clip import finetune
        from advplug_safeclip import safe

        scorer = finetune.clip_of("safeclip", model)
        name, why = preset_for(preset, len(training.data))
        return safe.fit(scorer, training, PRESETS[name].changed(given), why)

    return (Fit(apply),)


def roclip(
    pool: Annotated[
        float, Param("captions that images are matched with, as a share of the pairs; a batch at least", gt=0, le=1)
    ] = 0.02,
    every: Annotated[
        int, Param("match images with the pool in each such epoch, with their own captions in the others", ge=1)
    ] = 3,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    drawn: DrawnAs = "gentle",
    crop: Crop = None,
    flip: Flip = None,
    jitter: Jitter = None,
    colour: Colour = None,
    hue: Hue = None,
    grey: Grey = None,
    blur: Blur = None,
    words: Words = None,
) -> Defense:
    """Contrastive training that now and then matches images with the nearest of other captions. Needs captions."""
    how = _views(drawn, locals())

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_clip import finetune
        from advplug_safeclip import roclip

        matching = roclip.Matching(pool, every, epochs, batch_size, lr, how)
        return roclip.fit(finetune.clip_of("roclip", model), training, matching)

    return (Fit(apply),)


def cleanclip(
    share: Annotated[float, Param("of the clean training pairs, those that the model's owner has", gt=0, le=1)] = 0.1,
    weight: Annotated[float, Param("of the losses within images and within captions", ge=0)] = 1.0,
    epochs: Annotated[int, Param("passes over the clean pairs", ge=1)] = 10,
    batch_size: Annotated[int, Param("pairs an update", ge=2)] = 64,
    lr: Annotated[
        float | None, Param("highest learning rate; none: that of the model's training, for loaded weights 1e-5", gt=0)
    ] = None,
    decay: Annotated[float, Param("weight decay", ge=0)] = 0.1,
    drawn: DrawnAs = "gentle",
    crop: Crop = None,
    flip: Flip = None,
    jitter: Jitter = None,
    colour: Colour = None,
    hue: Hue = None,
    grey: Grey = None,
    blur: Blur = None,
    words: Words = None,
) -> Defense:
    """Fine-tunes both towers on clean pairs, across images and captions and within each. Needs captions."""
    how = _views(drawn, locals())

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug.build import TUNING
        from advplug_clip import finetune
        from advplug_safeclip import cleanclip

        usual = LOADED_RATE if training.schedule == TUNING else training.schedule.lr
        cleaning = cleanclip.Cleaning(share, weight, epochs, batch_size, lr or usual, decay, how)
        return cleanclip.fit(finetune.clip_of("cleanclip", model), training, cleaning)

    return (Tune(apply, reads_columns=False),)


LOADED_RATE = 1e-5
"""CleanCLIP's published rate, for weights that were trained elsewhere."""


def _views(drawn: str, given: Mapping[str, Any]) -> Views:
    return {"gentle": GENTLE, "published": PUBLISHED}[drawn].changed(given)


def _safeclip_caps(params: Mapping[str, Any]) -> DefenseCaps:
    """The same for all parameters; a mistake in them is found here, before anything is trained. Raises UsageError."""
    check(params["preset"], params)
    return _TRAIN


_TRAIN = DefenseCaps(("objective",), modality="image-text", needs_data=True, loaded="cleanclip")
_TUNE = DefenseCaps(("tune",), modality="image-text", needs_data=True)
_HERE = "advplug_safeclip.defense_specs:"
DEFENSES: list[Spec] = [
    Spec(
        "safeclip",
        _HERE + "safeclip",
        _TRAIN,
        "Contrastive training on pairs that a mixture takes for safe, of each modality by itself on the others",
        "Yang et al. 2024, arXiv 2310.05862",
        narrow=_safeclip_caps,
    ),
    Spec(
        "roclip",
        _HERE + "roclip",
        _TRAIN,
        "Contrastive training that in some epochs matches images with the nearest of a pool of captions",
        "Yang et al. 2023, arXiv 2303.06854",
    ),
    Spec(
        "cleanclip",
        _HERE + "cleanclip",
        _TUNE,
        "Fine-tuning of a poisoned CLIP on clean pairs, across images and captions and within each",
        "Bansal et al. 2023, arXiv 2303.03323",
    ),
]
