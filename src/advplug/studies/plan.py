"""A matrix to what is run: its blocks crossed, less what it excludes; and the `spec.yaml` that says so. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

from advplug import hooks
from advplug.budgets import parse_budget
from advplug.errors import UnknownNameError, UsageError, did_you_mean
from advplug.matrix import THREAT_KEYS, Sweep, joined
from advplug.parse import parse_reference, parse_stack
from advplug.plans import VictimPlan, bind
from advplug.poisons.plans import PoisonPlan
from advplug.registry import Registry, registry
from advplug.session import Request, plan_all
from advplug.studies.file import AXES, Block, Exclude, Loaded, Matrix, demand_own_names, load, resolved, spelled
from advplug.studies.shown_names import names_of

_KINDS = {"datasets": "dataset", "models": "model", "defenses": "defense", "attacks": "attack"}
_EXCLUDED = {**_KINDS, "eps": "eps", "seeds": "seed"}
"""What an entry of `exclude` calls each axis."""


@dataclass(frozen=True)
class Planned:
    """What a matrix comes to; `notes` say what in it has no effect. `request` holds what all of its blocks share."""

    request: Request
    matrix: Matrix
    sweeps: list[Sweep]
    poisons: list[PoisonPlan]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flags:
    """What the command line puts in place of a file's keys, in `include`, too; None leaves the file its own."""

    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    n: int | None = None
    baseline: bool | None = None
    audit: str | None = None

    def over(self, matrix: Matrix) -> Matrix:
        own = {axis: list(values) for axis, values in self.axes.items() if values}
        other = {"n": self.n, "baseline": self.baseline, "audit": self.audit}
        include = [block.model_copy(update=dict.fromkeys(own)) for block in matrix.include]
        given = {key: value for key, value in other.items() if value is not None}
        return matrix.model_copy(update={**own, **given, "include": include})

    def reach(self, entry: Exclude) -> bool:
        """Whether they put something in the place of what the entry excludes, which may then be no part of the run."""
        replaced = {key for axis, key in _EXCLUDED.items() if self.axes.get(axis)}
        return bool(entry.model_fields_set & (replaced | ({"defense"} if self.baseline is False else set())))

    def check(self, known: Registry, variants: Mapping[str, str]) -> None:
        """Raises UsageError, without the file's name, for a value that cannot be used."""
        for axis, kind in _KINDS.items():
            for text in self.axes.get(axis) or ():
                _demand_name(known, kind, text, variants)
        for text in self.axes.get("eps") or ():
            parse_budget(text)


def plan_file(path: Path, base: Request, scale: str | None = None, flags: Flags | None = None) -> Planned:
    """The cells of a matrix file. `base` says how to run. Raises UsageError, with file and line where it is one's."""
    flags, known = flags or Flags(), registry()
    loaded = load(path, scale)
    demand_own_names(loaded, [name for kind in hooks.KINDS for name in known.tables[kind]])
    _demand_known(loaded, known, {axis for axis, values in flags.axes.items() if values})
    flags.check(known, loaded.matrix.variants)
    matrix = resolved(flags.over(loaded.matrix))
    request = replace(
        base, limit=matrix.n, baseline=matrix.baseline, audit=matrix.audit, certify=matrix.certify,
        leakage=matrix.leakage,
        seeds=tuple(dict.fromkeys(s for block in (matrix, *matrix.include) for s in block.seeds or (0,))),
    )  # fmt: skip
    sweeps: list[Sweep] = []
    poisons: list[PoisonPlan] = []
    notes = []
    if matrix.models:
        with _planned(loaded, (), loaded.matrix, flags):
            sweeps, poisons = plan_all(_request(matrix, matrix, request))
        for position, entry in enumerate(matrix.exclude):
            before = sum(len(s.budgets) for s in sweeps) + len(poisons)
            meant = _meant(entry, matrix, request)
            sweeps = [left for s in sweeps if (left := _less(s, entry, meant.get(_place(s), set()))) is not None]
            poisons = [p for p in poisons if not _matches(entry, p.victim, p.attack.label) or entry.eps is not None]
            if sum(len(s.budgets) for s in sweeps) + len(poisons) == before and not flags.reach(entry):
                notes.append(f"{loaded.where('exclude', position)}: this excludes nothing")
    for position, block in enumerate(matrix.include):
        with _planned(loaded, ("include", position), loaded.matrix.include[position], flags):
            more, others = plan_all(_request(matrix, block, request))
        sweeps, poisons = [*sweeps, *more], [*poisons, *others]
    unique = joined(list({s.key: s for s in reversed(sweeps)}.values())[::-1])
    attacked = list({p.key: p for p in reversed(poisons)}.values())[::-1]
    if not unique and not attacked:
        raise UsageError(f"{path}: nothing is left of the matrix; exclude less")
    attacks = [text for block in (matrix, *matrix.include) for text in block.attacks or ()]
    request = replace(request, names=names_of(loaded.matrix.variants, attacks))
    return Planned(request, matrix, _by_victim(unique), attacked, tuple(notes))


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Puts the place in a file before what is wrong there."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


