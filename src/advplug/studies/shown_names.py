"""The names that a matrix file gives to references, in the place of these wherever people read. No torch.

What programs read, and what is stored, keeps the references: a name means something in one file only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from advplug.errors import UsageError
from advplug.matrix import THREAT_KEYS
from advplug.parse import Reference, parse_reference, parse_stack
from advplug.results import Cell, RunResult

_SHOWN = ("dataset", "model", "defense", "attack")


def names_of(variants: Mapping[str, str], attacks: Iterable[str] | None = None) -> dict[str, str]:
    """What each variant's reference is called, by its spelling in results. The first of two names for one counts.

    `attacks` are those of the matrix, written out; unless given, any variant may be one. Results say the threat of an
    attack beside it, so that `pgd` and `pgd:target=3` have one label: such a label keeps its reference.
    """
    found: dict[str, str] = {}
    for name, text in variants.items():
        found.setdefault(str(parse_stack(text)), name)
    labels: dict[str, set[str]] = {}
    stacks = (parse_stack(text).parts for text in variants.values())
    alone = [parts[0] for parts in stacks if len(parts) == 1]
    for reference in alone if attacks is None else map(parse_reference, attacks):
        labels.setdefault(str(reference.without(*THREAT_KEYS)), set()).add(str(reference))
    for label, written in labels.items():
        if len(written) > 1:
            found.pop(label, None)
        elif (only := next(iter(written))) in found:
            found.setdefault(label, found[only])
    return found


def called(label: str, names: Mapping[str, str]) -> str:
    """A label with names where there are some: of the whole, or else of the parts of a stack."""
    if not names or label in names:
        return names.get(label, label)
    if label.startswith("transfer:"):
        return _crafted_on(label, names)
    try:
        parts = [str(part) for part in parse_stack(label)]
    except UsageError:  # the label of a user's own object may be anything
        return label
    return "+".join(names.get(part, part) for part in parts) if any(part in names for part in parts) else label


def _crafted_on(label: str, names: Mapping[str, str]) -> str:
    """A transfer attack stays one, with its victim's name."""
    told = parse_reference(label)
    params = tuple((key, called(text, names) if key == "from" else text) for key, text in told.params)
    return str(Reference(told.name, params))


def in_row(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row of a plan or a status as it is shown to people."""
    return {key: called(value, names) if key in _SHOWN else value for key, value in row.items()}


def shared(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """The names of two runs that are shown together; one that means something else in each is left out."""
    texts: list[dict[str, set[str]]] = [{}, {}]
    for found, names in zip(texts, (ours, theirs), strict=True):
        for text, name in names.items():
            found.setdefault(name, set()).add(text)
    a, b = texts
    twofold = {name for name in a if name in b and not (a[name] <= b[name] or b[name] <= a[name])}
    return {text: name for text, name in {**theirs, **ours}.items() if name not in twofold}


def renamed(result: RunResult) -> RunResult:
    """The result as it is shown to people."""
    names = result.run.names
    if not names:
        return result

    def told(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(renamed_row(row, names) for row in rows)

    return replace(
        result, cells=told(result.cells), threats=told(result.threats), certificates=told(result.certificates),
        poisonings=told(result.poisonings),
    )  # fmt: skip


def renamed_row(row: Any, names: Mapping[str, str]) -> Any:
    """A dataclass that names a cell, a threat or the like, as it is shown."""
    changed: dict[str, Any] = {
        name: called(label, names) for name in _SHOWN if isinstance(label := getattr(row, name, None), str)
    }
    if isinstance(attacks := getattr(row, "attacks", None), tuple):
        changed["attacks"] = tuple(called(label, names) for label in attacks)
    return replace(row, **changed)


def spelled_out(cell: Cell, names: Mapping[str, str]) -> Cell:
    """A cell of a `renamed` result with its references again."""
    texts = {name: text for text, name in names.items()}
    changed: dict[str, Any] = {name: called(getattr(cell, name), texts) for name in _SHOWN}
    return replace(cell, **changed)
