"""What is registered of the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advplug.contracts import ModelCaps, Spec


def _caps(params: Mapping[str, Any]) -> ModelCaps:
    return ModelCaps("retrieval" if params["task"] == "retrieval" else "classification", "image-text")


def _spec(name: str, summary: str, paper: str) -> Spec:
    target = f"advplug_clip.models:{name.replace('-', '_')}"
    return Spec(name, target, ModelCaps(modality="image-text"), summary, paper, narrow=_caps)


_CLIP = "Radford et al. 2021"
MODELS: list[Spec] = [
    _spec("clip-tiny", "a CLIP that is trained from nothing on captions or class names, in about two minutes", _CLIP),
    _spec("clip-tiny-vit", "clip-tiny with a vision transformer instead of convolutions", "Dosovitskiy et al. 2021"),
    _spec("open_clip", "any model of open_clip: ARCH@TAG, ARCH@random, ARCH@FILE", _CLIP),
]
