"""ART's attacks on training data: parameters and specs. Torch and ART are imported only when an attack is made.

They change images of one class a little and leave their labels alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Param, PoisonCaps, Spec, Stack, VictimRef
from advplug.errors import UsageError
from advplug.parse import parse_victim

if TYPE_CHECKING:
    from advplug_art.poisons import OnTargets, OnTrigger, Patch, Recipe

Surrogate = Annotated[
    VictimRef, Param("model on clean data that poisons are made with, without its wraps; model: the attacked one")
]
Number = Annotated[int, Param("test images that are to be taken for another class", ge=1)]
Wanted = Annotated[str | None, Param("class that they are to be taken for; none: one that is drawn for each")]
TargetShare = Annotated[
    float, Param("share of the wanted class's images that is poisoned, for each target", gt=0, le=1)
]
ClassShare = Annotated[float, Param("share of the target class's images that is poisoned", gt=0, le=1)]
Eps = Annotated[Fraction, Param("largest change of a pixel", gt=0, le=1)]
Steps = Annotated[int, Param("gradient steps", ge=1)]
Restarts = Annotated[int, Param("choices of images that are tried; the best counts", ge=1)]
Layer = Annotated[str | None, Param("layer whose output is compared; none: what enters the last layer")]
Target = Annotated[str, Param("class that images with the trigger are to be taken for: a number or a name")]
Source = Annotated[str | None, Param("class whose images are to be taken for it; none: one that is drawn")]
Pattern = Annotated[Literal["white", "checkerboard", "noise"], Param("the patch, in the lower right corner")]
Size = Annotated[int, Param("side of the patch in pixels", ge=1)]

OWN = parse_victim("model")


# --- some test images ------------------------------------------------------------------------------


def feature_collision(
    surrogate: Surrogate = OWN,
    targets: Number = 5,
    wanted: Wanted = None,
    share: TargetShare = 0.05,
    steps: Steps = 120,
    lr: Annotated[float, Param("step length, before it is decayed (ART: 127500)", gt=0)] = 0.03,
    similarity: Annotated[float, Param("weight of the distance to the image itself (ART: 256)", gt=0)] = 16.0,
    watermark: Annotated[float, Param("share of the target that is added to each poison", ge=0, lt=1)] = 0.0,
    layer: Layer = None,
) -> OnTargets:
    """Poisons whose features are the target's, and whose pixels stay near their own class."""
    from advplug_art import poison_crafts as crafts
    from advplug_art.poisons import OnTargets, Recipe

    craft = functools.partial(crafts.feature_collision, steps=steps, lr=lr, similarity=similarity, watermark=watermark)
    recipe = Recipe(
        "art.feature-collision", _victim(surrogate), share, craft, "feature_distance", crafts.nearest_distance,
        layers=(layer,) if layer else (),
    )  # fmt: skip
    return OnTargets(recipe, targets, wanted)


def bullseye_polytope(
    surrogate: Surrogate = OWN,
    targets: Number = 5,
    wanted: Wanted = None,
    share: TargetShare = 0.1,
    eps: Eps = Fraction(1, 10),
    steps: Annotated[int, Param("gradient steps (ART: 4000)", ge=1)] = 400,
    lr: Annotated[float, Param("Adam's step in pixel units", gt=0)] = 0.04,
    layers: Annotated[
        Stack | None, Param("layers whose outputs are compared, as (features.1+pool); none: what enters the last layer")
    ] = None,
) -> OnTargets:
    """Poisons around the target: the mean of their features is its own."""
    from advplug_art import poison_crafts as crafts
    from advplug_art.poisons import OnTargets, Recipe

    who, victim = "art.bullseye-polytope", _victim(surrogate)
    craft = functools.partial(crafts.bullseye_polytope, eps=float(eps), steps=steps, lr=lr)
    recipe = Recipe(
        who, victim, share, craft, "centre_distance", crafts.centre_distance, float(eps), _names(layers, who)
    )
    return OnTargets(recipe, targets, wanted)


def gradient_matching(
    surrogate: Surrogate = OWN,
    targets: Number = 5,
    wanted: Wanted = None,
    share: TargetShare = 0.2,
    eps: Eps = Fraction(1, 10),
    steps: Steps = 250,
    restarts: Restarts = 1,
) -> OnTargets:
    """Poisons that train the model as the target under the wrong label would."""
    from advplug_art import poison_crafts as crafts
    from advplug_art.poisons import OnTargets, Recipe

    craft = functools.partial(crafts.gradient_matching, eps=float(eps), steps=steps, restarts=restarts)
    recipe = Recipe(
        "art.gradient-matching", _victim(surrogate), share, craft, "gradient_cosine", crafts.gradient_cosine, float(eps)
    )
    return OnTargets(recipe, targets, wanted)


# --- images with a trigger -------------------------------------------------------------------------