@contextmanager
def _planned(loaded: Loaded, path: tuple[int | str, ...], block: Block, flags: Flags) -> Iterator[None]:
    """Likewise for what is wrong with a block's axes together: the line of the value that is named, if it is one's."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        if _of_flag(text, loaded.matrix.variants, flags):
            raise
        path = (*path, *_named(text, loaded.matrix.variants, block, flags))
        for option, words in _WORDS.items():
            text = text.replace(option, words)
        where = loaded.where(*path) if path else str(loaded.path)
        raise UsageError(f"{where}: {text}") from error


def _named(text: str, variants: Mapping[str, str], block: Block, flags: Flags) -> tuple[int | str, ...]:
    """Where the budget or attack stands that a message begins with; nowhere if a flag replaced it."""
    for position, value in enumerate(() if flags.axes.get("eps") else block.eps or ()):
        if text.startswith(f"eps '{parse_budget(value)}'"):
            return "eps", position
    for position, value in enumerate(() if flags.axes.get("attacks") else block.attacks or ()):
        if text.startswith(f"{parse_reference(spelled(value, variants))}:"):
            return "attacks", position
    return ()


def _of_flag(text: str, variants: Mapping[str, str], flags: Flags) -> bool:
    """Whether a message begins with an option, or with what one of them gave."""
    given = [f"eps '{parse_budget(value)}'" for value in flags.axes.get("eps") or ()]
    given += [f"{parse_reference(spelled(value, variants))}:" for value in flags.axes.get("attacks") or ()]
    return text.startswith(("-", *given))


_WORDS = {"of the -e axis": "of 'eps'", "like -e ": "like ", "repeat -a for another": "write another attack"}
"""What messages say of options, in words of a file."""


def _request(matrix: Matrix, block: Block, base: Request) -> Request:
    """One block; what it leaves out is the file's."""

    def axis(name: str, otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
        found = getattr(block, name) or getattr(matrix, name)
        return tuple(found) if found else otherwise

    return replace(
        base,
        datasets=axis("datasets", ("digits",)),
        models=axis("models", ()),
        defenses=axis("defenses", ()),
        attacks=axis("attacks", ()),
        budgets=axis("eps", ()),
        seeds=axis("seeds", (0,)),
    )


def _by_victim(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """A victim's sweeps together, victims in the order in which they first appear, so that each is built once."""
    order = {key: place for place, key in enumerate(dict.fromkeys(s.victim.key for s in sweeps))}
    return sorted(sweeps, key=lambda s: order[s.victim.key])


# --- names, with the line they stand on ---


def _demand_known(loaded: Loaded, known: Registry, overridden: set[str]) -> None:
    """Looks every reference of the file up. Raises UsageError with its line for one that cannot be used."""
    variants = loaded.matrix.variants
    for path, kind, text in _references(loaded.matrix, overridden):
        with _told(loaded.where(*path)):
            _demand_name(known, kind, text, variants)


def _demand_name(known: Registry, kind: str, text: str, variants: Mapping[str, str]) -> None:
    for part in parse_stack(spelled(text, variants)) if kind == "defense" else [None]:
        reference = part or parse_reference(spelled(text, variants))
        try:
            bind(known, kind, reference.without(*THREAT_KEYS) if kind == "attack" else reference)
        except UnknownNameError as error:
            hint = did_you_mean(reference.name, variants).replace("mean '", "mean the variant '")
            raise UsageError(f"no {kind} is called '{reference.name}'{hint}" if hint else str(error)) from error


def _references(matrix: Matrix, overridden: set[str]) -> Iterator[tuple[tuple[int | str, ...], str, str]]:
    places: list[tuple[tuple[int | str, ...], Block]] = [((), matrix)]
    places += [(("include", i), block) for i, block in enumerate(matrix.include)]
    for path, block in places:
        for axis, kind in _KINDS.items():
            for position, text in enumerate(getattr(block, axis) or ()):
                if axis not in overridden:
                    yield (*path, axis, position), kind, text


# --- what is left out ---


def _less(sweep: Sweep, entry: Exclude, meant: set[Fraction]) -> Sweep | None:
    """The sweep less what `entry` excludes, None where nothing is left; `meant` are budgets that its attacks name."""
    gone = set(sweep.budgets)
    if not _matches(entry, sweep.victim, sweep.attack.label):
        whatever = entry.model_copy(update={"attack": None})
        gone = meant if meant and _matches(whatever, sweep.victim, sweep.attack.label) else set()
    if entry.eps is not None:
        named = [parse_budget(text) for text in entry.eps]
        gone = {eps for eps in gone if any(b.eps == eps and b.norm in (None, sweep.norm) for b in named)}
    if not gone:
        return sweep
    left = tuple(eps for eps in sweep.budgets if eps not in gone)
    return replace(sweep, budgets=left) if left else None


def _place(sweep: Sweep) -> tuple[str, str, str, str]:
    return sweep.victim.key, sweep.attack.label, sweep.norm, str(sweep.goal)


def _meant(entry: Exclude, matrix: Matrix, request: Request) -> dict[tuple[str, str, str, str], set[Fraction]]:
    """The budgets of attacks that an entry names with a threat, like pgd:target=3, which is no part of their label."""
    named = [text for text in entry.attack or () if _tells_threat(text)]
    try:
        found = plan_all(_request(matrix, matrix.model_copy(update={"attacks": named}), request))[0] if named else []
    except UsageError:  # a pattern need be no reference
        return {}
    return {_place(s): set(s.budgets) for s in found}


def _tells_threat(text: str) -> bool:
    try:
        return any(key in THREAT_KEYS for key, _ in parse_reference(text).params)
    except UsageError:
        return False


def _matches(entry: Exclude, victim: VictimPlan, attack: str) -> bool:
    """Whether every key of `entry`, its budgets apart, matches."""
    labels = {
        "dataset": victim.dataset.label,
        "model": victim.model.label,
        "defense": victim.defense_label,
        "attack": attack,
    }
    for axis, label in labels.items():
        patterns = getattr(entry, axis)
        if patterns is not None and not any(_fits(label, pattern) for pattern in patterns):
            return False
    return entry.seed is None or victim.seed in entry.seed


def _fits(label: str, pattern: str) -> bool:
    """Whether a pattern means this reference: written out, by the names in it, or by `*` and `?`."""
    try:
        names = "+".join(part.name for part in parse_stack(label)) or "none"
        spelling = str(parse_stack(pattern))
    except UsageError:  # a pattern need be no reference, nor a label of the user's own object
        names, spelling = label, pattern
    return label == spelling or any(fnmatchcase(text, pattern) for text in (label, names))


# --- spec.yaml ---


def spec_text(matrix: Matrix, command: str) -> str:
    """The matrix as a file that `advplug run` reads again, everything resolved."""
    import yaml

    kept = matrix.model_dump(exclude_none=True, exclude_defaults=True)
    kept = {key: kept[key] for key in sorted(kept, key=lambda k: k != "title")}
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10**6)
    return f"# {' '.join(command.split())}\n{text}" if command else text


def spec_of(request: Request) -> str | None:
    """The same of an evaluation; None where models or data are objects, which no file can name."""
    if not all(isinstance(item, str) for item in (*request.models, *request.datasets)):
        return None
    axes: dict[str, Sequence[Any]] = {
        "datasets": request.datasets,
        "models": request.models,
        "defenses": request.defenses,
        "attacks": request.attacks,
        "eps": request.budgets,
        "seeds": request.seeds,
    }
    assert set(axes) == set(AXES)
    rest: dict[str, Any] = {"n": request.limit, "baseline": request.baseline, "audit": request.audit}
    given: dict[str, Any] = {name: list(values) for name, values in axes.items() if values}
    return spec_text(Matrix.model_construct(**given, **rest, certify=request.certify), request.command)
