"""Text to references: `pgd:steps=40,eps=8/255`, `prune:ratio=0.2+quantise`, `folder:'my photos',n=100`.

Grammar: a reference is `NAME[:VALUE][,KEY=VALUE...]`; `#` may stand for the first comma, as in a URI;
`+` stacks references; a value that holds references of its own stands in parentheses; quotes protect
a value that holds one of `, + # ( )`. Nothing is looked up here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from advplug.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*")
_KEY = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_\-]*)\s*=")
_NESTED = re.compile(r"[+()]")


@dataclass(frozen=True)
class Reference:
    """A plugin's name with the parameters that were written; a bare value has the key ''."""

    name: str
    params: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        items = [f"{k}={_quote(v, bare=False)}" if k else _quote(v, bare=True) for k, v in self.params]
        return self.name + (":" + ",".join(items) if items else "")

    def get(self, key: str) -> str | None:
        return next((v for k, v in self.params if k == key), None)

    def without(self, *keys: str) -> Reference:
        return Reference(self.name, tuple((k, v) for k, v in self.params if k not in keys))


@dataclass(frozen=True)
class Stack:
    """References joined by `+`, in written order; empty for `none`."""

    parts: tuple[Reference, ...] = ()

    def __str__(self) -> str:
        return "+".join(str(p) for p in self.parts) or "none"

    def __iter__(self) -> Iterator[Reference]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class VictimRef:
    """A model with its defenses: `resnet18+prune:ratio=0.4`."""

    model: Reference
    defense: Stack = Stack()

    def __str__(self) -> str:
        return str(self.model) + (f"+{self.defense}" if len(self.defense) else "")


def is_name(text: str) -> bool:
    """Whether `text` can name a plugin's thing."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def parse_reference(text: str) -> Reference:
    """One reference. Raises UsageError where the text is none."""
    text = text.strip()
    head = _NAME.match(text)
    if head is None:
        raise UsageError(f"'{text}' is no reference; write NAME or NAME:KEY=VALUE")
    rest = text[head.end() :].lstrip()
    if not rest:
        return Reference(head.group())
    if rest[0] not in ":#":
        raise UsageError(f"'{text}': after '{head.group()}' comes ':' and its parameters, not '{rest[0]}'")
    params: list[tuple[str, str]] = []
    for item in _items(rest[1:], text):
        key = _KEY.match(item)
        if key is None and params:
            raise UsageError(f"'{text}': '{item}' is no KEY=VALUE; quote a value that holds a comma")
        name, value = (key.group(1), item[key.end() :]) if key else ("", item)
        value = _unwrap(value.strip())
        if not value:
            raise UsageError(f"'{text}': a value is missing{f' after {name}=' if name else ''}")
        params.append((name, value))
    return Reference(head.group(), tuple(params))


def parse_stack(text: str) -> Stack:
    """References joined by `+`; `none` and the empty text are the empty stack."""
    text = _unwrap(text.strip())
    if text in ("", "none"):
        return Stack()
    parts = tuple(parse_reference(part) for part in _split(text, "+", text))
    if any(p.name == "none" for p in parts):
        raise UsageError(f"'{text}': 'none' stands alone; leave it out of the stack")
    return Stack(parts)


def parse_victim(text: str) -> VictimRef:
    """A model followed by the defenses it is wrapped in."""
    stack = parse_stack(text)
    if not len(stack):
        raise UsageError(f"'{text}' names no model; write MODEL or MODEL+DEFENSE")
    return VictimRef(stack.parts[0], Stack(stack.parts[1:]))


def _items(text: str, whole: str) -> list[str]:
    pieces = _split(text, "#", whole, most=1)
    return [item for piece in pieces for item in _split(piece, ",", whole)]


def _split(text: str, separator: str, whole: str, most: int = -1) -> list[str]:
    """`text` cut at `separator` outside quotes and parentheses."""
    parts: list[str] = []
    depth, quote, start = 0, "", 0
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth < 0:
                raise UsageError(f"'{whole}' closes a parenthesis that was never opened")
        elif char == separator and depth == 0 and (most < 0 or len(parts) < most):
            parts.append(text[start:position])
            start = position + 1
    if quote or depth:
        raise UsageError(f"'{whole}' has an unclosed {'quote' if quote else 'parenthesis'}")
    parts.append(text[start:])
    return [p.strip() for p in parts]


def _unwrap(value: str) -> str:
    """Takes off one pair of quotes, or one pair of parentheses that encloses the whole value."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in value[1:-1]:
        return value[1:-1]
    if len(value) >= 2 and value[0] == "(" and value[-1] == ")":
        depth = 0
        for position, char in enumerate(value):
            depth += (char == "(") - (char == ")")
            if depth == 0 and position < len(value) - 1:
                return value
        return value[1:-1].strip()
    return value


def _quote(value: str, bare: bool) -> str:
    """`value` in the first form that reads back as itself; every value that was ever parsed has one."""
    quoted = (f"'{value}'", f'"{value}"', f"({value})")
    forms = (value, *(reversed(quoted) if _NESTED.search(value) else quoted))
    return next((form for form in forms if _reads_back(form, value, bare)), value)


def _reads_back(form: str, value: str, bare: bool) -> bool:
    try:
        whole = _items(form, form) == [form]
    except UsageError:
        return False
    return whole and bool(value) and _unwrap(form) == value and not (bare and _KEY.match(form))
