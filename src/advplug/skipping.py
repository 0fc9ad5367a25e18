"""`--skip-bad`: the parameter of that name for every dataset that has one. Imports no torch."""

from __future__ import annotations

from advplug.parse import Reference, parse_reference
from advplug.registry import Registry, registry

_NAME = "skip_bad"


def skipping(known: Registry, reference: Reference) -> Reference:
    """`reference` with skip_bad=true, where the dataset takes it and it is not given. Raises UnknownNameError."""
    takes = any(p.name == _NAME for p in known.get("dataset", reference.name).params())
    given = {key.replace("-", "_") for key, _ in reference.params}
    if not takes or _NAME in given:
        return reference
    return Reference(reference.name, (*reference.params, (_NAME, "true")))


def all_skipping(datasets: tuple[str, ...]) -> tuple[str, ...]:
    """The same for references as they are written. Raises UsageError for one that cannot be read."""
    known = registry()
    return tuple(str(skipping(known, parse_reference(text))) for text in datasets)
