"""What was asked for, by name or as an object, with checked parameters; and a victim before it is built. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from advplug.contracts import Gradient, VictimRef
from advplug.keys import digest
from advplug.params import plain
from advplug.parse import Reference, Stack
from advplug.registry import Entry, Registry
from advplug.training.launch import recipe as launch_recipe


@dataclass(frozen=True)
class Bound:
    """A plugin with checked parameters, or an object of the user's own.

    `label` is how it was written, `recipe` everything that its behaviour depends on.
    """

    label: str
    recipe: Mapping[str, Any]
    caps: Any
    value: Any = None
    entry: Entry | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **resolved: Any) -> Any:
        """The thing itself: the user's object, or what the plugin's factory returns."""
        if self.entry is None:
            return self.value
        return self.value if self.value is not None and not resolved else self.entry.make(self.params, **resolved)

    @cached_property
    def needs(self) -> Mapping[str, VictimRef]:
        return self.entry.needs(self.params) if self.entry else {}


def bind(registry: Registry, kind: str, reference: Reference) -> Bound:
    """Looks `reference` up and checks its parameters. Raises UsageError."""
    entry = registry.get(kind, reference.name)
    params = entry.bind(reference)
    later = {p.name for p in entry.params() if p.info.later and params[p.name] == p.default}
    told = {name: value for name, value in params.items() if name not in later}
    recipe = {"name": entry.name, "plugin": str(entry.source), "params": plain(told)}
    value = entry.make(params) if kind in ("dataset", "model") else None
    return Bound(str(reference), recipe, entry.spec.caps_of(params), value, entry, params)


def bind_stack(registry: Registry, stack: Stack) -> tuple[Bound, ...]:
    return tuple(bind(registry, "defense", part) for part in stack)


@dataclass(frozen=True)
class VictimPlan:
    """A dataset, a model for it, and the defenses around it, with the seed it is trained under.

    `poison` is what happens to its training set before, made with the victims in `needs`, by name.
    """

    dataset: Bound
    model: Bound
    defense: tuple[Bound, ...]
    seed: int
    poison: Bound | None = None
    needs: tuple[tuple[str, VictimPlan], ...] = ()

    @property
    def defense_label(self) -> str:
        return "+".join(d.label for d in self.defense) or "none"

    @property
    def gradient(self) -> Gradient:
        order = (Gradient.EXACT, Gradient.BPDA, Gradient.NONE)
        return max((d.caps.gradient for d in self.defense), key=order.index, default=Gradient.EXACT)

    @property
    def stochastic(self) -> bool:
        return any(d.caps.stochastic for d in self.defense)

    @property
    def wrapped(self) -> bool:
        return any("wrap" in d.caps.stages for d in self.defense)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        poison = self.poison
        made = None if poison is None else {**poison.recipe, "needs": {name: p.recipe for name, p in self.needs}}
        return {
            **({} if made is None else {"poison": made}),
            "dataset": {**self.dataset.recipe, "fingerprint": self.dataset.value.fingerprint()},
            "model": {**self.model.recipe, "identity": plain(self.model.value.identity())},
            "defense": [d.recipe for d in self.defense],
            "seed": self.seed,
            **launch_recipe(),
        }

    @cached_property
    def key(self) -> str:
        return digest(self.recipe)

    @cached_property
    def baseline(self) -> VictimPlan:
        """The same without a defense."""
        return replace(self, defense=())

    @cached_property
    def clean(self) -> VictimPlan:
        """The same without a defense and without poison."""
        return VictimPlan(self.dataset, self.model, (), self.seed)
