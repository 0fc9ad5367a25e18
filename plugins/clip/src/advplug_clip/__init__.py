"""CLIP as an advplug plugin: models of open_clip, a tiny one that trains in two minutes, captions, attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_clip.attack_specs import ATTACKS
from advplug_clip.dataset_specs import DATASETS
from advplug_clip.defense_specs import DEFENSES
from advplug_clip.model_specs import MODELS
from advplug_clip.retrieval import METRICS

if TYPE_CHECKING:
    from advplug.contracts import Spec

hookimpl = pluggy.HookimplMarker("advplug")


@hookimpl
def advplug_models() -> list[Spec]:
    """Models that see images and read texts."""
    return MODELS


@hookimpl
def advplug_datasets() -> list[Spec]:
    """Images with captions."""
    return DATASETS


@hookimpl
def advplug_attacks() -> list[Spec]:
    """Attacks on similarities."""
    return ATTACKS


@hookimpl
def advplug_defenses() -> list[Spec]:
    """Fine-tuning of the image tower."""
    return DEFENSES


@hookimpl
def advplug_metrics() -> list[Spec]:
    """Retrieval."""
    return METRICS
