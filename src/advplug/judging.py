"""Which meetings of dataset, model, defense and attack make no sense, and what would work instead. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from advplug.contracts import (
    Access,
    AttackCaps,
    DatasetInfo,
    DefenseCaps,
    Goal,
    Gradient,
    Minimise,
    Norm,
    PoisonCaps,
    Targeted,
    Untargeted,
)
from advplug.plans import Bound, VictimPlan

IMAGE_TEXT = "image-text"
RETRIEVAL = "retrieval"
CLIP = "use a CLIP model, such as clip-tiny or open_clip:ARCH@TAG"


@dataclass(frozen=True)
class Refused:
    """Why a sweep makes no sense, and what would work instead."""

    reason: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.instead}" if self.instead else self.reason


def judge(
    victim: VictimPlan, attack: Bound, norm: Norm, goal: Goal, info: DatasetInfo
) -> tuple[Refused | None, tuple[str, ...]]:
    """The first reason that applies, or None; with notes on what the engine adds by itself."""
    caps: AttackCaps = attack.caps
    refused = (
        _judge_threat(victim, attack, norm, goal, info)
        or _judge_training_set(victim, caps.access, info)
        or judge_victim(victim, info)
        or _judge_gradient(victim, attack)
    )
    notes = []
    if victim.stochastic and caps.access is Access.GRADIENT:
        notes.append("the victim is randomised: every step follows fresh draws of its answers together (EOT)")
    if victim.gradient is Gradient.BPDA and caps.access is Access.GRADIENT:
        notes.append("gradients pass the defense through its declared stand-in (BPDA); run a gradient-free attack too")
    notes += [note for count, note in caps.fewer_classes if len(info.classes) < count]
    if caps.per_batch:
        notes.append("it draws a batch at a time: another --batch-size gives slightly different numbers")
    return refused, tuple(notes)


def _judge_threat(victim: VictimPlan, attack: Bound, norm: Norm, goal: Goal, info: DatasetInfo) -> Refused | None:
    caps: AttackCaps = attack.caps
    if norm not in caps.norms:
        return Refused(f"{attack.label} has no {norm} version", f"it works in {', '.join(sorted(caps.norms))}")
    kind = {Targeted: "targeted", Minimise: "minimise", Untargeted: "untargeted"}[type(goal)]
    if kind not in caps.goals:
        return Refused(f"{attack.label} cannot run {kind}", f"it runs {' and '.join(sorted(caps.goals))}")
    if caps.modality not in (info.modality, IMAGE_TEXT):
        return Refused(f"{attack.label} attacks {caps.modality} data, this dataset holds {info.modality} data")
    if caps.modality == IMAGE_TEXT and victim.model.caps.modality != IMAGE_TEXT:
        return Refused(f"{attack.label} compares images with texts, {victim.model.label} knows none", CLIP)
    if isinstance(goal, Minimise):
        blurred = next((d.label for d in victim.defense if not d.caps.keeps_scores), None)
        if blurred is not None:
            return Refused(
                f"{blurred} answers with other scores than the model's, so that no similarity can be read off it",
                "use an attack on its answers, such as pgd",
            )
    return _judge_counts(attack, caps, info) if info.classes and victim.model.caps.task != RETRIEVAL else None


def _judge_counts(attack: Bound, caps: AttackCaps, info: DatasetInfo) -> Refused | None:
    """Whether the attack fits the classes and channels that there are; a gallery holds as many texts as asked for."""
    classes = len(info.classes)
    if caps.max_classes is not None and classes > caps.max_classes:
        return Refused(
            f"{attack.label} works with up to {caps.max_classes} classes, the dataset has {classes}",
            "use another attack",
        )
    if caps.channels is not None and info.channels not in caps.channels:
        known = " or ".join(map(str, caps.channels))
        return Refused(f"{attack.label} works on images of {known} channels, these have {info.channels}")
    if classes < caps.min_classes:
        return Refused(
            f"{attack.label} needs at least {caps.min_classes} classes, the dataset has {classes}",
            "use apgd:loss=margin",
        )
    return None


def judge_poison(victim: VictimPlan, attack: Bound, info: DatasetInfo) -> Refused | None:
    """Why this training set cannot be attacked so, or the victim cannot be judged."""
    caps: PoisonCaps = attack.caps
    return (
        judge_victim(victim, info)
        or _judge_training_set(victim, caps.access, info)
        or _judge_poison(victim, attack, info)
    )


def _judge_poison(victim: VictimPlan, attack: Bound, info: DatasetInfo) -> Refused | None:
    caps: PoisonCaps = attack.caps
    if victim.model.caps.task == RETRIEVAL or not info.classes:
        return Refused(
            f"{attack.label} is judged by classes, {victim.model.label} answers with captions", "use task=zero-shot"
        )
    if victim.model.caps.modality not in caps.modalities:
        kinds = {"image": "classifiers", IMAGE_TEXT: "models of images and texts"}
        known = " and ".join(kinds[m] for m in sorted(caps.modalities))
        return Refused(
            f"{attack.label} poisons the data of {known}, {victim.model.label} is none of them", "use ba or tdpa"
        )
    if caps.channels is not None and info.channels not in caps.channels:
        known = " or ".join(map(str, caps.channels))
        return Refused(f"{attack.label} works on images of {known} channels, these have {info.channels}")
    if len(info.classes) < caps.min_classes:
        return Refused(f"{attack.label} needs at least {caps.min_classes} classes, the dataset has {len(info.classes)}")
    return None


def judge_victim(victim: VictimPlan, info: DatasetInfo) -> Refused | None:
    """Why there can be no such victim, whatever attacks it."""
    return _judge_model(victim, info) or _judge_stack(victim, info)


def _judge_model(victim: VictimPlan, info: DatasetInfo) -> Refused | None:
    misfit = victim.model.value.misfit(info)
    if misfit is not None:
        return Refused(misfit)
    if victim.model.caps.task == RETRIEVAL and not info.captions:
        return Refused(
            f"{victim.model.label} retrieves captions, {victim.dataset.label} has none",
            "use captioned data, such as digit-scenes, or task=zero-shot",
        )
    if not info.classes and victim.model.caps.task != RETRIEVAL:
        return Refused(
            f"{victim.dataset.label} has captions and no classes, {victim.model.label} answers with classes",
            "use a CLIP model with task=retrieval",
        )
    if not info.trainable and victim.model.value.schedule(info) is not None:
        return Refused(
            f"{victim.model.label} has to be trained, and {victim.dataset.label} holds no training images",
            "use weights: torchvision:NAME@DEFAULT, file:PATH or your own module",
        )
    return None


def _judge_training_set(victim: VictimPlan, access: Access, info: DatasetInfo) -> Refused | None:
    if access is Access.TRAINING_SET and victim.model.value.schedule(info) is None:
        return Refused(
            f"a training-set attack needs a model that is trained, {victim.model.label} is only loaded",
            "use a model by name, without weights",
        )
    return None


def _judge_stack(victim: VictimPlan, info: DatasetInfo) -> Refused | None:
    caps: list[tuple[str, DefenseCaps]] = [(d.label, d.caps) for d in victim.defense]
    return _judge_training(victim, caps, info) or _judge_losses(victim, caps) or _judge_wraps(caps)


def _judge_training(victim: VictimPlan, caps: Sequence[tuple[str, DefenseCaps]], info: DatasetInfo) -> Refused | None:
    """Whether there is a model and there are images for what trains."""
    needs_texts = next((label for label, c in caps if c.modality == IMAGE_TEXT), None)
    if needs_texts is not None and victim.model.caps.modality != IMAGE_TEXT:
        return Refused(f"{needs_texts} trains models of images and texts, {victim.model.label} is none", CLIP)
    by_label = next((n for n, c in caps if c.needs_data and c.modality == "image" and "wrap" not in c.stages), None)
    if by_label is not None and victim.model.caps.task == RETRIEVAL:
        return Refused(
            f"{by_label} learns from class labels, {victim.model.label} answers with captions",
            "use fare, mat or caption-advtrain",
        )
    trains = [(label, c) for label, c in caps if {"data", "objective"} & set(c.stages)]
    if trains and victim.model.value.schedule(info) is None:
        label, first = trains[0]
        other = first.loaded or "a defense that tunes or wraps, such as adv-finetune"
        return Refused(
            f"{label} changes how a model is trained, {victim.model.label} is only loaded",
            f"use a model by name without weights, or {other}",
        )
    learns = next(((label, c) for label, c in caps if c.needs_data), None)
    if learns is not None and not info.trainable:
        other = learns[1].loaded or "a defense that does without, such as jpeg"
        return Refused(
            f"{learns[0]} learns from training images, {victim.dataset.label} has none",
            f"add some (in Python train=...), or use {other}",
        )
    return None


def _judge_losses(victim: VictimPlan, caps: Sequence[tuple[str, DefenseCaps]]) -> Refused | None:
    """Whether there is one training loss, of the model's kind."""
    losses = [(label, c) for label, c in caps if "objective" in c.stages]
    by_label = [(label, c) for label, c in losses if c.modality == "image"]
    if by_label and hasattr(victim.model.value, "fit"):
        label, first = by_label[0]
        return Refused(
            f"{label} trains on class labels, {victim.model.label} is trained in its own way",
            f"use {first.loaded}" if first.loaded else "use a defense that tunes or wraps, such as adv-finetune",
        )
    if len(losses) > 1:
        other = next((c.loaded for _, c in reversed(losses) if c.loaded), None)
        instead = f"a stack holds at most one{f'; use {other} for the other' if other else ''}"
        return Refused(f"{' and '.join(label for label, _ in losses)} each replace the training loss", instead)
    return None


