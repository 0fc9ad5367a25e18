"""Models from elsewhere as an advplug plugin: timm, the Hugging Face hub, RobustBench's entries, ONNX files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_hub.model_specs import MODELS

if TYPE_CHECKING:
    from advplug.contracts import Spec

hookimpl = pluggy.HookimplMarker("advplug")


@hookimpl
def advplug_models() -> list[Spec]:
    """Models by name or file."""
    return MODELS
