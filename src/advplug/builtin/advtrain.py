"""Adversarial training and gradient regularisation: parameters and specs. Torch is imported only when they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from advplug.budgets import check_eps, customary
from advplug.contracts import (
    Access,
    AttackCaps,
    DatasetInfo,
    Defense,
    DefenseCaps,
    EvasionAttack,
    Fit,
    Norm,
    Objective,
    Param,
    Reference,
    Schedule,
    Spec,
    Stack,
    Strength,
    Tune,
    Tuned,
)
from advplug.errors import UsageError
from advplug.perturbations import LP

if TYPE_CHECKING:
    from torch import Tensor, nn

    from advplug.defenses.train_losses import TrainingLoss
    from advplug.registry import Entry
    from advplug.rng import Stream
    from advplug.train import Training

Eps: TypeAlias = Annotated[Fraction | None, Param("budget trained for; none: the dataset's customary one", gt=0)]
NormName: TypeAlias = Annotated[Literal["linf", "l2", "l1"], Param("norm of the budget")]
Rate: TypeAlias = Annotated[float | None, Param("peak rate; none: that of the training", gt=0)]
Epochs: TypeAlias = Annotated[int, Param("passes over the training images", ge=1)]

INNER = Stack((Reference("pgd", (("steps", "7"),)),))
"""Madry et al. 2017 train on CIFAR-10 with 7 steps."""


# --- training from scratch -------------------------------------------------------------------------


@dataclass(frozen=True)
class InnerAttack:
    """An inner attack with checked parameters, and the norm it is run in."""

    label: str
    caps: AttackCaps
    entry: Entry
    params: Mapping[str, Any]
    norm: Norm

    @property
    def one_step(self) -> bool:
        return self.caps.strength is Strength.ONE_STEP or self.params.get("steps") == 1

    def kernel(self) -> EvasionAttack:
        """The attack, which goes on after success, too, where it has no parameter that says whether."""
        from advplug.attacks.engine import GradientAttack

        made: EvasionAttack = self.entry.make(self.params)
        return made.transferable() if isinstance(made, GradientAttack) and "keep_going" not in self.params else made


def advtrain(
    attack: Annotated[Stack, Param("how examples are made: a gradient attack, (deepfool), (fgsm), ...")] = INNER,
    steps: Annotated[int | None, Param("steps of the attack; none: as attack= says", ge=1)] = None,
    eps: Annotated[
        Fraction | None,
        Param("budget; none: the dataset's customary one, or no bound for attacks for the smallest change", gt=0),
    ] = None,
    norm: Annotated[
        Literal["linf", "l2", "l1"] | None, Param("none: linf, or l2 for attacks for the smallest change")
    ] = None,
    share: Annotated[float, Param("share of a batch's images that are replaced by examples", gt=0, le=1)] = 1.0,
) -> Defense:
    """Trains on examples that the attack makes anew for each batch, against the model as it is then.

    Raises UsageError for an attack or norm that does not serve, `Fit.apply` for such a budget.
    """
    inner = inner_attack(attack, steps, norm)

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug.defenses import train_facts, train_losses
        from advplug.defenses.adversarial import Inner

        smallest = inner.caps.minimum_norm
        bound = None if smallest and eps is None else _eps("advtrain", eps, inner.norm, training.info)
        examples = Inner(inner.kernel(), inner.label, inner.caps, inner.norm, bound, len(training.info.classes))
        facts = {"attack": inner.label, "norm": inner.norm, "eps": str(bound or "unbounded")}
        if not (smallest or inner.one_step):
            return _fitted(model, training, train_losses.mixed(examples, share), facts)
        rest, held = train_facts.hold_back(training)
        made = _fitted(model, rest, train_losses.mixed(examples, share), facts)
        if smallest:
            return replace(made, facts=facts | train_facts.median_size(made.model, held, rest, examples))
        assert bound is not None
        return replace(made, facts=facts | train_facts.overfitting(made.model, held, rest, inner.norm, float(bound)))

    return (Fit(apply),)


def inner_attack(stack: Stack, steps: int | None, norm: Norm | None) -> InnerAttack:
    """The inner attack: all steps taken, in float32. Raises UsageError for one that gives no examples to train on."""
    reference = _with_steps(stack, steps)
    entry, params, caps = _gradient_attack(reference)
    # Images that leave once they are fooled would lie at the boundary, and a timed precision would not repeat itself.
    for key, value in (("keep_going", True), ("precision", "float32")):
        if key in params and reference.get(key) is None:
            params[key] = value
    order = ("l2", *LP) if caps.minimum_norm else LP
    chosen: Norm = norm or next(n for n in order if n in caps.norms)
    if chosen not in caps.norms:
        known = ", ".join(sorted(caps.norms & set(LP)))
        raise UsageError(f"advtrain: {reference} has no {chosen} version; it works in {known}")
    return InnerAttack(str(reference), caps, entry, params, chosen)


def _with_steps(stack: Stack, steps: int | None) -> Reference:
    """The one attack of `stack`, without a threat, with `steps` where they are given."""
    from advplug.matrix import THREAT_KEYS

    if len(stack) != 1:
        raise UsageError(f"advtrain: attack takes one attack, like (pgd:steps=7), got '{stack}'")
    (reference,) = stack
    for key in THREAT_KEYS:
        if reference.get(key) is not None:
            raise UsageError(f"advtrain: '{reference}' cannot hold {key}; write attack=({reference.without(key)})"
                             + (f",{key}={reference.get(key)}" if key != "target" else ""))  # fmt: skip
    if steps is not None:
        if stack != INNER and reference.get("steps") is not None:
            raise UsageError(f"advtrain: steps={steps} contradicts '{reference}'; give one of them")
        kept = tuple(p for p in reference.params if p[0] != "steps")
        reference = Reference(reference.name, (*kept, ("steps", str(steps))))
    return reference


def _gradient_attack(reference: Reference) -> tuple[Entry, dict[str, Any], AttackCaps]:
    from advplug.registry import registry

    entry = registry().get("attack", reference.name)
    params = entry.bind(reference)
    caps = entry.spec.caps_of(params)
    assert isinstance(caps, AttackCaps)
    if caps.access is not Access.GRADIENT or not caps.norms & set(LP) or "untargeted" not in caps.goals:
        raise UsageError(f"advtrain: {entry.name} is no gradient attack in {', '.join(LP)}; use one like pgd")
    return entry, params, caps


def trades(
    beta: Annotated[float, Param("weight of the divergence from the clean answers", gt=0)] = 6.0,
    eps: Eps = None,
    norm: NormName = "linf",
    steps: Annotated[int, Param("steps of the inner attack", ge=1)] = 10,
) -> Defense:
    """Cross-entropy, and how far the worst image of the ball takes the answer from the clean one."""

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug.defenses import adversarial, train_losses

        bound = _eps("trades", eps, norm, training.info)
        ascent = adversarial.steps_from("near", norm, bound, steps)
        examples = adversarial.worst_divergence(ascent, len(training.info.classes))
        return _fitted(model, training, train_losses.trades(examples, beta), {"norm": norm, "eps": str(bound)})

    return (Fit(apply),)


def mart(
    weight: Annotated[float, Param("weight of the divergence on images that the model is unsure of", gt=0)] = 5.0,
    eps: Eps = None,
    norm: NormName = "linf",
    steps: Annotated[int, Param("steps of the inner attack", ge=1)] = 10,
) -> Defense:
    """Adversarial training that weighs images by how unsure the model is of them without attack."""

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug.defenses import adversarial, train_losses

        bound = _eps("mart", eps, norm, training.info)
        ascent = adversarial.steps_from("near", norm, bound, steps)
        examples = adversarial.worst_cross_entropy(ascent, len(training.info.classes))
        return _fitted(model, training, train_losses.mart(examples, weight), {"norm": norm, "eps": str(bound)})

    return (Fit(apply),)


def grad_reg_train(
    weight: Annotated[float, Param("weight of the squared gradient norm, pixels in [0, 1]", gt=0)] = 0.3,
) -> Defense:
    """Training from scratch with the input gradient's squared norm as a penalty."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        from advplug.defenses.train_losses import smooth_in_the_input

        return smooth_in_the_input(weight)(model, x, y, stream)

    return (Objective(loss),)


