"""Being written."""

from advplug.contracts import Spec

MODELS: list[Spec] = []
