"""A planned victim to a built one: data stages, training, tunes, wraps; every trained step comes from the cache."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from advplug.artifacts import Artifact, Artifacts
from advplug.contracts import (
    Calibrated,
    DatasetInfo,
    Defense,
    Fit,
    ModelSource,
    Objective,
    Poisoned,
    Schedule,
    Sift,
    Sifted,
    Stage,
    TrainingData,
    Tune,
    Tuned,
    Wrap,
)
from advplug.data import Dataset, Split
from advplug.errors import UsageError
from advplug.gallery import with_texts
from advplug.judging import IMAGE_TEXT
from advplug.keys import SCHEMA, digest
from advplug.params import plain
from advplug.plans import Bound, VictimPlan
from advplug.poisons.prepared import Prepared, left_to_judge, poison, sift, with_rounds
from advplug.rng import Stream
from advplug.train import Training
from advplug.training import launch
from advplug.training.crew import ALONE, Crew
from advplug.victim import Columns, Victim

TUNING = Schedule(lr=3e-4)
"""How weights that are only loaded are tuned: gently, since they were trained elsewhere."""


class Stages(Protocol):
    """Where progress is shown."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...


@dataclass
class Built:
    """A victim ready to be attacked, the images it is judged on, and what it took to get there.

    `facts` are figures of the defenses (parameter counts); `notes` are for the reader of the cell;
    `batch_dependent` is None where it could not be seen. `poisoned` is what was done to its training set.
    """

    victim: Victim
    split: Split
    seed: int
    weights_sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds_train: float = 0.0
    seconds_defend: float = 0.0
    batch_dependent: bool | None = None
    poisoned: Poisoned | None = None


@dataclass
class _Chain:
    """What made the weights so far, whoever trained them."""

    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """A hash of everything that made them: randomness in training depends on it."""
        return digest(self.recipe)

    @property
    def key(self) -> str:
        """Their name in the cache, which tells them from those that others trained."""
        return digest({**self.recipe, **launch.recipe()})

    def extended(self, **more: Any) -> _Chain:
        return _Chain({"after": self.name, **more})


@dataclass(frozen=True)
class _Made:
    """A trained or tuned model; `seconds` is 0 where it came from the cache."""

    model: nn.Module
    facts: Mapping[str, Any]
    seconds: float = 0.0
    trusted: torch.Tensor | None = None


