"""Being written."""

from advplug.contracts import Spec

DATASETS: list[Spec] = []
