"""YAML as text: scalars stay what is written, structures come back, and every value knows its line."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from advplug.errors import UsageError
from advplug.studies.yaml_text import Node, parse

# What YAML 1.1 makes numbers, booleans, dates or nothing of, and what looks as if it did.
WORDS = (
    "8/255", "on", "1e-3", "1.0e-3", "off", "Yes", "n", "010", "0x1F", "0b11", "1_000", "190:20:30", ".5", "5.", "-.5",
    "+1", ".inf", ".NaN", "~", "null", "NULL", "true", "2001-01-01", "12:30", "=", "<<", "1e400", "l2:0.5", "a+b",
    "pgd:steps=40", "x#y", "007", "9" * 400,
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_plain_word_is_its_own_text_wherever_it_stands(word: str) -> None:
    assert parse(word, "m").plain == word
    assert parse(f"a: {word}  # why\n", "m").plain == {"a": word}
    assert parse(f"- {word}\n- [{word}, {word}]\n- {{b: {word}}}\n", "m").plain == [word, [word, word], {"b": word}]
    assert parse(f"{word}: a\n", "m").plain == {word: "a"}
    assert parse(f"- '{word}'\n- \"{word}\"\n- !!str {word}\n", "m").plain == [word] * 3


TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.text(st.sampled_from("ab1 :#-[]{},&*!|>'\"%@`?/=\n\t\\é☂"), max_size=12),
    st.text(max_size=8),
).map(str.strip)
VALUES: st.SearchStrategy[Any] = st.recursive(
    TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)


@given(VALUES, st.sampled_from([True, False, None]), st.booleans())
def test_what_is_dumped_reads_back(value: Any, flow: bool | None, unicode: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=unicode, width=10**6)
    assert parse(text, "m").plain == value


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(), st.lists, max_leaves=5))
def test_values_that_are_no_text_are_read_as_they_are_written(value: Any) -> None:
    def written(v: Any) -> Any:
        return [written(inner) for inner in v] if isinstance(v, list) else yaml.safe_dump(v).split("\n")[0]

    assert parse(yaml.safe_dump(value), "m").plain == written(value)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["k: v", "k: [v,\n    v]", "k:\n  - v\n  - v"]))))
def test_every_value_knows_its_line(entries: list[tuple[int, str]]) -> None:
    """Blank lines and comments before each entry; a value that is written below its key is found at the key."""
    text, lines = "first: 1\n", {"first": 1}
    for position, (gap, entry) in enumerate(entries):
        text += "\n# a comment\n"[: 13 if gap == 2 else gap] + entry.replace("k", f"k{position}", 1) + "\n"
        lines[f"k{position}"] = text.count("\n") - entry.count("\n")
    root = parse(text, "m")
    assert isinstance(root.value, dict)
    assert {key: node.line for key, node in root.value.items()} == lines
    for key, node in root.value.items():
        assert root.at((key,)) == node
        if isinstance(node.value, list):
            found = [inner.line for inner in node.value]
            below = text.split("\n")[lines[key] - 1].endswith(":")
            assert found == [lines[key] + below, lines[key] + 1 + below]


def test_a_place_that_is_not_there_is_the_last_one_on_the_way() -> None:
    root = parse("a:\n- b: x\n", "m")
    assert root.at(("a", 0, "b")) == Node("x", 2)
    for path in (("a", 0, "c"), ("a", 0, 0), ("a", 0, "c", "d")):
        assert root.at(path) == root.at(("a", 0))
    assert root.at(("a", 1)) == root.at(("a", "0")) == root.at(("a",))
    assert root.at(("a", 0, "b", "deeper")) == Node("x", 2)
    assert root.at(()) == root == root.at(("z",))


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab: -[]{},&*!|>'\"%@`?#\n\t<="), max_size=20))
def test_whatever_is_written_there_is_a_value_or_one_line(text: str) -> None:
    try:
        found, said = parse(text, "m"), "m"
    except UsageError as error:
        found, said = Node("", 1), str(error)
    assert said.startswith("m")
    assert "\n" not in said
    assert found.line <= text.count("\n") + 1
