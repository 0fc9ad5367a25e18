"""Some of a dataset's classes, numbered anew in the order in which they are named. NumPy is loaded on use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from advplug.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]
_SHOWN = 20


@dataclass(frozen=True)
class Kept:
    """The classes to keep, by name, in their new order; empty for all of them, as they are."""

    names: tuple[str, ...] = ()

    @classmethod
    def parsed(cls, text: str | None) -> Kept:
        """`bird:cat:deer`. Raises UsageError for a single class and for one that is named twice."""
        if text is None:
            return cls()
        names = tuple(name.strip() for name in text.split(":"))
        if len(names) < 2 or "" in names:
            raise UsageError(f"classes takes two class names or more, like bird:cat:deer, got '{text}'")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"classes names '{twice}' twice; name each class once")
        return cls(names)

    def recipe(self) -> dict[str, Any]:
        """What a fingerprint has to hold of it: nothing where all classes are kept."""
        return {"classes": list(self.names)} if self.names else {}

    def of(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The class names that are left of `classes`."""
        return self.names or tuple(classes)

    def numbers(self, classes: Sequence[str], what: str) -> tuple[int, ...]:
        """The kept classes by their old numbers. Raises UsageError for one that `classes`, those of `what`, lack."""
        numbers = {name: number for number, name in enumerate(classes)}
        for name in self.names:
            if name not in numbers:
                listed = ", ".join(classes[:_SHOWN]) + (", ..." if len(classes) > _SHOWN else "")
                raise UsageError(f"{what} has no class '{name}'{did_you_mean(name, classes) or '; it has ' + listed}")
        return tuple(numbers[name] for name in self.of(classes))

    def rows(self, labels: Array, numbers: Sequence[int]) -> Array:
        """The rows of the images that are kept, ascending."""
        import numpy as np

        return np.flatnonzero(np.isin(labels, numbers)) if self.names else np.arange(len(labels))

    def renumbered(self, labels: Array, numbers: Sequence[int]) -> Array:
        """The new labels int64 (N,), -1 for images that are not kept."""
        import numpy as np

        if not self.names:
            return labels
        places = np.full(max(int(labels.max(initial=0)), *numbers) + 1, -1, np.int64)
        places[list(numbers)] = np.arange(len(numbers))
        renamed: Array = places[labels]
        return renamed
