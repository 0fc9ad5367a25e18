"""Being written."""

from advplug.contracts import Spec

DEFENSES: list[Spec] = []
