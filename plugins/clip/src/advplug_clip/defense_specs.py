"""Fine-tuning defenses of CLIP models: parameters and specs. Torch is imported only when they train."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from advplug.budgets import check_eps, customary
from advplug.contracts import DatasetInfo, Defense, DefenseCaps, Param, Spec, Tune, Tuned
from advplug.errors import UsageError
from advplug_clip import prompts

if TYPE_CHECKING:
    from torch import nn

    from advplug.train import Training
    from advplug_clip.finetune import Inner, Plan
    from advplug_clip.orthogonal import Oft

RATE, LOADED_RATE, ROTATION_RATE = 1e-3, 1e-5, 10
"""Peak rate for what was trained here; for weights that are only loaded; rotations take that many times as much."""
BLOCK = 16

Adapter: TypeAlias = Annotated[
    Literal["none", "oft"], Param("what is trained: the image tower's weights, or orthogonal rotations of them")
]
Block: TypeAlias = Annotated[int | None, Param("adapter=oft: inputs that are rotated together; none: 16", ge=2)]
Coft: TypeAlias = Annotated[
    float | None, Param("adapter=oft: bound on the rotations of a weight, a Frobenius norm; none: no bound", gt=0)
]
Epochs: TypeAlias = Annotated[int, Param("passes over the training images", ge=1)]
BatchSize: TypeAlias = Annotated[int, Param("images an update", ge=2)]
Rate: TypeAlias = Annotated[
    float | None,
    Param("peak rate; none: 1e-3, for weights that are only loaded 1e-5, and ten times that with the adapter", gt=0),
]
Decay: TypeAlias = Annotated[float, Param("weight decay; with the adapter, of the rotations", ge=0)]
WarmUp: TypeAlias = Annotated[float, Param("share of the updates over which the rate rises", ge=0, le=1)]
Eps: TypeAlias = Annotated[Fraction | None, Param("L-inf budget; none: the dataset's customary one", gt=0)]
Steps: TypeAlias = Annotated[int, Param("gradient steps of the inner attack", ge=1)]
Alpha: TypeAlias = Annotated[Fraction | None, Param("step in pixel units; none: half of eps", gt=0)]


@dataclass(frozen=True)
class Tuning:
    """The parameters that all of them have."""

    what: str
    epochs: int
    batch_size: int
    lr: float | None
    decay: float
    warm_up: float
    adapter: str
    block: int | None
    coft: float | None

    def plan(self, training: Training, stop: float | None = None) -> Plan:
        from advplug.build import TUNING
        from advplug_clip.finetune import Plan

        usual = LOADED_RATE if training.schedule == TUNING else RATE
        rate = self.lr or usual * (ROTATION_RATE if self.adapter == "oft" else 1)
        return Plan(self.epochs, self.batch_size, rate, self.decay, self.warm_up, stop)

    def oft(self) -> Oft | None:
        from advplug_clip.orthogonal import Oft

        return Oft(self.block or BLOCK, self.coft) if self.adapter == "oft" else None


def fare(
    eps: Eps = None,
    steps: Steps = 4,
    alpha: Alpha = None,
    epochs: Epochs = 3,
    batch_size: BatchSize = 64,
    lr: Rate = None,
    decay: Decay = 1e-4,
    warm_up: WarmUp = 0.07,
    adapter: Adapter = "none",
    block: Block = None,
    coft: Coft = None,
) -> Defense:
    """Features of attacked images are drawn to what the original tower gives the clean ones. Needs no captions."""
    tuning = Tuning("fare", epochs, batch_size, lr, decay, warm_up, adapter, block, coft)

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_clip import finetune

        scorer = finetune.clip_of("fare", model)
        finetune.check_leaks(training)
        inner, told = _inner("fare", training.info, eps, steps, alpha, Fraction(1, 2))
        made = finetune.fare(scorer.to(training.device), inner)
        return _with(finetune.fine_tune("fare", scorer, training, made, tuning.plan(training), tuning.oft()), told)

    return (Tune(apply, reads_columns=False),)


def oft(
    eps: Eps = None,
    steps: Steps = 4,
    alpha: Alpha = None,
    epochs: Epochs = 3,
    batch_size: BatchSize = 64,
    lr: Rate = None,
    decay: Decay = 1e-4,
    warm_up: WarmUp = 0.07,
    block: Annotated[int, Param("inputs that are rotated together", ge=2)] = BLOCK,
    coft: Annotated[
        float | None, Param("bound on the rotations of a weight, a Frobenius norm; none: no bound", gt=0)
    ] = None,
) -> Defense:
    """fare:adapter=oft."""
    return fare(eps, steps, alpha, epochs, batch_size, lr, decay, warm_up, "oft", block, coft)


def tecoa(
    eps: Eps = None,
    steps: Steps = 4,
    alpha: Alpha = None,
    epochs: Epochs = 3,
    batch_size: BatchSize = 64,
    lr: Rate = None,
    decay: Decay = 1e-4,
    warm_up: WarmUp = 0.07,
    templates: Annotated[
        str | None, Param("digits, simple, openai, or a sentence with {} for the class (none: digits or simple)")
    ] = None,
    adapter: Adapter = "none",
    block: Block = None,
    coft: Coft = None,
) -> Defense:
    """Adversarial training on class prompts. Needs labels."""
    tuning = Tuning("tecoa", epochs, batch_size, lr, decay, warm_up, adapter, block, coft)

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_clip import finetune

        scorer = finetune.clip_of("tecoa", model).to(training.device)
        inner, told = _inner("tecoa", training.info, eps, steps, alpha, Fraction(1, 2))
        made = finetune.tecoa(scorer, inner, training.info.classes, templates)
        finetune.check_leaks(training)
        return _with(finetune.fine_tune("tecoa", scorer, training, made, tuning.plan(training), tuning.oft()), told)

    return (Tune(apply, reads_columns=False),)


def mat(
    brightness: Annotated[float, Param("factors are drawn from 1 minus to 1 plus this", ge=0, le=1)] = 0.2,
    contrast: Annotated[float, Param("likewise", ge=0, le=1)] = 0.2,
    blur: Annotated[
        float | None, Param("largest spread of the blur in pixels; none: 2, or a 32nd of a smaller side", ge=0)
    ] = None,
    noise: Annotated[Fraction, Param("spread of normal noise, pixels in [0, 1]", ge=0)] = Fraction(15, 255),
    epochs: Epochs = 3,
    batch_size: BatchSize = 64,
    lr: Rate = None,
    decay: Decay = 0.1,
    warm_up: WarmUp = 0.07,
    adapter: Adapter = "none",
    block: Block = None,
    coft: Coft = None,
) -> Defense:
    """Contrastive fine-tuning on clean and on randomly augmented images, half and half. Needs captions."""
    tuning = Tuning("mat", epochs, batch_size, lr, decay, warm_up, adapter, block, coft)

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_clip import finetune
        from advplug_clip.finetune_losses import Augmentation

        scorer = finetune.clip_of("mat", model).to(training.device)
        texts = finetune.Texts(scorer, finetune.captions_of("mat", training.data))
        finetune.check_leaks(training)
        spread = min(2.0, min(training.info.size) / 32) if blur is None else blur
        made = finetune.mat(texts, Augmentation(brightness, contrast, spread, float(noise)))
        told = {"blur": spread}
        return _with(finetune.fine_tune("mat", scorer, training, made, tuning.plan(training), tuning.oft()), told)

    return (Tune(apply, reads_columns=False),)


def caption_advtrain(
    eps: Eps = None,
    steps: Annotated[int | None, Param("gradient steps of caption-pgd; none: 4, and 20 with offline=yes", ge=1)] = None,
    alpha: Annotated[
        Fraction | None, Param("step in pixel units; none: half of eps, with offline=yes a quarter", gt=0)
    ] = None,
    offline: Annotated[
        bool, Param("attack the original model once, before training; such images do not follow the model")
    ] = False,
    stop: Annotated[
        float | None, Param("end once the mean loss of an epoch's worth of updates is below; none: never", gt=0)
    ] = 0.1,
    epochs: Epochs = 3,
    batch_size: BatchSize = 64,
    lr: Rate = None,
    decay: Decay = 0.1,
    warm_up: WarmUp = 0.07,
    adapter: Adapter = "none",
    block: Block = None,
    coft: Coft = None,
) -> Defense:
    """Contrastive fine-tuning on clean images and on those of caption-pgd, half and half. Needs captions."""
    tuning = Tuning("caption-advtrain", epochs, batch_size, lr, decay, warm_up, adapter, block, coft)
    count, share = steps or (20 if offline else 4), Fraction(1, 4 if offline else 2)

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug_clip import finetune

        scorer = finetune.clip_of(tuning.what, model).to(training.device)
        texts = finetune.Texts(scorer, finetune.captions_of(tuning.what, training.data))
        finetune.check_leaks(training)
        inner, told = _inner(tuning.what, training.info, eps, count, alpha, share)
        clock = time.perf_counter()
        kept = finetune.made_once(texts, inner, training, training.stream, batch_size) if offline else None
        if offline:
            told["attack_seconds"] = round(time.perf_counter() - clock, 1)
        made = finetune.caption_advtrain(texts, inner, kept)
        plan = tuning.plan(training, stop)
        return _with(finetune.fine_tune(tuning.what, scorer, training, made, plan, tuning.oft()), told)

    return (Tune(apply, reads_columns=False),)


# --- shared ----------------------------------------------------------------------------------------


def _inner(
    what: str, info: DatasetInfo, eps: Fraction | None, steps: int, alpha: Fraction | None, share: Fraction
) -> tuple[Inner, dict[str, Any]]:
    """The inner attack and what to tell of it; steps are a `share` of eps unless given. Raises UsageError."""
    from advplug_clip.finetune import Inner

    if eps is not None:
        bound = check_eps(str(eps), eps, "linf")
    elif "linf" in info.budgets:
        bound = customary(info.budgets, frozenset({"linf"}), "linf").eps
    else:
        raise UsageError(f"{what}: this dataset has no customary budget in linf; write {what}:eps=8/255")
    length = alpha or bound * share
    return Inner(float(bound), steps, float(length)), {"eps": str(bound), "steps": steps, "alpha": str(length)}


def _with(tuned: Tuned, told: Mapping[str, Any]) -> Tuned:
    return Tuned(tuned.model, tuned.structure, {**told, **tuned.facts})


_CAPS = DefenseCaps(("tune",), modality="image-text", needs_data=True)


def _caps(params: Mapping[str, Any]) -> DefenseCaps:
    """The same for all parameters; a mistake in them is found here, before anything is trained. Raises UsageError."""
    given = [f"{name}=" for name in ("block", "coft") if params.get(name) is not None]
    if given and params.get("adapter") == "none":
        raise UsageError(f"{' and '.join(given)} belong to rotations; write adapter=oft too, or leave them out")
    prompts.check(params.get("templates"))
    return _CAPS


def _spec(name: str, summary: str, paper: str) -> Spec:
    return Spec(name, f"advplug_clip.defense_specs:{name.replace('-', '_')}", _CAPS, summary, paper, narrow=_caps)


_OFT = "Qiu et al. 2023, arXiv 2306.07280"
DEFENSES: list[Spec] = [
    _spec("mat", "Fine-tuning of CLIP on clean and randomly augmented images with their captions", ""),
    _spec(
        "caption-advtrain",
        "Fine-tuning of CLIP on clean images and on those of caption-pgd, with their captions",
        "Madry et al. 2017, arXiv 1706.06083; Radford et al. 2021, arXiv 2103.00020",
    ),
    _spec(
        "fare",
        "Fine-tuning of CLIP that keeps the features of attacked images near the original's (FARE)",
        "Schlarmann et al. 2024, arXiv 2402.12336",
    ),
    _spec(
        "tecoa",
        "Adversarial fine-tuning of CLIP on class prompts (TeCoA)",
        "Mao et al. 2023, arXiv 2212.07016",
    ),
    _spec("oft", "fare that only rotates the image tower's weights: fare:adapter=oft", _OFT),
]