def hidden_trigger(
    surrogate: Surrogate = OWN,
    target: Target = "0",
    source: Source = None,
    share: ClassShare = 0.5,
    eps: Eps = Fraction(1, 10),
    steps: Annotated[int, Param("gradient steps (ART: 5000)", ge=1)] = 200,
    lr: Annotated[float, Param("first step of the pixel that moves most, as a share of eps", gt=0, le=1)] = 0.2,
    pattern: Pattern = "white",
    size: Size = 4,
    layer: Layer = None,
) -> OnTrigger:
    """Poisons whose features are those of images with the trigger, which no poison shows."""
    from advplug_art import poison_crafts as crafts
    from advplug_art.poisons import OnTrigger, Recipe

    who, victim = "art.hidden-trigger", _victim(surrogate)

    def recipe(mark: Patch) -> Recipe:
        craft = functools.partial(crafts.hidden_trigger, eps=float(eps), steps=steps, lr=lr, mark=mark)
        return Recipe(
            who, victim, share, craft, "feature_distance", crafts.nearest_distance, float(eps),
            (layer,) if layer else (),
        )  # fmt: skip

    return OnTrigger(recipe, who, pattern, size, target, source or "")


def clean_label_backdoor(
    surrogate: Surrogate = OWN,
    target: Target = "0",
    share: ClassShare = 0.33,
    eps: Eps = Fraction(3, 10),
    steps: Annotated[int, Param("steps of PGD", ge=1)] = 100,
    step: Annotated[float, Param("its step, as a share of eps", gt=0, le=1)] = 1 / 3,
    restarts: Annotated[int, Param("random starts; 0: none, it begins at the image", ge=0)] = 0,
    pattern: Pattern = "white",
    size: Size = 4,
) -> OnTrigger:
    """Images of the target class that PGD made hard to recognise, with the trigger: the model learns that instead."""
    from advplug_art import poison_crafts as crafts
    from advplug_art.poisons import OnTrigger, Recipe

    who, victim = "art.clean-label-backdoor", _victim(surrogate)

    def recipe(mark: Patch) -> Recipe:
        craft = functools.partial(
            crafts.clean_label_backdoor, eps=float(eps), step=step, steps=steps, restarts=restarts, mark=mark
        )
        return Recipe(
            who, victim, share, craft, "label_probability", crafts.label_probability, float(eps), finish=mark.put
        )

    return OnTrigger(recipe, who, pattern, size, target, None)


def sleeper_agent(
    surrogate: Surrogate = OWN,
    target: Target = "0",
    source: Source = None,
    share: ClassShare = 0.5,
    eps: Eps = Fraction(1, 10),
    steps: Steps = 250,
    restarts: Restarts = 1,
    selection: Annotated[
        Literal["max-norm", "random"], Param("images that are poisoned: those of the largest gradients, or drawn ones")
    ] = "max-norm",
    pattern: Pattern = "white",
    size: Size = 4,
) -> OnTrigger:
    """Poisons that train the model as images with the trigger under the target's label would."""
    from advplug_art import poison_crafts as crafts
    from advplug_art.poisons import OnTrigger, Recipe

    who, victim = "art.sleeper-agent", _victim(surrogate)

    def recipe(mark: Patch) -> Recipe:
        craft = functools.partial(
            crafts.sleeper_agent, eps=float(eps), steps=steps, restarts=restarts, selection=selection, mark=mark
        )
        return Recipe(who, victim, share, craft, "gradient_cosine", crafts.gradient_cosine, float(eps))

    return OnTrigger(recipe, who, pattern, size, target, source or "")


def _victim(surrogate: Any) -> Any:
    """What the engine put in the place of the reference."""
    return surrogate


def _names(layers: Stack | None, who: str) -> tuple[str, ...]:
    for part in layers or ():
        if part.params:
            raise UsageError(f"{who}: '{part}' is no layer name; write layers={part.name}")
    return tuple(part.name for part in layers or ())


_CAPS = PoisonCaps(clean_label=True)


def _spec(factory: Callable[..., Any], summary: str, paper: str) -> Spec:
    name = factory.__name__
    return Spec(f"art.{name.replace('_', '-')}", f"advplug_art.poison_specs:{name}", _CAPS, summary, paper)


POISONS: list[Spec] = [
    _spec(
        feature_collision,
        "Poison frogs: images of another class that have the target's features",
        "Shafahi et al. 2018, arXiv 1804.00792",
    ),
    _spec(
        bullseye_polytope,
        "Images of another class whose mean features are the target's",
        "Aghakhani et al. 2020, arXiv 2005.00191",
    ),
    _spec(
        gradient_matching,
        "Witches' brew: images whose gradients are those of the target under a wrong label",
        "Geiping et al. 2020, arXiv 2009.02276",
    ),
    _spec(
        hidden_trigger,
        "Images with the features of images with a trigger, which they do not show",
        "Saha et al. 2019, arXiv 1910.00033",
    ),
    _spec(
        clean_label_backdoor,
        "A trigger on images of the target class that are made hard to recognise",
        "Turner et al. 2019, arXiv 1912.02771",
    ),
    _spec(
        sleeper_agent,
        "Images whose gradients are those of images with a trigger under a wrong label; the trigger stays hidden",
        "Souri et al. 2021, arXiv 2106.08970",
    ),
]