class Builder:
    """Builds victims on one device, sharing datasets and the weight cache; `crew` trains them."""

    def __init__(
        self, artifacts: Artifacts, device: str, offline: bool, progress: Stages, crew: Crew = ALONE
    ) -> None:  # fmt: skip
        self._artifacts, self._offline, self._progress, self._crew = artifacts, offline, progress, crew
        self.device = pick_device(device)
        self._datasets: dict[str, Dataset] = {}
        self._poisons: dict[str, Poisoned] = {}

    def build(self, plan: VictimPlan, limit: int | None) -> Built:
        """Raises UsageError for data or weights that cannot be used, CellFailure where training fails."""
        info: DatasetInfo = plan.dataset.value.info()
        dataset = self.dataset(plan.dataset)
        stages = [(bound, stage) for bound in plan.defense for stage in _stages(bound)]
        prepared = self._prepared(plan, info, stages)
        data, poisoned = prepared.data, self._poisoned(plan)
        trained, chain = self._train(plan, info, data, stages)
        facts: dict[str, Any] = dict(prepared.facts)
        by = next((bound for bound, stage in stages if isinstance(stage, Fit)), plan.model)
        _tell(facts, by, with_rounds(trained.facts, trained.trusted, prepared.poisons))
        model, defend = trained.model, 0.0
        for bound, stage in stages:
            if isinstance(stage, Tune):
                columns_of = _columns_recipe(plan.model) if stage.reads_columns else {}
                chain = chain.extended(tune=plain(bound.recipe), **columns_of)
                tuned = self._tune(plan, info, data, model, chain, bound, stage)
                model, defend = tuned.model, defend + tuned.seconds
                _tell(facts, bound, tuned.facts)
        split, notes = subset(left_to_judge(dataset.test, poisoned), limit)
        notes = (*dataset.notes, *notes)
        model = model.to(self.device).eval()
        columns: Columns | None = None
        if plan.model.caps.modality == IMAGE_TEXT:
            model, split, columns = with_texts(model, split, plan.model.caps.task, len(info.classes))
            columns = replace(columns, readable=all(bound.caps.keeps_scores for bound in plan.defense))
        notes += _notes(model)
        stream = Stream(plan.seed, f"victim/{plan.key}")
        classes = len(info.classes) if columns is None else columns.classes
        victim = Victim(model, classes, (), self.device, stream, key=plan.key, columns=columns)
        for bound, stage in stages:
            if isinstance(stage, Calibrated):
                chain = chain.extended(calibrated=plain(bound.recipe), **_columns_recipe(plan.model))
                figures, seconds = self._measured(plan, info, data, victim, chain, bound, stage)
                _tell(facts, bound, figures)
                victim, defend = replace(victim, wraps=(*victim.wraps, stage.wrap(figures))), defend + seconds
            elif isinstance(stage, Wrap):
                chain = chain.extended(wrap=plain(bound.recipe))
                victim = replace(victim, wraps=(*victim.wraps, stage))
        notes += tuple(f"{name}: {text}" for name, told in facts.items() for text in told.get("warnings", ()))
        sha256 = weights_hash(victim.module)
        return Built(victim, split, plan.seed, sha256, facts, notes, trained.seconds, defend, poisoned=poisoned)

    def dataset(self, bound: Bound) -> Dataset:
        """Both splits, loaded once."""
        if bound.label not in self._datasets:
            self._datasets[bound.label] = bound.value.load(offline=self._offline)
        return self._datasets[bound.label]

    def _poisoned(self, plan: VictimPlan) -> Poisoned | None:
        """The poisoned training set, made once for all victims that are trained on it."""
        if plan.poison is None:
            return None
        key = plan.baseline.key
        if key not in self._poisons:
            needs = {name: self.build(need, None).victim for name, need in plan.needs}
            self._progress.stage(f"{plan.poison.label}: poisoning {plan.dataset.label}", 0)
            self._poisons[key] = poison(plan.poison, self.dataset(plan.dataset), plan.seed, needs)
        return self._poisons[key]

    def _prepared(self, plan: VictimPlan, info: DatasetInfo, stages: Sequence[tuple[Bound, Any]]) -> Prepared:
        """The training data after the data stages, in written order."""
        poisoned = self._poisoned(plan)
        data = self.dataset(plan.dataset).train if poisoned is None else poisoned.data
        poisons = np.zeros(len(data), dtype=bool) if poisoned is None else np.asarray(poisoned.poisons)
        stream, facts = Stream(plan.seed, "data"), dict[str, Any]()
        before: tuple[Bound, ...] = ()
        for position, (bound, stage) in enumerate((b, s) for b, s in stages if isinstance(s, TrainingData | Sift)):
            if isinstance(stage, Sift):
                sifting = functools.partial(self._sifted, replace(plan, defense=before), info, data, bound, stage)
                data, poisons, told = sift(data, poisons, sifting, bound.label)
                _tell(facts, bound, told)
            else:
                known = data.index[poisons]
                data = stage.apply(data, stream.child(position))
                poisons = np.isin(data.index, known)
            before = (*before, bound)
        return Prepared(data, poisons, facts)

    def _sifted(self, plan: VictimPlan, info: DatasetInfo, data: Split, bound: Bound, stage: Sift) -> Sifted:
        """What a stage leaves of `data`; the model that it looks through is that of `plan`, the victim so far."""

        def make() -> Artifact:
            title = f"{bound.label}: sifting {plan.dataset.label}"
            training = self._training(plan, info, data, title, chain)

            def trained() -> nn.Module:
                own = [(b, s) for b in plan.defense for s in _stages(b)]
                return self._train(plan, info, data, own)[0].model.to(self.device).eval()

            with training.stream.as_global("sift"):
                found = stage.apply(trained, training)
            return Artifact({"kept": torch.from_numpy(np.asarray(found.kept))}, facts=found.facts)

        chain = _Chain({"schema": SCHEMA, "sifted": launch.without(plan.recipe), "by": plain(bound.recipe)})
        made = self._artifacts.get_or_make(chain.key, make, f"{bound.label} on {plan.dataset.label}")
        return Sifted(made.tensors["kept"].numpy(), made.facts)

    def _train(
        self, plan: VictimPlan, info: DatasetInfo, data: Split, stages: Sequence[tuple[Bound, Any]]
    ) -> tuple[_Made, _Chain]:
        source: ModelSource = plan.model.value
        schedule = source.schedule(info)

        def fresh() -> nn.Module:
            with Stream(plan.seed, "init").as_global():
                return source.build(info, offline=self._offline)

        parts = [
            _training_recipe(b, stage)
            for b, stage in stages
            if isinstance(stage, TrainingData | Sift | Objective | Fit)
        ]
        how = plain(vars(schedule)) if schedule else None
        recipe = {**launch.without(plan.baseline.recipe), "model": plain(_weights_recipe(plan.model))}
        chain = _Chain({"schema": SCHEMA, **recipe, "schedule": how, "training": plain(parts)})
        if schedule is None:
            return _Made(fresh(), {}), chain
        instead = next((s for _, s in stages if isinstance(s, Objective | Fit)), None)

        def make() -> Tuned:
            model = self._begun(source, fresh())
            title = f"training {plan.model.label} on {plan.dataset.label}"
            training = self._training(plan, info, data, title, chain)
            if isinstance(instead, Fit):
                return instead.apply(model, training)
            own: Callable[[nn.Module, Training], Tuned] | None = getattr(source, "fit", None)
            if own is not None and instead is None:
                return own(model, training)
            return Tuned(training.fit(model, instead))

        return self._cached(chain.key, f"{plan.model.label} on {plan.dataset.label}", fresh, make, None), chain

    def _begun(self, source: ModelSource, fresh: nn.Module) -> nn.Module:
        """The network as its training finds it: with the weights of another training, where its source says so."""
        origin: Callable[[], VictimPlan] | None = getattr(source, "origin", None)
        if origin is None:
            return fresh
        plan = origin()
        trained, _ = self._train(plan, plan.dataset.value.info(), self.dataset(plan.dataset).train, ())
        begun: nn.Module = source.adopt(fresh, trained.model)  # type: ignore[attr-defined]
        return begun

    def _tune(
        self,
        plan: VictimPlan,
        info: DatasetInfo,
        data: Split,
        model: nn.Module,
        chain: _Chain,
        bound: Bound,
        stage: Tune,
    ) -> _Made:
        def make() -> Tuned:
            title = f"{bound.label}: tuning {plan.model.label} on {plan.dataset.label}"
            training = self._training(plan, info, data, title, chain)
            with training.stream.as_global("tune"):  # a tune may draw from the global generators
                return stage.apply(copy.deepcopy(model), training)

        label = f"{plan.model.label}+{bound.label} on {plan.dataset.label}"
        return self._cached(chain.key, label, lambda: copy.deepcopy(model), make, stage.rebuild)

    def _measured(
        self,
        plan: VictimPlan,
        info: DatasetInfo,
        data: Split,
        victim: Victim,
        chain: _Chain,
        bound: Bound,
        stage: Calibrated,
    ) -> tuple[Mapping[str, Any], float]:
        """The figures of a wrap around `victim`, and the seconds that they took; 0 where they came from the cache."""
        spent: list[float] = []

        def make() -> Artifact:
            clock = time.perf_counter()
            training = self._training(plan, info, data, f"{bound.label}: measuring {plan.model.label}", chain)
            # Its draws must not depend on what stands further out: other stacks share these figures.
            inside = replace(victim, stream=training.stream.child("measure"))
            with inside.frozen(), torch.no_grad(), training.stream.as_global("measure"):
                figures = stage.measure(inside.logits, training)
            spent.append(time.perf_counter() - clock)
            return Artifact({}, facts=figures)

        label = f"{bound.label} on {plan.model.label}, {plan.dataset.label}"
        return self._artifacts.get_or_make(chain.key, make, label).facts, sum(spent)

    def _training(self, plan: VictimPlan, info: DatasetInfo, data: Split, title: str, chain: _Chain) -> Training:
        """How this step is trained; its randomness depends on the recipe, not on how that was spelled."""
        schedule = plan.model.value.schedule(info) or TUNING
        self._progress.stage(title, 0)
        stream = Stream(plan.seed, f"train/{chain.name}")
        dataset = self.dataset(plan.dataset)
        test = left_to_judge(dataset.test, self._poisoned(plan))
        report = self._report(title)
        return Training(
            data, info, schedule, self.device, stream, report, test=test, clean=dataset.train, crew=self._crew
        )

    def _report(self, title: str) -> Callable[[int, int, int, int, float], None]:
        def report(epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
            if epoch == 1 and step == 1:
                self._progress.stage(title, epochs * steps)
            self._progress.advance()

        return report

    def _cached(
        self,
        key: str,
        label: str,
        fresh: Callable[[], nn.Module],
        make: Callable[[], Tuned],
        rebuild: Callable[[nn.Module, Mapping[str, Any]], nn.Module] | None,
    ) -> _Made:
        """The model of that key, and its facts: from the cache, or made and stored."""
        made: list[_Made] = []

        def produce() -> Artifact:
            clock = time.perf_counter()
            tuned = make()
            if tuned.structure and rebuild is None:
                raise UsageError(f"{label}: a defense that changes shapes has to say how to rebuild them")
            made.append(_Made(tuned.model, tuned.facts, time.perf_counter() - clock, tuned.trusted))
            return Artifact.of(tuned)

        artifact = self._artifacts.get_or_make(key, produce, label)
        if made:
            return made[0]
        model = fresh()
        if artifact.structure and rebuild is not None:
            model = rebuild(model, artifact.structure)
        model.load_state_dict(artifact.tensors)
        return _Made(model, artifact.facts, trusted=artifact.trusted)


def _columns_recipe(model: Bound) -> dict[str, Any]:
    """What makes the columns, where other columns may stand on the same weights; empty elsewhere."""
    return {"columns": plain(model.recipe)} if hasattr(model.value, "weights_recipe") else {}


def _weights_recipe(model: Bound) -> Mapping[str, Any]:
    """What the trained weights depend on: all of the model's recipe, unless its source says what matters."""
    matters: Callable[[], Mapping[str, Any]] | None = getattr(model.value, "weights_recipe", None)
    known = {**model.recipe, "identity": model.value.identity()}
    return known if matters is None else {**known, "params": matters()}


def _tell(facts: dict[str, Any], bound: Bound, told: Mapping[str, Any]) -> None:
    """Enters what a stage reports, under a name of its own where a defense is there twice."""
    times = sum(name.partition(" #")[0] == bound.label for name in facts)
    if told:
        facts[f"{bound.label} #{times + 1}" if times else bound.label] = told


def _notes(model: nn.Module) -> tuple[str, ...]:
    """What a source says of the module that it built; a user's own attribute of that name may be anything."""
    notes = getattr(model, "notes", ())
    return notes if isinstance(notes, tuple) and all(isinstance(note, str) for note in notes) else ()


def _stages(bound: Bound) -> Defense:
    made = bound.make()
    return made if isinstance(made, tuple) else (made,)


def _training_recipe(bound: Bound, stage: Stage) -> Mapping[str, Any]:
    """What the training depends on: the defense with all its parameters, unless the stage names those that matter."""
    if not isinstance(stage, Objective) or stage.depends is None:
        return bound.recipe
    return {**bound.recipe, "params": {name: bound.recipe["params"][name] for name in stage.depends}}


def subset(split: Split, limit: int | None) -> tuple[Split, tuple[str, ...]]:
    """`limit` images, always the same ones for the same split; all of them, with a note, if there are fewer."""
    if limit is None or limit == len(split):
        return split, ()
    if limit > len(split):
        return split, (f"only {len(split)} test images exist, all of them were used",)
    order = torch.randperm(len(split), generator=Stream(0, "subset").generator()).numpy()
    return split.subset(np.sort(order[:limit])), ()


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    kind, colon, number = name.partition(":")
    number = number if colon else "0"
    if not (number.isdecimal() and int(number) < counts.get(kind, 0)):
        raise UsageError(f"device '{name}' is not available here; use --device cpu or leave it to auto")
    return torch.device(name)


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters and buffers."""
    import hashlib

    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