# --- fine-tuning -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Budget in L-inf, steps and weight of adversarial fine-tuning."""

    eps: Fraction | None
    steps: int
    weight: float


PRESETS = {
    "light": Preset(Fraction(4, 255), 3, 0.5),
    "strong": Preset(Fraction(8, 255), 5, 0.9),
    None: Preset(None, 5, 1.0),
}


def adv_finetune(
    preset: Annotated[
        Literal["light", "strong"] | None,
        Param("light: eps=4/255,steps=3,lambda=0.5; strong: eps=8/255,steps=5,lambda=0.9; what is given counts"),
    ] = None,
    eps: Annotated[Fraction | None, Param("budget; none: the preset's, or the dataset's customary one", gt=0)] = None,
    steps: Annotated[int | None, Param("I-FGSM steps a batch; none: the preset's, or 5", ge=1)] = None,
    lambda_: Annotated[float | None, Param("weight of the adversarial loss; none: the preset's, or 1", gt=0)] = None,
    norm: NormName = "linf",
    epochs: Epochs = 6,
    lr: Rate = None,
) -> Defense:
    """Fine-tunes on clean images and on I-FGSM images made anew for each batch: CE(x) + lambda CE(x_adv).

    Raises UsageError for a preset in another norm without a budget, `Tune.apply` for a budget that does not serve.
    """
    usual = PRESETS[preset]
    _check_preset(preset, norm, eps)
    count, weight = steps or usual.steps, lambda_ if lambda_ is not None else usual.weight

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug.defenses import adversarial, train_losses

        bound = _eps("adv-finetune", eps or usual.eps, norm, training.info)
        ascent = adversarial.steps_from("clean", norm, bound, count)
        examples = adversarial.worst_cross_entropy(ascent, len(training.info.classes))
        facts = {"norm": norm, "eps": str(bound), "steps": count, "lambda": weight}
        return _fitted(model, training, train_losses.added(examples, weight), facts, _tuning(training, epochs, lr))

    return (Tune(apply),)


