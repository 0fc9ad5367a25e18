"""From what a user asked for, as text or objects, to the result: shared by the command line and the Python API."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from advplug.budgets import parse_budget
from advplug.certificates import CertificatePlan, planned
from advplug.costs.allowance import UNLIMITED, Allowance
from advplug.defaults import CRAFTED_BY, OUTPUT, SPEC
from advplug.errors import AdvplugError, UsageError
from advplug.executors import IN_PROCESS, Placement, started
from advplug.matrix import THREAT_KEYS, Axes, Sweep, expand
from advplug.parse import Reference, parse_reference, parse_stack, parse_victim
from advplug.plans import Bound, VictimPlan, bind, bind_stack
from advplug.poisons.plans import PoisonPlan, is_poison, needed
from advplug.poisons.plans import planned as planned_poisons
from advplug.registry import Registry, registry
from advplug.results import RunInfo, RunResult
from advplug.training.launch import asked
from advplug.versions import versions

if TYPE_CHECKING:
    from advplug.progress import Progress


@dataclass(frozen=True)
class Request:
    """One evaluation. Models and datasets are references, or objects bound already; `output` None keeps no files.

    `names` are what people call references, by the reference. `leakage` asks for the training images to be compared
    with the evaluated ones first.
    """

    models: tuple[str | Bound, ...]
    attacks: tuple[str, ...] = ()
    defenses: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    datasets: tuple[str | Bound, ...] = ("digits",)
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    baseline: bool = True
    output: Path | None = Path(OUTPUT)
    fresh: bool = False
    device: str = "auto"
    batch_size: int = 128
    audit: Literal["none", "quick", "full"] = "quick"
    certify: bool = True
    offline: bool = False
    command: str = ""
    cache: Path | None = field(default=None)
    placement: Placement = field(default_factory=Placement)
    names: Mapping[str, str] = field(default_factory=dict)
    leakage: bool = False


def plan(request: Request) -> list[Sweep]:
    """The sweeps of the request, without torch. Raises UsageError for anything that cannot be asked for."""
    return plan_all(request)[0]


def plan_all(request: Request) -> tuple[list[Sweep], list[PoisonPlan]]:
    """The sweeps, and the attacks on training data, likewise; no sweeps where only the latter were asked for."""
    _demand_valid(request)
    known = registry()
    attacks = tuple(parse_reference(a) for a in request.attacks)
    poisons = tuple(a for a in attacks if is_poison(known, a))
    axes = _axes(
        request,
        known,
        models=tuple(_bound(known, "model", m) for m in request.models),
        defenses=tuple(bind_stack(known, parse_stack(d)) for d in request.defenses or ("none",)),
        attacks=tuple(a for a in attacks if a not in poisons),
    )
    sweeps = [] if poisons and not axes.attacks else expand(axes, known)
    return sweeps, planned_poisons(axes, poisons, known)


def plan_transfer(request: Request, attack: str) -> list[Sweep]:
    """The sweeps of a transfer matrix: images crafted on each of `request.models` by `attack`, judged on each.

    A model here may be written with defenses, `resnet18+prune`. Raises UsageError.
    """
    _demand_valid(request)
    victims = {str(v): v for v in map(parse_victim, map(str, request.models))}
    if len(victims) < 2:
        raise UsageError("a transfer matrix needs at least two different models: repeat -m")
    if request.defenses:
        raise UsageError("write a defense with its model here, like -m resnet18+prune")
    inner = parse_reference(attack)
    if is_poison(registry(), inner):
        raise UsageError(f"{inner} poisons training data and crafts no images; use an attack such as {CRAFTED_BY}")
    threat = tuple((k, v) for k, v in inner.params if k in THREAT_KEYS)
    crafted = str(inner.without(*THREAT_KEYS))
    sources = tuple(Reference("transfer", (("from", name), ("attack", crafted), *threat)) for name in victims)
    known = registry()
    sweeps: list[Sweep] = []
    for victim in victims.values():
        model, defense = bind(known, "model", victim.model), bind_stack(known, victim.defense)
        axes = _axes(replace(request, baseline=False), known, (model,), (defense,), sources)
        sweeps += expand(axes, known)
    return sweeps


def _demand_valid(request: Request) -> None:
    """Raises UsageError for what no evaluation can do."""
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"-n must be at least 1 image, got {request.limit}")
    if request.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {request.batch_size}")
    for seed in request.seeds:
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seed must be a whole number of at least 0, got {seed}")
    if request.audit not in ("none", "quick", "full"):
        raise UsageError(f"audit cannot be '{request.audit}'; choose from none, quick, full")
    if not request.models:
        raise UsageError("there is no model to evaluate")
    request.placement.check(request.device)


def _axes(
    request: Request,
    known: Registry,
    models: tuple[Bound, ...],
    defenses: tuple[tuple[Bound, ...], ...],
    attacks: tuple[Reference, ...],
) -> Axes:
    """These victims and attacks on the request's datasets, budgets and seeds."""
    return Axes(
        datasets=tuple(_bound(known, "dataset", d) for d in request.datasets),
        models=models,
        defenses=defenses,
        attacks=attacks,
        budgets=tuple(parse_budget(e) for e in request.budgets),
        seeds=request.seeds,
        limit=request.limit,
        baseline=request.baseline,
    )


def _bound(known: Registry, kind: str, item: str | Bound) -> Bound:
    return item if isinstance(item, Bound) else bind(known, kind, parse_reference(item))


@dataclass(frozen=True)
class Written:
    """What `write_poisoned` wrote, in images."""

    training: int
    poisons: int
    test: int