def _judge_wraps(caps: Sequence[tuple[str, DefenseCaps]]) -> Refused | None:
    """Whether what stands around the model can stand so."""
    for kind, which in (("rejects", "detector"), ("certifies", "certifying defense")):
        several = [label for label, c in caps if getattr(c, kind)]
        if len(several) > 1:
            return Refused(f"{' and '.join(several)} are two {which}s", "a stack holds at most one")
    wraps = [(label, c) for label, c in caps if "wrap" in c.stages]
    for i, (label, c) in enumerate(wraps):
        asking = next((outer for outer, o in wraps[i + 1 :] if o.asks_many), None)
        if c.rejects and not c.certifies and asking is not None:
            told = f"{asking} asks what is inside it several times an image, {label} answers once"
            return Refused(told, f"write {label} last")
    inside = next((label for label, c in wraps[:-1] if c.certifies), None)
    if inside is not None:
        return Refused(f"{inside} certifies only what is inside it, and {wraps[-1][0]} is not", f"write {inside} last")
    return None


def _judge_gradient(victim: VictimPlan, attack: Bound) -> Refused | None:
    if attack.caps.access is Access.GRADIENT and victim.gradient is Gradient.NONE:
        blocking = next(d.label for d in victim.defense if d.caps.gradient is Gradient.NONE)
        return Refused(
            f"{blocking} passes no gradient, not even through a stand-in, and {attack.label} needs one",
            "use an attack that works on scores or decisions",
        )
    return None