def grad_reg(
    weight: Annotated[float, Param("weight of the squared gradient norm, pixels in [0, 1]", gt=0)] = 10.0,
    epochs: Epochs = 6,
    lr: Rate = None,
) -> Defense:
    """Fine-tunes with the input gradient's squared norm as a penalty."""

    def apply(model: nn.Module, training: Training) -> Tuned:
        from advplug.defenses.train_losses import smooth_in_the_input

        return _fitted(model, training, smooth_in_the_input(weight), {}, _tuning(training, epochs, lr))

    return (Tune(apply),)


def _check_preset(preset: str | None, norm: Norm, eps: Fraction | None) -> None:
    if preset and norm != "linf" and eps is None:
        raise UsageError(f"adv-finetune: the budget of preset={preset} is one in linf; write eps= for norm={norm}")


# --- shared ----------------------------------------------------------------------------------------


def _eps(what: str, eps: Fraction | None, norm: Norm, info: DatasetInfo) -> Fraction:
    """`eps`, or the dataset's customary budget. Raises UsageError where it is no radius or there is none."""
    if eps is not None:
        return check_eps(str(eps), eps, norm)
    if norm not in info.budgets:
        raise UsageError(f"{what}: this dataset has no customary budget in {norm}; write {what}:norm={norm},eps=...")
    return customary(info.budgets, frozenset({norm}), norm).eps


def _tuning(training: Training, epochs: int, lr: float | None) -> Schedule:
    return replace(training.schedule, epochs=epochs, lr=lr or training.schedule.lr)


def _fitted(
    model: nn.Module, training: Training, loss: TrainingLoss, facts: dict[str, Any], plan: Schedule | None = None
) -> Tuned:
    return Tuned(training.fit(model, Objective(loss), schedule=plan), facts=facts)


_HERE = "advplug.builtin.advtrain:"
_TRAIN, _TUNE = DefenseCaps(("objective",), loaded="adv-finetune"), DefenseCaps(("tune",), needs_data=True)


def _advtrain_caps(params: Mapping[str, Any]) -> DefenseCaps:
    """The same for all parameters; a mistake in them is found here, before anything is trained. Raises UsageError."""
    inner_attack(params["attack"], params["steps"], params["norm"])
    return _TRAIN


def _finetune_caps(params: Mapping[str, Any]) -> DefenseCaps:
    """Likewise."""
    _check_preset(params["preset"], params["norm"], params["eps"])
    return _TUNE


DEFENSES: list[Spec] = [
    Spec(
        "advtrain", _HERE + "advtrain", _TRAIN,
        "Adversarial training on the images of any gradient attack or DeepFool",
        "Madry et al. 2017, arXiv 1706.06083; FGSM: Goodfellow et al. 2014, arXiv 1412.6572; "
        "DeepFool: Moosavi-Dezfooli et al. 2015, arXiv 1511.04599",
        narrow=_advtrain_caps,
    ),
    Spec(
        "trades", _HERE + "trades", _TRAIN,
        "Adversarial training on the divergence from the clean answers (TRADES)",
        "Zhang et al. 2019, arXiv 1901.08573",
    ),
    Spec(
        "mart", _HERE + "mart", _TRAIN,
        "Adversarial training that weighs images by their clean confidence (MART)",
        "Wang et al. 2020, ICLR, openreview rklOg6EFwS",
    ),
    Spec(
        "adv-finetune", _HERE + "adv_finetune", _TUNE,
        "Adversarial fine-tuning of trained, loaded or pruned weights",
        "Kurakin et al. 2016, arXiv 1611.01236",
        narrow=_finetune_caps,
    ),
    Spec(
        "grad-reg", _HERE + "grad_reg", _TUNE,
        "Fine-tuning of trained, loaded or pruned weights with an input-gradient penalty",
        "Ross and Doshi-Velez 2018, arXiv 1711.09404",
    ),
    Spec(
        "grad-reg-train", _HERE + "grad_reg_train", replace(_TRAIN, loaded="grad-reg"),
        "Training with an input-gradient penalty (double backpropagation)",
        "Ross and Doshi-Velez 2018, arXiv 1711.09404; Drucker and Le Cun 1992",
    ),
]  # fmt: skip
