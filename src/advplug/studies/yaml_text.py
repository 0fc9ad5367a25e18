"""YAML as people write it: every scalar stays the text that stands in the file, and every value knows its line.

YAML 1.1 would read `on` as true, `010` as eight and `1e-3` as text, and leave `8/255` alone; who knows what a value is
for reads it better. Nothing is ever constructed from a tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from advplug.errors import UsageError

LARGEST = 20_000
"""Values in one file, repeated ones counted each time: aliases of aliases would grow without end."""
_KINDS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "map", "seq")
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}


@dataclass(frozen=True)
class Node:
    """One value of a file, and the line it stands on, counted from 1."""

    value: str | list[Node] | dict[str, Node]
    line: int

    @property
    def plain(self) -> Plain:
        """Text, lists and dicts."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        return self.value

    def at(self, path: tuple[int | str, ...]) -> Node:
        """The value at `path`, or the last one on the way there."""
        node = self
        for step in path:
            inner = node.value
            if isinstance(inner, dict) and step in inner:
                node = inner[str(step)]
            elif isinstance(inner, list) and isinstance(step, int) and step < len(inner):
                node = inner[step]
            else:
                break
        return node


Plain: TypeAlias = "str | list[Any] | dict[str, Any]"


def read(path: Path) -> Node:
    """The one document of a YAML file. Raises UsageError, with the line, for what is none or holds no plain values."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text: byte {error.start} is not UTF-8") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Node:
    """As `read`; `name` is what the text is called in messages."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        open_ended = "end of stream" in (error.problem or "") or "<stream end>" in (error.problem or "")
        mark = (error.context_mark if open_ended else None) or error.problem_mark or error.context_mark
        last = text.rstrip().count("\n")
        line = f":{min(mark.line, last) + 1}" if mark else ""
        raise UsageError(f"{name}{line}: {_told(error, open_ended)}") from error
    except yaml.YAMLError as error:  # a character that no file may hold
        raise UsageError(f"{name}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UsageError(f"{name}: it is nested too deeply") from None
    if root is None:
        raise UsageError(f"{name} is empty")
    return _Reader(name).node(root, ())


def _told(error: Any, open_ended: bool) -> str:
    problem = error.problem or error.context or "it is no YAML"
    if "'\\t'" in problem:
        return "a tab stands where YAML wants spaces; indent with spaces"
    if "mapping values are not allowed" in problem:
        return "a ': ' stands where no key can; look at the indentation, or put a value that holds ': ' in quotes"
    if "another document" in problem:
        return "'---' begins a second document; a matrix file holds one"
    if open_ended:
        return "a quote is not closed" if "scalar" in (error.context or "") else "a bracket is not closed"
    return f"this is no YAML: {problem}"


class _Reader:
    """Turns composed nodes into plain ones, counting them."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def node(self, found: Any, above: tuple[int, ...]) -> Node:
        import yaml

        line = found.start_mark.line + 1
        self.count += 1
        if self.count > LARGEST or id(found) in above:
            raise UsageError(f"{self.name}:{line}: too large; an alias may repeat itself")
        if found.tag not in _PLAIN:
            tag = found.tag.replace("tag:yaml.org,2002:", "!!")
            raise UsageError(f"{self.name}:{line}: '{tag}' is a tag; write plain text, lists and mappings only")
        above = (*above, id(found))
        if isinstance(found, yaml.ScalarNode):
            return Node(found.value.strip(), line)
        if isinstance(found, yaml.SequenceNode):
            return Node([self.node(item, above) for item in found.value], line)
        return Node(self._mapping(found, above), line)

    def _mapping(self, found: Any, above: tuple[int, ...]) -> dict[str, Node]:
        import yaml

        made: dict[str, Node] = {}
        for key, value in found.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self.name}:{line}: a key is text, not a list or mapping")
            if key.value in made:
                first = made[key.value].line
                raise UsageError(f"{self.name}:{line}: '{key.value}' is written twice, first on line {first}")
            # A block's value begins a line below its key, and the key is what a reader looks for.
            made[key.value] = Node(self.node(value, above).value, line)
        return made
