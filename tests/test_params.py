"""Typed parameters: every kind, its bounds, its errors, all read from a signature."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advplug.errors import PluginError, UsageError
from advplug.params import REQUIRED, Param, ParamSpec, bind, convert, params_of, plain
from advplug.parse import Reference, Stack, VictimRef, parse_reference, parse_stack, parse_victim


def everything(
    path: Annotated[Path, Param("where", positional=True)],
    steps: Annotated[int, Param("gradient steps", ge=1, lt=1000)] = 10,
    alpha: Annotated[float | None, Param("step size", gt=0)] = None,
    eps: Annotated[Fraction, Param("budget", ge=0, le=1)] = Fraction(8, 255),
    loss: Annotated[Literal["ce", "dlr", "margin"], Param("loss")] = "ce",
    keep_going: bool = False,
    mean: Annotated[tuple[float, ...], Param("channel means", ge=0, le=1)] = (0.5,),
    tag: str = "",
    attack: Annotated[Stack, Param("attacks")] = parse_stack("pgd:steps=3"),  # noqa: B008
    from_: VictimRef | None = None,
) -> dict[str, Any]:
    """Declares one parameter of each kind."""
    return locals()


SPECS = params_of(everything)


def value_of(text: str) -> dict[str, Any]:
    return bind(SPECS, parse_reference(f"all:.,{text}"), "attack 'all'")


def test_signature_is_read() -> None:
    assert [(s.name, s.kind, s.optional) for s in SPECS] == [
        ("path", "path", False), ("steps", "int", False), ("alpha", "float", True),
        ("eps", "fraction", False), ("loss", "str", False), ("keep_going", "bool", False),
        ("mean", "floats", False), ("tag", "str", False), ("attack", "stack", False), ("from", "victim", True),
    ]  # fmt: skip
    assert [s.name for s in SPECS if s.required] == ["path"]
    assert SPECS[4].choices == ("ce", "dlr", "margin")
    assert [s.name for s in params_of(everything, skip=frozenset({"from_", "attack"}))][-1] == "tag"


def test_paths_may_hold_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS", "/data/photos")
    assert bind(SPECS, parse_reference("all:$PHOTOS/cats"), "it")["path"] == Path("/data/photos/cats")
    assert bind(SPECS, parse_reference("all:${PHOTOS}/cats"), "it")["path"] == Path("/data/photos/cats")
    monkeypatch.delenv("PHOTOS")
    with pytest.raises(UsageError, match=r"environment variable PHOTOS is not set; export PHOTOS=FOLDER"):
        bind(SPECS, parse_reference("all:$PHOTOS/cats"), "it")
    monkeypatch.setenv("PRICE", "a$b")  # what a variable holds is taken as it is
    monkeypatch.setenv("b", "no")
    assert bind(SPECS, parse_reference("all:$PRICE"), "it")["path"] == Path("a$b")


def test_defaults() -> None:
    bound = bind(SPECS, parse_reference("all:data/x"), "it")
    assert bound == {
        "path": Path("data/x"), "steps": 10, "alpha": None, "eps": Fraction(8, 255), "loss": "ce",
        "keep_going": False, "mean": (0.5,), "tag": "", "attack": parse_stack("pgd:steps=3"), "from": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("steps=1", "steps", 1),
        ("steps=999", "steps", 999),
        ("alpha=0.25", "alpha", 0.25),
        ("alpha=2/255", "alpha", 2 / 255),
        ("alpha=0.5/2", "alpha", 0.25),
        ("alpha=1e-3", "alpha", 0.001),
        ("alpha=none", "alpha", None),
        ("alpha=Null", "alpha", None),
        ("eps=8/255", "eps", Fraction(8, 255)),
        ("eps=0.1", "eps", Fraction(1, 10)),
        ("eps=0.5/2", "eps", Fraction(1, 4)),
        ("eps=0", "eps", Fraction(0)),
        ("eps=1", "eps", Fraction(1)),
        ("loss=margin", "loss", "margin"),
        ("keep_going=yes", "keep_going", True),
        ("keep-going=True", "keep_going", True),
        ("keep_going=off", "keep_going", False),
        ("mean=0.4:0.5:0.6", "mean", (0.4, 0.5, 0.6)),
        ("mean=0.4;1/2", "mean", (0.4, 0.5)),
        ("tag='a, b'", "tag", "a, b"),
        ("tag=none", "tag", "none"),
        ("attack=none", "attack", Stack()),
        ("attack=(pgd:steps=4+apgd)", "attack", parse_stack("pgd:steps=4+apgd")),
        ("from=resnet18", "from", parse_victim("resnet18")),
        ("from=(resnet18+prune:ratio=0.2)", "from", parse_victim("resnet18+prune:ratio=0.2")),
        ("from=none", "from", None),
    ],
)
def test_values(text: str, name: str, value: Any) -> None:
    got = value_of(text)[name]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps=0", "attack 'all': steps must be >= 1, got 0"),
        ("steps=1000", "attack 'all': steps must be < 1000, got 1000"),
        ("steps=4.5", "attack 'all': steps takes a whole number, got '4.5'"),
        ("steps=many", "attack 'all': steps takes a whole number, got 'many'"),
        ("steps=none", "attack 'all': steps takes a whole number, got 'none'"),
        ("alpha=0", "attack 'all': alpha must be > 0, got 0"),
        ("alpha=nan", "attack 'all': alpha takes a number, got 'nan'"),
        ("alpha=inf", "attack 'all': alpha takes a number, got 'inf'"),
        ("alpha=1/0", "attack 'all': alpha takes a number, got '1/0'"),
        ("eps=8/0", "attack 'all': eps takes a number or fraction, got '8/0'"),
        ("eps=nan", "attack 'all': eps takes a number or fraction, got 'nan'"),
        ("eps=-1/255", "attack 'all': eps must be >= 0, got -1/255"),
        ("eps=1e-99999999", "attack 'all': eps takes a number or fraction, got '1e-99999999'"),
        ("eps=8", "attack 'all': eps must be <= 1, got 8"),
        ("eps=1/2/3", "attack 'all': eps takes a number or fraction, got '1/2/3'"),
        ("loss=cee", "attack 'all': loss cannot be 'cee'; did you mean 'ce'?"),
        ("loss=hinge", "attack 'all': loss cannot be 'hinge'; choose from ce, dlr, margin"),
        ("keep_going=maybe", "attack 'all': keep_going takes true or false, got 'maybe'"),
        ("mean=0.5:x", "attack 'all': mean takes numbers separated by ':', got '0.5:x'"),
        ("mean=0.5:1.5", "attack 'all': mean must be <= 1, got 0.5:1.5"),
        ("stesp=4", "attack 'all' has no parameter 'stesp'; did you mean 'steps'?"),
        ("zzz=4", "attack 'all' has no parameter 'zzz'; it takes path, steps, alpha,"),
        ("steps=4,steps=5", "attack 'all': parameter 'steps' is given twice"),
        ("keep_going=1,keep-going=1", "attack 'all': parameter 'keep_going' is given twice"),
        ("path=x", "attack 'all': parameter 'path' is given twice"),
        ("attack=(pgd", "unclosed parenthesis"),
    ],
)
@pytest.mark.timeout(20)
def test_errors_are_one_line_that_says_what_to_do(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        value_of(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("all", "needs its parameter 'path': write all:PATH"),
        ("all:steps=4", "needs its parameter 'path': write all:PATH"),
    ],
)
def test_missing_parameters(reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bind(SPECS, parse_reference(reference), "dataset 'all'")


def test_bare_values_need_a_positional_parameter() -> None:
    def one(steps: int = 1) -> None: ...
    def none() -> None: ...
    def needy(size: int) -> None: ...

    with pytest.raises(UsageError, match="attack 'x' takes no bare value, got '4'; write x:KEY=VALUE"):
        bind(params_of(one), parse_reference("x:4"), "attack 'x'")
    with pytest.raises(UsageError, match="it takes no parameters"):
        bind(params_of(none), parse_reference("x:4"), "attack 'x'")
    with pytest.raises(UsageError, match="it takes no parameters"):
        bind(params_of(none), parse_reference("x:a=4"), "attack 'x'")
    with pytest.raises(UsageError, match="write size=VALUE"):
        bind(params_of(needy), parse_reference("x"), "attack 'x'")


def returns_unknown(x: int = 3) -> Unknown:  # type: ignore[name-defined] # noqa: F821
    ...


@dataclass(frozen=True)
class Made:
    """A class may be a factory."""

    size: Annotated[int, Param("size", ge=1)] = 3


def test_return_types_need_no_import() -> None:
    assert [p.name for p in params_of(returns_unknown)] == ["x"]


def test_a_class_is_a_factory() -> None:
    assert [(p.name, p.kind, p.info.ge) for p in params_of(Made)] == [("size", "int", 1)]


def bad_list(x: list[int]) -> None: ...
def bad_union(x: int | str = 3) -> None: ...
def bad_bare(x=3) -> None: ...  # type: ignore[no-untyped-def]
def bad_star(*args: int) -> None: ...
def bad_name(x: Missing = 3) -> None: ...  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize("factory", [bad_list, bad_union, bad_bare, bad_star, bad_name])
def test_unsupported_signatures_name_the_factory(factory: Any) -> None:
    with pytest.raises(PluginError, match=f"test_params:{factory.__name__}"):
        params_of(factory)


def test_descriptions_are_json() -> None:
    described = {d["name"]: d for d in json.loads(json.dumps([s.describe() for s in SPECS]))}
    assert described["eps"] == {
        "name": "eps", "type": "fraction", "required": False, "default": "8/255", "choices": [],
        "bounds": {"ge": 0, "le": 1}, "help": "budget",
    }  # fmt: skip
    assert described["path"]["required"] is True
    assert described["attack"]["default"] == "pgd:steps=3"
    assert described["mean"]["default"] == [0.5]
    assert plain({"a": (Fraction(1, 3), None)}) == {"a": ["1/3", None]}


@given(st.integers(-(10**9), 10**9))
def test_integers_are_exact(value: int) -> None:
    assert convert(ParamSpec("n", "int"), str(value), "x") == value


@given(st.fractions())
def test_fractions_are_exact(value: Fraction) -> None:
    assert convert(ParamSpec("eps", "fraction"), str(value), "x") == value


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_float_lists_are_exact(values: list[float]) -> None:
    assert convert(ParamSpec("mean", "floats"), ":".join(map(repr, values)), "x") == tuple(values)


@given(st.sampled_from([s for s in SPECS if not s.required]), st.text(max_size=10))
def test_any_text_gives_a_value_or_one_line(spec: ParamSpec, text: str) -> None:
    lines = ["it was accepted"]
    try:
        bind((spec,), Reference("x", ((spec.name, text),)), "attack 'x'")
    except UsageError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1


def test_required_is_not_a_value() -> None:
    assert ParamSpec("x", "int").required
    assert not ParamSpec("x", "int", None).required
    assert ParamSpec("x", "int").default is REQUIRED
