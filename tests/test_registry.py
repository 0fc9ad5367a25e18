"""The registry: hooks to tables, lazily; whatever a plugin does wrong stays its own."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from advplug import hooks
from advplug.contracts import Access, AttackCaps, DatasetCaps, DefenseCaps, MetricCaps, ModelCaps, Spec, TrackerCaps
from advplug.errors import PluginError, UnknownNameError, UsageError
from advplug.hooks import hookimpl
from advplug.parse import VictimRef, parse_reference, parse_victim
from advplug.registry import Entry, Registry, Source, load, load_target, registry, reject_unknown_kind

ATTACK = AttackCaps(Access.DECISION, frozenset({"linf"}))
CAPS: dict[str, Any] = {
    "attack": ATTACK,
    "defense": DefenseCaps(("wrap",)),
    "model": ModelCaps(),
    "dataset": DatasetCaps(),
    "metric": MetricCaps(("value",)),
    "tracker": TrackerCaps(),
}


@dataclass(frozen=True)
class Point:
    """An entry point that loads whatever `make` gives."""

    make: Callable[[], Any]

    def load(self) -> Any:
        return self.make()


def plugin(kind: str, *specs: Any, returns: Any = None, raises: BaseException | None = None) -> types.ModuleType:
    """A module with one hook."""
    module = types.ModuleType("some_plugin")

    def hook() -> Any:
        if raises:
            raise raises
        return list(specs) if returns is None else returns

    setattr(module, hooks.KINDS[kind], hookimpl(hook, specname=hooks.KINDS[kind]))
    return module


def spec(name: str, kind: str = "attack", target: str = "nowhere:make", **more: Any) -> Spec:
    return Spec(name, target, CAPS[kind], "a test", **more)


def raising(error: BaseException) -> Callable[[], Any]:
    def make() -> Any:
        raise error

    return make


def loaded(**plugins: Any) -> Registry:
    """A registry of the built-ins and `plugins`; a callable is what the entry point runs on loading."""
    points = []
    for name, what in plugins.items():
        is_plugin = isinstance(what, types.ModuleType)
        points.append((Source(name, f"dist-{name}", "1.0"), Point((lambda w=what: w) if is_plugin else what)))
    return load(points)


@pytest.mark.parametrize("kind", hooks.KINDS)
def test_every_hook_fills_its_table(kind: str) -> None:
    found = loaded(mine=plugin(kind, spec("zz-mine", kind)))
    entry = found.get(kind, "zz-mine")
    assert (entry.kind, entry.source.plugin, str(entry.source)) == (kind, "mine", "dist-mine 1.0")
    assert not found.broken
    assert entry in found.entries(kind)
    assert [e.name for e in found.entries(kind)] == sorted(e.name for e in found.entries(kind))


def test_every_hook_is_documented_and_known() -> None:
    declared = {n for n in vars(hooks.Hooks) if n.startswith("advplug_")}
    assert declared == set(hooks.KINDS.values())
    assert all(getattr(hooks.Hooks, n).__doc__ for n in declared)


def test_the_built_ins_load_and_carry_their_documentation() -> None:
    found = load([])
    assert found.broken == ()
    assert not found.duplicates
    for kind in hooks.KINDS:
        for entry in found.entries(kind):
            assert entry.spec.summary
            described = entry.describe()
            assert described["name"] == entry.name
            assert described["plugin"].startswith("advplug ")
            assert all(p["help"] for p in described["params"]), f"{entry.label}: a parameter without help"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (raising(ImportError("no module named 'gone'")), "ImportError: no module named 'gone'"),
        (raising(RuntimeError("two\nlines")), "RuntimeError: two lines"),
        (raising(SystemExit(3)), "SystemExit: 3"),
        (raising(SyntaxError("bad")), "SyntaxError: bad"),
        (raising(ValueError()), "ValueError"),
        (plugin("attack", raises=ZeroDivisionError("in the hook")), "ZeroDivisionError: in the hook"),
        (plugin("attack", raises=SystemExit(1)), "SystemExit: 1"),
        (plugin("attack", returns=7), "advplug_attacks must return a list of Spec"),
        (plugin("attack", returns=spec("x")), "advplug_attacks must return a list of Spec"),
        (plugin("attack", returns="pgd"), "must return a list of Spec, it returned str"),
        (plugin("attack", returns=["pgd"]), "advplug_attacks must return Spec values"),
        (plugin("attack", spec("x", "defense")), "with AttackCaps"),
        (plugin("defense", spec("x", "attack")), "with DefenseCaps"),
        (plugin("attack", spec("x", target="nowhere")), "target 'nowhere' is not 'module:factory'"),
        (plugin("attack", spec("x", target=":f")), "target ':f' is not 'module:factory'"),
        (plugin("attack", spec("")), "'' is no name"),
        (plugin("attack", spec("a b")), "'a b' is no name"),
        (plugin("attack", spec("a+b")), "'a+b' is no name"),
        (plugin("defense", spec("none", "defense")), "'none' is no name"),
    ],
)  # fmt: skip
def test_a_broken_plugin_hides_only_itself(broken: Any, reason: str) -> None:
    found = loaded(aa=broken, bb=plugin("attack", spec("good")))
    assert [b.source.plugin for b in found.broken] == ["aa"]
    assert reason in found.broken[0].reason
    assert "\n" not in found.broken[0].reason
    assert found.get("attack", "good").source.plugin == "bb"
    assert [s.plugin for s in found.sources] == ["builtin", "bb"]
    with pytest.raises(UnknownNameError, match=r"plugins that failed to load: aa; see advplug doctor"):
        found.get("attack", "x")


def no_specs() -> list[Spec]:
    return []


def test_a_misspelt_hook_is_named() -> None:
    module = types.ModuleType("some_plugin")
    module.advplug_atacks = hookimpl(no_specs)  # type: ignore[attr-defined]
    found = loaded(aa=module, bb=plugin("attack", spec("good")))
    assert [b.source.plugin for b in found.broken] == ["aa"]
    assert "advplug_atacks" in found.broken[0].reason
    assert found.get("attack", "good")


def test_a_hook_with_arguments_is_refused() -> None:
    module = types.ModuleType("some_plugin")
    module.advplug_attacks = hookimpl(lambda registry: [])  # type: ignore[attr-defined]
    found = loaded(aa=module, bb=plugin("attack", spec("good")))
    assert [b.source.plugin for b in found.broken] == ["aa"]
    assert found.get("attack", "good")


def test_one_module_under_two_names_is_counted_once() -> None:
    module = plugin("attack", spec("good"))
    found = loaded(aa=module, bb=module)
    assert [b.source.plugin for b in found.broken] == ["bb"]
    assert found.get("attack", "good").source.plugin == "aa"


def test_a_plugin_without_hooks_is_broken() -> None:
    found = loaded(aa=types.ModuleType("empty"))
    assert [b.source.plugin for b in found.broken] == ["aa"]
    assert "implements no hook" in found.broken[0].reason


def test_duplicates_name_both_sources_and_only_that_name_is_refused() -> None:
    first = plugin("attack", spec("same"), spec("one"))
    second = plugin("attack", spec("same"), spec("two"))
    found = loaded(aa=first, bb=second)
    with pytest.raises(PluginError) as caught:
        found.get("attack", "same")
    message = str(caught.value)
    assert "attack 'same' is registered twice, by dist-aa 1.0 and dist-bb 1.0" in message
    assert "ADVPLUG_DISABLE_PLUGINS=bb" in message
    assert found.get("attack", "one").source.plugin == "aa"
    assert found.get("attack", "two").source.plugin == "bb"
    assert "same" not in [e.name for e in found.entries("attack")]
    assert not found.broken


def test_three_of_a_name_are_all_named() -> None:
    found = loaded(**{n: plugin("model", spec("same", "model")) for n in ("aa", "bb", "cc")})
    with pytest.raises(PluginError, match=r"is registered 3 times, by dist-aa 1\.0, dist-bb 1\.0 and dist-cc 1\.0"):
        found.get("model", "same")


def test_a_plugin_that_repeats_itself_is_named_once() -> None:
    found = loaded(aa=plugin("attack", spec("same"), spec("same")))
    with pytest.raises(PluginError, match=r"attack 'same' is registered twice by dist-aa 1\.0"):
        found.get("attack", "same")


def test_the_same_name_may_serve_two_kinds() -> None:
    found = loaded(aa=plugin("attack", spec("same")), bb=plugin("model", spec("same", "model")))
    assert found.get("attack", "same").kind == "attack"
    assert found.get("model", "same").kind == "model"


@pytest.mark.parametrize("kind", hooks.KINDS)
def test_unknown_names_suggest(kind: str) -> None:
    found = loaded(mine=plugin(kind, spec("zebra-stripes", kind)))
    with pytest.raises(UnknownNameError) as caught:
        found.get(kind, "zebra-stripe")
    assert str(caught.value) == f"no {kind} is called 'zebra-stripe'; did you mean 'zebra-stripes'?"
    with pytest.raises(UnknownNameError, match=f"no {kind} is called 'qqqqqq'; 'advplug list {kind}s' shows"):
        found.get(kind, "qqqqqq")


def test_kinds() -> None:
    assert [reject_unknown_kind(k) for k in ("attack", "attacks", "metrics")] == [
        "attack",
        "attack",
        "metric",
    ]
    with pytest.raises(UsageError, match="'atacks' is no kind of plugin; did you mean 'attacks'"):
        reject_unknown_kind("atacks")


def test_disabled_plugins_are_not_even_imported() -> None:
    source = Source("aa", "dist-aa", "1.0")
    found = load([(source, Point(raising(RuntimeError("imported"))))], disabled=frozenset({"aa"}))
    assert found.broken == ()
    assert source not in found.sources


def test_the_environment_disables_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    point = (Source("aa", "dist-aa", "1.0"), Point(raising(RuntimeError("imported"))))
    monkeypatch.setattr("advplug.registry._installed", lambda: [point])
    monkeypatch.setenv("ADVPLUG_DISABLE_PLUGINS", "other, aa")
    registry.cache_clear()
    try:
        assert registry().broken == ()
    finally:
        monkeypatch.undo()
        registry.cache_clear()


def test_tables_cannot_be_written() -> None:
    found = loaded()
    with pytest.raises(TypeError):
        found.tables["attack"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        found.tables["attack"]["x"] = None  # type: ignore[index]


# --- targets, parameters and needs -----------------------------------------------------------------


def typed(from_: VictimRef, steps: int = 3, twin: str = "") -> dict[str, Any]:
    return {"steps": steps, "from": from_, "twin": twin}


def entry(target: str, **more: Any) -> Entry:
    return Entry("attack", spec("mine", target=target, **more), Source("p", "d", "1"))


def test_listing_does_not_import_the_target() -> None:
    loaded(aa=plugin("attack", spec("lazy", target="this_module_does_not_exist:make")))
    assert "this_module_does_not_exist" not in sys.modules


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("this_module_does_not_exist:make", "No module named 'this_module_does_not_exist'"),
        ("test_registry:missing", "has no attribute 'missing'"),
        ("raises_on_import:make", "ZeroDivisionError: on import"),
        ("exits_on_import:make", "SystemExit: 2"),
    ],
)
def test_targets_that_cannot_be_loaded(target: str, part: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_on_import.py").write_text("raise ZeroDivisionError('on import')")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(2)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    with pytest.raises(PluginError) as caught:
        entry(target).params()
    assert f"attack 'mine' cannot be loaded from {target}: " in str(caught.value)
    assert part in str(caught.value)


def test_a_target_may_be_an_attribute_of_an_attribute() -> None:
    assert load_target("pathlib:Path.cwd", "x")


def test_binding_and_making(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    mine = entry("test_registry:typed")
    bound = mine.bind(parse_reference("mine:from=(cnn+prune),steps=4"))
    assert bound == {"from": parse_victim("cnn+prune"), "steps": 4, "twin": ""}
    assert mine.needs(bound) == {"from": parse_victim("cnn+prune")}
    made = mine.make(bound, **{"from": "the victim itself"})
    assert made == {"steps": 4, "from": "the victim itself", "twin": ""}
    with pytest.raises(UsageError, match="attack 'mine' needs its parameter 'from': write from=VALUE"):
        mine.bind(parse_reference("mine"))


def test_declared_needs_are_no_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    twin = parse_victim("model+clean")
    mine = entry("test_registry:typed", needs=lambda bound: {"twin": twin})
    assert [p.name for p in mine.params()] == ["from", "steps"]
    bound = mine.bind(parse_reference("mine:from=cnn"))
    assert mine.needs(bound) == {"from": parse_victim("cnn"), "twin": twin}
    assert mine.make(bound, twin="T", **{"from": "F"}) == {"steps": 3, "from": "F", "twin": "T"}
