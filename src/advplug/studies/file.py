"""A matrix written as a file: its keys and what they take, read with the line of every mistake.

The models below are the one description of the format: reading, `schema` and `spec.yaml` follow them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from advplug.budgets import parse_budget
from advplug.errors import UsageError, did_you_mean
from advplug.params import FALSE, TRUE
from advplug.parse import Reference, is_name, parse_reference, parse_stack
from advplug.studies.yaml_text import Node, Plain, read

AXES = ("datasets", "models", "defenses", "attacks", "eps", "seeds")
"""Keys of what is crossed, of the whole file and of each block of `include`."""
_BARE_PARAMETER = re.compile(r"^\s*[A-Za-z_][\w\-]*\s*=")


# --- values ---


def _reference(value: Plain) -> str:
    """`pgd:steps=40`, or {pgd: {steps: 40}} as that. Raises ValueError."""
    if isinstance(value, str):
        return _checked(value)
    if isinstance(value, list):
        raise ValueError("a list stands where one reference belongs; stack defenses as 'a+b'")
    if len(value) != 1:
        raise ValueError("write a reference as pgd:steps=40 or as {pgd: {steps: 40}}, one name a mapping")
    ((name, params),) = value.items()
    if isinstance(params, str):
        return _checked(f"{name}:{params}" if params else name)
    if isinstance(params, list):
        raise ValueError(f"'{name}' takes its parameters as {{KEY: VALUE}}")
    return _checked(str(Reference(name, tuple((key, _parameter(name, key, v)) for key, v in params.items()))))


def _parameter(name: str, key: str, value: Plain) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ":".join(value)
    raise ValueError(f"'{name}': {key} is nested; write references inside it as text, like (resnet18+prune)")


def _checked(text: str) -> str:
    try:
        parse_stack(text)
    except UsageError as error:
        if _BARE_PARAMETER.match(text):
            hint = "inside [ ] a comma ends an item, so quote the whole reference or write one a line after '- '"
            raise ValueError(f"'{text}' is a parameter without a name before it; {hint}") from None
        if all(map(is_name, names := [part.strip() for part in text.split(",")])):
            raise ValueError(f"'{text}' is no reference; write a list as [{', '.join(names)}]") from None
        raise ValueError(str(error)) from None
    if not text:
        raise ValueError("a value is missing")
    return text


def _budget(value: Plain) -> str:
    return _text(value, "a budget such as 8/255 or l2:0.5", parse_budget)


def _seed(value: Plain) -> int:
    return _number(value, "a seed", 0)


def _images(value: Plain) -> int:
    return _number(value, "n, the number of test images,", 1)


def _number(value: Any, what: str, least: int) -> int:
    text = str(value)
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) < 2**63:
        raise ValueError(f"{what} is a whole number of at least {least}, got {_shown(value)}")
    return int(text)


def _switch(value: Any) -> bool:
    text = str(value).lower()
    if text in TRUE | FALSE:
        return text in TRUE
    raise ValueError(f"this is yes or no, got {_shown(value)}")


def _line(value: Plain) -> str:
    if isinstance(value, str):
        return " ".join(value.split())
    raise ValueError(f"this is text, got {_shown(value)}")


def _text(value: Plain, what: str, check: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"this is {what}, got {_shown(value)}")
    try:
        check(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'}"
    return f"'{value}'"


def _listed(value: Any) -> Any:
    """One value is a list of one; what stands beside nothing is no list."""
    if value == "":
        raise ValueError("a value is missing; leave the key out where nothing is to be said")
    return value if isinstance(value, list) else [value]


def _listed_by_commas(value: Any) -> Any:
    """Likewise, and `2/255, 8/255` is two."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else _listed(value)


_SCALAR: dict[str, Any] = {"type": ["string", "number", "boolean"]}
_REFERENCE: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1, "not": {"pattern": _BARE_PARAMETER.pattern + r"|^[\w. \-]+(,[\w. \-]+)+$"}},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {
                "anyOf": [
                    _SCALAR,
                    {
                        "type": "object",
                        "additionalProperties": {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]},
                    },
                ]
            },
        },
    ],
    "description": "a reference as on the command line, pgd:steps=40, or {pgd: {steps: 40}}, or the name of a variant",
}
_RADIUS = r"\s*([A-Za-z]\w*\s*:)?\s*\+?[0-9.][0-9.eE+_\-]*(\s*/\s*[0-9.eE+_\-]+)?\s*"
_BUDGET: dict[str, Any] = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{_RADIUS}(,{_RADIUS})*$"}],
    "description": "a radius like 8/255, 0.1 or l2:0.5",
}
_SEED: dict[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\s*[0-9]+(\s*,\s*[0-9]+)*\s*$"}]
}


