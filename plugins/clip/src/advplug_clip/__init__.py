"""CLIP as an advplug plugin: models of open_clip and a tiny one that trains in a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_clip.dataset_specs import DATASETS
from advplug_clip.model_specs import MODELS

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
