"""What is registered: parameters and specs. Torch is imported only when an attack is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Param, PoisonCaps, Reference, Spec, Stack
from advplug.errors import UsageError
from advplug_poisoning.settings import TAKES, TriggerSettings, trigger_settings
from advplug_poisoning.texts import check_captions

if TYPE_CHECKING:
    from advplug_poisoning.backdoor import Backdoor
    from advplug_poisoning.targeted import Targeted
    from advplug_poisoning.together import Together

BOTH = Stack((Reference("ba"), Reference("tdpa")))

Captions = Annotated[
    str | None,
    Param(
        "of poisons, for data with captions: sampled (the default: from training captions that name the class), "
        "templates, or a sentence with {}"
    ),
]


def ba(
    trigger: Annotated[
        Literal["patch", "checker", "random", "blended", "sig", "wanet"],
        Param("white patch, black and white one, one of random pixels; noise blended in; sine waves; warping"),
    ] = "patch",
    size: Annotated[
        int | None, Param("side of a patch in pixels (none: a 14th of the image's, at least 3)", ge=1, le=4096)
    ] = None,
    place: Annotated[
        str | None,
        Param(
            "of a patch: bottom-right (the default) or another corner, corners (all four), centre, random (drawn for "
            "each image) or X:Y, its upper left pixel"
        ),
    ] = None,
    margin: Annotated[int | None, Param("pixels between a patch and the image's edges (none: 1)", ge=0)] = None,
    opacity: Annotated[float | None, Param("of a patch (none: 1) or of blended noise (none: 0.2)", gt=0, le=1)] = None,
    fresh: Annotated[
        bool | None, Param("random, blended: draw the pattern anew for each image; a patch then varies about its mean")
    ] = None,
    amplitude: Annotated[
        float | None, Param("sig: height of the waves in pixel units (none: 40/255)", gt=0, le=1)
    ] = None,
    frequency: Annotated[float | None, Param("sig: waves in an image's width (none: 6)", gt=0)] = None,
    strength: Annotated[float | None, Param("wanet: how far pixels move (none: 0.5)", gt=0)] = None,
    grid: Annotated[int | None, Param("wanet: displacements a side, interpolated (none: 4)", ge=2, le=4096)] = None,
    target: Annotated[str | None, Param("class that triggered images are taken for: name or number (none: 0)")] = None,
    count: Annotated[int | None, Param("training images to poison (none: see rate)", ge=1)] = None,
    rate: Annotated[
        float | None,
        Param(
            "share of the training images to poison, with label=consistent of those of the target (none: 0.1)",
            gt=0,
            le=1,
        ),
    ] = None,
    mode: Annotated[
        Literal["all-to-one", "all-to-all"], Param("one target, or for each class the next one")
    ] = "all-to-one",
    label: Annotated[
        Literal["dirty", "consistent"],
        Param("dirty: images of other classes, renamed; consistent: images of the target, labels and captions kept"),
    ] = "dirty",
    captions: Captions = None,
) -> Backdoor:
    """Puts a trigger on some training images, so that the model takes every image with it for the target."""
    settings = _trigger(locals())
    from advplug_poisoning.backdoor import Backdoor

    return Backdoor(settings, target, count, rate, mode, label, captions)


def _trigger(bound: Mapping[str, Any]) -> TriggerSettings:
    """The trigger of `ba`. Raises UsageError for parameters that contradict each other or have no effect."""
    if bound["count"] is not None and bound["rate"] is not None:
        raise UsageError("ba: count and rate are both given; give one")
    if bound["mode"] == "all-to-all":
        if bound["target"] is not None:
            raise UsageError("ba: target has no effect on mode=all-to-all, which aims at the next class; leave it out")
        if bound["label"] == "consistent":
            raise UsageError("ba: mode=all-to-all needs other labels, label=consistent keeps them; choose one of both")
    if bound["label"] == "consistent" and bound["captions"] is not None:
        raise UsageError("ba: captions has no effect on label=consistent, which keeps them; leave it out")
    check_captions(bound["captions"], "ba")
    names = {name for takes in TAKES.values() for name in takes}
    return trigger_settings(bound["trigger"], {name: bound[name] for name in names})


def tdpa(
    targets: Annotated[int, Param("test images that are to be taken for another class", ge=1)] = 8,
    copies: Annotated[int | None, Param("poisons a target (none: 6 with captions, 3 with labels)", ge=1)] = None,
    shift: Annotated[
        int | None, Param("pixels that copies but the first are moved by at most (none: 0 with captions, else 1)", ge=0)
    ] = None,
    noise: Annotated[
        float | None,
        Param("standard deviation of noise on copies but the first (none: 0 with captions, else 0.02)", ge=0, le=1),
    ] = None,
    captions: Captions = None,
) -> Targeted:
    """Adds copies of a few test images to the training set, named as a class that is not theirs."""
    _check_targeted(locals())
    from advplug_poisoning.targeted import Targeted

    return Targeted(targets, copies, shift, noise, captions)


def _check_targeted(bound: Mapping[str, Any]) -> None:
    for name in ("shift", "noise"):
        if bound["copies"] == 1 and bound[name]:
            raise UsageError(f"tdpa: {name} has no effect on copies=1, which is exact; leave it out or raise copies")
    check_captions(bound["captions"], "tdpa")


def together(
    attacks: Annotated[Stack, Param("attacks on training data, one after the other, as (ba:count=80+tdpa)")] = BOTH,
) -> Together:
    """Several attacks on one training set, so that one model is trained for all of them."""
    from advplug_poisoning.together import Together, found

    return Together(tuple((entry.name, entry.make(params)) for entry, params, _ in found(attacks)))


def _together_caps(bound: Mapping[str, Any]) -> PoisonCaps:
    from advplug_poisoning.together import caps

    return caps(bound)


def _backdoor_caps(bound: Mapping[str, Any]) -> PoisonCaps:
    _trigger(bound)
    return replace(CAPS, clean_label=bound["label"] == "consistent")


def _targeted_caps(bound: Mapping[str, Any]) -> PoisonCaps:
    _check_targeted(bound)
    return CAPS


CAPS = PoisonCaps(frozenset({"image", "image-text"}))

ATTACKS: list[Spec] = [
    Spec(
        "ba",
        "advplug_poisoning.specs:ba",
        CAPS,
        "Backdoor: a trigger on training images that are named as the target",
        "Gu et al. 2017, arXiv 1708.06733; with captions Carlini and Terzis 2022, arXiv 2106.09667",
        narrow=_backdoor_caps,
    ),
    Spec(
        "tdpa",
        "advplug_poisoning.specs:tdpa",
        CAPS,
        "Targeted data poisoning: copies of a few test images, named as another class",
        "Carlini and Terzis 2022, arXiv 2106.09667",
        narrow=_targeted_caps,
    ),
    Spec(
        "together",
        "advplug_poisoning.specs:together",
        CAPS,
        "Several attacks on one training set: one model is trained, and each is counted",
        narrow=_together_caps,
    ),
]