def _either(item: Mapping[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


_Item = Annotated[str, BeforeValidator(_reference)]
References = Annotated[list[_Item], Field(min_length=1), BeforeValidator(_listed), _either(_REFERENCE)]
Budgets = Annotated[
    list[Annotated[str, BeforeValidator(_budget)]],
    Field(min_length=1), BeforeValidator(_listed_by_commas), _either(_BUDGET),
]  # fmt: skip
Seeds = Annotated[
    list[Annotated[int, BeforeValidator(_seed)]],
    Field(min_length=1), BeforeValidator(_listed_by_commas), _either(_SEED),
]  # fmt: skip
Switch = Annotated[bool, BeforeValidator(_switch), WithJsonSchema({"type": "boolean"})]
Line = Annotated[str, BeforeValidator(_line), WithJsonSchema({"type": "string"})]
_Pattern = Annotated[
    list[Line], Field(min_length=1), BeforeValidator(_listed), _either({"type": ["string", "number"]})
]  # fmt: skip


# --- the format ---


class Block(BaseModel):
    """One block of `include`: what it leaves out it takes from the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: References | None = Field(None, description="datasets; digits unless said otherwise")
    models: References | None = Field(None, description="models to attack")
    defenses: References | None = Field(None, description="defenses, a+b stacks two; none is the undefended model")
    attacks: References | None = Field(None, description="attacks; the standard protocol unless said otherwise")
    eps: Budgets | None = Field(None, description="budgets; the dataset's customary one unless said otherwise")
    seeds: Seeds | None = Field(None, description="seeds of training and attacks; 0 unless said otherwise")


class Exclude(BaseModel):
    """Cells that are left out: those that match every key given, by name, as a whole or by pattern (* and ?)."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"minProperties": 1})

    dataset: _Pattern | None = None
    model: _Pattern | None = None
    defense: _Pattern | None = None
    attack: _Pattern | None = None
    eps: Budgets | None = None
    seed: Seeds | None = None


Audit = Annotated[
    Literal["none", "quick", "full"], BeforeValidator(lambda v: v if v in ("none", "quick", "full") else _no_audit(v))
]


def _no_audit(value: Any) -> str:
    raise ValueError(f"audit is none, quick or full, got {_shown(value)}")


class Matrix(Block):
    """A matrix of cells: every dataset, model, defense, attack, budget and seed, less `exclude`, and `include`."""

    title: Line | None = Field(None, description="what the matrix is for, shown with its cells")
    n: Annotated[int, BeforeValidator(_images), WithJsonSchema({"type": "integer", "minimum": 1})] | None = Field(
        None, description="number of test images; the dataset's own unless said otherwise"
    )
    variants: dict[str, _Item] = Field(
        {}, description="names of your own for references", json_schema_extra={"additionalProperties": _REFERENCE}
    )
    exclude: Annotated[list[Exclude], BeforeValidator(_listed)] = Field([], description="cells to leave out")
    include: Annotated[list[Block], BeforeValidator(_listed)] = Field([], description="further blocks of cells")
    baseline: Switch = Field(True, description="whether the undefended model is evaluated beside defenses")
    audit: Audit = Field("quick", description="health checks: on 64 images, on all, or none")
    certify: Switch = Field(True, description="whether defenses that prove their answers are asked to")
    leakage: Switch = Field(
        False, description="whether evaluated images are looked for in the training data first; one ends the run"
    )


class File(Matrix):
    """A matrix file as an editor should know it."""

    scales: dict[str, Matrix] = Field(
        {}, description="keys that --scale NAME puts in place of those above or beside them"
    )


# --- reading ---


@dataclass(frozen=True)
class Loaded:
    """A matrix with the file that it was read from."""

    matrix: Matrix
    path: Path
    root: Node

    def where(self, *path: int | str) -> str:
        """`matrix.yaml:12`, the line of the value at `path`."""
        return f"{self.path}:{self.root.at(path).line}"


def load(path: Path, scale: str | None = None) -> Loaded:
    """Reads a matrix file, at one of its scales where it has some.

    Raises UsageError, one line with file and line, for whatever is wrong in it, in a scale that is not used, too.
    """
    root = read(path)
    if not isinstance(root.value, dict):
        raise UsageError(f"{path}:{root.line}: a matrix is a mapping, like 'models: [cnn]', not {_shown(root.plain)}")
    scales = _scales(path, root)
    top = replace(root, value={key: node for key, node in root.value.items() if key != "scales"})
    found = {name: _validated(path, _scaled(top, node)) for name, node in scales.items()}
    names = ", ".join(scales)
    if scale is None and scales:
        raise UsageError(f"{path} comes in several scales; choose one with --scale: {names}")
    if scale is None:
        return _validated(path, top)
    if not scales:
        raise UsageError(f"{path} has no scales; leave --scale out, or give it a 'scales:' mapping")
    if scale not in found:
        raise UsageError(f"{path} has no scale '{scale}'{did_you_mean(scale, scales)}; there are {names}")
    return found[scale]


def _scales(path: Path, root: Node) -> dict[str, Node]:
    assert isinstance(root.value, dict)
    node = root.value.get("scales")
    if node is None:
        return {}
    if not isinstance(node.value, dict) or not all(isinstance(n.value, dict) for n in node.value.values()):
        raise UsageError(f"{path}:{node.line}: scales is a mapping of names to keys, like 'smoke: {{n: 16}}'")
    return node.value


def _scaled(top: Node, scale: Node) -> Node:
    """The scale's keys in place of those above it; variants are added to those above."""
    assert isinstance(top.value, dict)
    assert isinstance(scale.value, dict)
    merged = {**top.value, **scale.value}
    ours, theirs = top.value.get("variants"), scale.value.get("variants")
    if ours is not None and theirs is not None and isinstance(ours.value, dict) and isinstance(theirs.value, dict):
        merged["variants"] = replace(theirs, value={**ours.value, **theirs.value})
    return replace(top, value=merged)


def _validated(path: Path, root: Node) -> Loaded:
    try:
        matrix = Matrix.model_validate(root.plain)
    except ValidationError as error:
        told = [(root.at(tuple(e["loc"])).line, _told(e)) for e in error.errors(include_url=False)]
        # Unknown keys first: what is missing may stand under one.
        line, text = min(told, key=lambda t: (not t[1].startswith("unknown key"), t[0]))
        raise UsageError(f"{path}:{line}: {text}") from None
    for position, entry in enumerate(matrix.exclude):
        if not entry.model_fields_set:
            line = root.at(("exclude", position)).line
            raise UsageError(f"{path}:{line}: this would exclude everything; name at least one of {_names(Exclude)}")
    if not matrix.models and not any(block.models for block in matrix.include):
        raise UsageError(f"{path}:{root.line}: 'models' is missing; write like 'models: [cnn]'")
    return Loaded(matrix, path, root)


def _names(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _told(error: ErrorDetails) -> str:
    """What is wrong, in words about the file."""
    loc = error["loc"]
    key = str(loc[-1]) if loc else ""
    if error["type"] == "extra_forbidden":
        inside = next((str(part) for part in loc[:-1] if part in ("include", "exclude")), "")
        models: dict[str, type[BaseModel]] = {"include": Block, "exclude": Exclude}
        known = models.get(inside, File).model_fields
        return f"unknown key '{key}'{did_you_mean(key, known) or '; keys are ' + ', '.join(known)}"
    if error["type"] == "value_error":
        named = next((str(part) for part in reversed(loc) if isinstance(part, str)), "")
        return re.sub("^this is ", f"'{named}' is ", str(error["ctx"]["error"]))
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        what = next(str(part) for part in reversed(loc) if isinstance(part, str))
        return f"'{what}' takes KEY: VALUE, got {_shown(error['input'])}"
    if error["type"] == "too_short":
        return f"'{key}' is empty; leave the key out where nothing is to be said"
    return f"'{key}': {error['msg']}"


# --- variants ---


def resolved(matrix: Matrix) -> Matrix:
    """The same with every variant's name replaced by its reference; the names are kept for what people read."""
    variants = matrix.variants

    def of(block: Block) -> dict[str, Any]:
        named = {a: getattr(block, a) for a in AXES[:4] if getattr(block, a) is not None}
        return {axis: [spelled(text, variants) for text in texts] for axis, texts in named.items()}

    include = [block.model_copy(update=of(block)) for block in matrix.include]
    exclude = [_patterns(entry, variants) for entry in matrix.exclude]
    return matrix.model_copy(update={**of(matrix), "include": include, "exclude": exclude})


def _patterns(entry: Exclude, variants: Mapping[str, str]) -> Exclude:
    axes = ("dataset", "model", "defense", "attack")
    named = {axis: getattr(entry, axis) for axis in axes if getattr(entry, axis) is not None}
    spelled_out = {axis: [_pattern(p, variants) for p in patterns] for axis, patterns in named.items()}
    return entry.model_copy(update=spelled_out)


def _pattern(text: str, variants: Mapping[str, str]) -> str:
    try:
        return spelled(text, variants)
    except UsageError:  # it need be no reference
        return "+".join(variants.get(part, part) for part in text.split("+"))


def spelled(text: str, variants: Mapping[str, str]) -> str:
    """A reference or stack with the variants in it replaced."""
    parts = [str(part) for part in parse_stack(text)]
    if not any(part in variants for part in parts):
        return text
    return "+".join(variants.get(part, part) for part in parts)


def demand_own_names(loaded: Loaded, taken: Iterable[str]) -> None:
    """Raises UsageError for a variant that could be taken for something else, or that nobody could refer to."""
    known = set(taken) | {"none"}
    for name in loaded.matrix.variants:
        where = loaded.where("variants", name)
        if name in known:
            raise UsageError(f"{where}: '{name}' has a meaning already; give the variant a name of its own")
        try:
            plain = parse_reference(name) == Reference(name)
        except UsageError:
            plain = False
        if not plain:
            raise UsageError(f"{where}: '{name}' is no name; letters, digits and '. _ -' make one")
