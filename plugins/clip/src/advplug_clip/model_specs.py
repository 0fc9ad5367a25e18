"""What is registered of the models."""

from __future__ import annotations

from advplug.contracts import Spec

MODELS: list[Spec] = []
