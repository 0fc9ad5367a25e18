"""Being written."""

from advplug.contracts import Spec

ATTACKS: list[Spec] = []