def write_poisoned(
    dataset: str, attack: str, folder: Path, model: str | None, seed: int, device: str, offline: bool, command: str
) -> Written:
    """Writes the training set of `dataset` under `attack` to `folder`, as `advplug.poisons.files.write` does.

    `model` is what an attack looks through that needs one, trained on the clean data. Raises UsageError.
    """
    from advplug.artifacts import Artifacts
    from advplug.build import Builder
    from advplug.poisons.files import write
    from advplug.poisons.prepared import poison
    from advplug.progress import Silent

    known, reference = registry(), parse_reference(attack)
    if not is_poison(known, reference):
        raise UsageError(f"{reference} attacks images, not training data; advplug list attacks shows which do")
    bound, data = bind(known, "attack", reference), bind(known, "dataset", parse_reference(dataset))
    builder = Builder(Artifacts(), device, offline, Silent())
    needs = {}
    if bound.needs:
        if model is None:
            raise UsageError(f"{reference} looks through a model that is trained on the clean data; name one with -m")
        clean = VictimPlan(data, bind(known, "model", parse_reference(model)), (), seed)
        needs = {name: builder.build(plan, None).victim for name, plan in needed(known, clean, bound)}
    found = builder.dataset(data)
    made = poison(bound, found, seed, needs)
    told = {"command": command, "dataset": data.recipe, "attack": bound.recipe, "seed": seed}
    write(made, found.test, found.info, folder, told)
    return Written(len(made.data), int(made.poisons.sum()), len(found.test))


def certificates(request: Request, sweeps: list[Sweep]) -> list[CertificatePlan]:
    """The certificates that are due with these sweeps: none where the request leaves them out."""
    return planned(sweeps) if request.certify else []


def execute(
    request: Request,
    sweeps: list[Sweep],
    progress: Progress | None = None,
    poisons: Sequence[PoisonPlan] = (),
    spec: str | None = None,
    allowance: Allowance = UNLIMITED,
) -> RunResult:
    """Runs what is missing and returns the result of all cells, with the certificates of victims that have some.

    `spec` is written to the folder first: what was asked for, so that `advplug status` can tell what is pending. Where
    the `allowance` is used up, the most informative cells are done and the others are left out of the result.
    Raises UsageError where nothing could be computed because of what was asked for; what is refused or failed
    is stored all the same. Raises GateError where training images were to be compared with the evaluated ones and one
    is both; nothing is computed then.
    """
    from advplug.allocator import keep_freed_memory
    from advplug.assemble import assemble
    from advplug.progress import Silent
    from advplug.runner import Runner, limits
    from advplug.separation import demand_separate
    from advplug.store import Store
    from advplug.stored.recorded import stored
    from advplug.work import Options

    keep_freed_memory()
    progress = progress or Silent()
    checked = demand_separate([*sweeps, *poisons], request.offline, progress) if request.leakage else ()
    failed = _trained_together(request, sweeps, poisons, progress)
    options = Options(request.device, request.batch_size, request.audit, request.offline, request.cache, failed)
    with ExitStack() as stack:
        # First, so that nothing is touched where it cannot be had.
        asked = limits([*sweeps, *poisons])
        executor = stack.enter_context(started(request.placement, options, registry(), asked, progress))
        folder = request.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="advplug-")))
        store = stack.enter_context(Store(folder, request.fresh))
        if spec is not None and request.output is not None:
            _write(spec, store.folder / SPEC)
        due = certificates(request, sweeps)
        runner = Runner(sweeps, store, options, progress, certificates=due, poisonings=poisons, allowance=allowance)
        output = None if request.output is None else str(folder)
        info = RunInfo(versions(), request.seeds[0], executor.device, request.command, output, request.seeds,
                       names=dict(request.names), leakage=checked)  # fmt: skip
        try:
            executor.run(runner)
            runner.drop_crafted()
        finally:
            # Of an interrupted run too, what is finished can be read.
            info = replace(info, passes=runner.passes, seconds=runner.seconds)
            result = assemble(sweeps, stored(store, request.audit), info, due, poisons)
            store.put_shown(result)
    impossible = runner.usage_errors or [str(c.reason) for c in result.done if c.status == "refused"]
    if impossible and all(c.status == "refused" or c.reason in runner.usage_errors for c in result.done):
        raise UsageError(impossible[0])
    return result


def _trained_together(
    request: Request, sweeps: list[Sweep], poisons: Sequence[PoisonPlan], progress: Progress
) -> Mapping[str, AdvplugError]:
    """Trains what is due in all processes of a launcher, where that is asked for; only the main process comes back.

    What could not be trained is told by the victim's key. Raises UsageError.
    """
    if asked() is None:
        return {}
    if request.placement.executor != IN_PROCESS:
        raise UsageError("--train-with trains in the processes of a launcher; use it without --executor")
    from advplug.store import finished
    from advplug.training.together import train
    from advplug.work import Piece, victims_of

    pieces: list[Piece] = [s for s in sweeps if s.refused is None]
    pieces += [*certificates(request, sweeps), *poisons]
    keys = [[p.cell_key(eps) for eps in p.budgets] if isinstance(p, Sweep) else [p.key] for p in pieces]
    fresh = request.fresh or request.output is None
    done = {} if fresh else finished(request.output or Path(), [key for found in keys for key in found])
    due = [p for p, found in zip(pieces, keys, strict=True) if any(done.get(key) != "ok" for key in found)]
    plans = {plan.key: plan for piece in due for plan in victims_of(piece)}
    return train(list(plans.values()), request.device, request.cache, request.offline, progress)


def _write(spec: str, path: Path) -> None:
    """Whole or not at all. Raises UsageError."""
    from advplug.store import explained

    with explained(path.parent):
        part = path.with_suffix(".part")
        part.write_text(spec, encoding="utf-8")
        part.replace(path)
