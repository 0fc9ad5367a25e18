"""References: what is written, what is read, and that both agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advplug.errors import UsageError
from advplug.parse import Reference, Stack, VictimRef, parse_reference, parse_stack, parse_victim


@pytest.mark.parametrize(
    ("text", "name", "params"),
    [
        ("pgd", "pgd", ()),
        ("  pgd  ", "pgd", ()),
        ("pgd:steps=40,eps=8/255", "pgd", (("steps", "40"), ("eps", "8/255"))),
        ("pgd: steps = 40 , eps = 8/255", "pgd", (("steps", "40"), ("eps", "8/255"))),
        ("pgd#steps=40", "pgd", (("steps", "40"),)),
        ("art.pgd:max-iter=3", "art.pgd", (("max-iter", "3"),)),
        ("folder:/data/my photos", "folder", (("", "/data/my photos"),)),
        ("folder:'/data/a, b',n=100", "folder", (("", "/data/a, b"), ("n", "100"))),
        ('folder:"it\'s"', "folder", (("", "it's"),)),
        ("file:w.safetensors#arch=resnet18", "file", (("", "w.safetensors"), ("arch", "resnet18"))),
        ("file:w.pt#arch=resnet18,x=1", "file", (("", "w.pt"), ("arch", "resnet18"), ("x", "1"))),
        ("torchvision:resnet50@DEFAULT", "torchvision", (("", "resnet50@DEFAULT"),)),
        ("py:my.module:make#mean=0.5:0.5", "py", (("", "my.module:make"), ("mean", "0.5:0.5"))),
        ("py:'a=b'", "py", (("", "a=b"),)),
        ("transfer:from=(resnet18+advtrain:eps=8/255),attack=(pgd:steps=40)", "transfer",
         (("from", "resnet18+advtrain:eps=8/255"), ("attack", "pgd:steps=40"))),
        ("a:b=((c))", "a", (("b", "(c)"),)),
        ("a:b=(c)+(d)", "a", (("b", "(c)+(d)"),)),
        ("a:b='x'y", "a", (("b", "'x'y"),)),
        ("7net", "7net", ()),
    ],
)  # fmt: skip
def test_reference(text: str, name: str, params: tuple[tuple[str, str], ...]) -> None:
    assert parse_reference(text) == Reference(name, params)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is no reference"),
        (":steps=4", "is no reference"),
        ("-pgd", "is no reference"),
        ("pgd steps=4", "after 'pgd' comes ':'"),
        ("pgd=4", "not '='"),
        ("pgd:", "a value is missing"),
        ("pgd:steps=", "a value is missing after steps="),
        ("pgd:steps=4,", "is no KEY=VALUE"),
        ("pgd:steps=4,40", "'40' is no KEY=VALUE; quote a value that holds a comma"),
        ("pgd:attack=(fgsm", "unclosed parenthesis"),
        ("pgd:attack=fgsm)", "closes a parenthesis that was never opened"),
        ("folder:'a", "unclosed quote"),
        ("folder:''", "a value is missing"),
    ],
)
def test_reference_errors_say_what_is_wrong(text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stacks() -> None:
    assert parse_stack("none") == parse_stack("") == Stack()
    assert str(Stack()) == "none"
    stack = parse_stack("prune:ratio=0.2+adv-finetune")
    assert [p.name for p in stack] == ["prune", "adv-finetune"]
    assert len(stack) == 2
    assert parse_stack("(prune+quantise)") == parse_stack("prune+quantise")
    assert parse_stack("folder:'a+b'").parts[0].get("") == "a+b"
    with pytest.raises(UsageError, match="'none' stands alone"):
        parse_stack("prune+none")
    for text in ("prune++x", "+", "prune+"):
        with pytest.raises(UsageError, match="is no reference"):
            parse_stack(text)


def test_victims() -> None:
    assert parse_victim("resnet18") == VictimRef(Reference("resnet18"))
    victim = parse_victim("resnet18:epochs=2+prune:ratio=0.4+quantise")
    assert (str(victim.model), str(victim.defense)) == ("resnet18:epochs=2", "prune:ratio=0.4+quantise")
    for text in ("none", "", "()"):
        with pytest.raises(UsageError, match="names no model"):
            parse_victim(text)


def test_reference_accessors() -> None:
    reference = parse_reference("pgd:steps=40,eps=8/255,loss=ce")
    assert reference.get("eps") == "8/255"
    assert reference.get("alpha") is None
    assert str(reference.without("eps", "loss")) == "pgd:steps=40"


NAMES = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_\-]{0,8}", fullmatch=True)
# Signs that mean something to the grammar come up often, so that quoting is really tried.
TEXTS = st.text(st.sampled_from("ab1=/:.@ ,+#()'\"-"), min_size=1, max_size=12)


@given(st.text(st.sampled_from("apg1:=,+#()'\" /-_."), max_size=30))
def test_whatever_parses_is_written_so_that_it_parses_alike(text: str) -> None:
    for parse in (parse_reference, parse_stack, parse_victim):
        try:
            parsed = parse(text)
        except UsageError:
            continue
        assert parse(str(parsed)) == parsed
        assert str(parse(str(parsed))) == str(parsed)


@given(NAMES, st.lists(st.tuples(KEYS, TEXTS), max_size=3))
def test_values_survive_in_quotes(name: str, params: list[tuple[str, str]]) -> None:
    params = [(k, v) for k, v in params if not ("'" in v and '"' in v)]
    quoted = [f"""{k}={f'"{v}"' if "'" in v else f"'{v}'"}""" for k, v in params]
    reference = parse_reference(name + ":" + ",".join(quoted) if quoted else name)
    assert reference == Reference(name, tuple(params))
    assert parse_reference(str(reference)) == reference


@given(NAMES.filter(lambda n: n != "none"), st.lists(st.tuples(KEYS, NAMES), min_size=1, max_size=2))
def test_references_nest(name: str, params: list[tuple[str, str]]) -> None:
    inner = Reference(name, tuple(params))
    middle = Stack((inner, Reference("quantise")))
    outer = parse_reference(f"transfer:attack=({middle}),from=(m+{inner})")
    assert parse_stack(outer.get("attack") or "") == middle
    assert parse_victim(outer.get("from") or "") == VictimRef(Reference("m"), Stack((inner,)))
    deep = parse_reference(f"outer:inner=({outer})")
    assert parse_reference(parse_reference(str(deep)).get("inner") or "") == outer
