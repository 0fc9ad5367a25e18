"""The Python interface: `advplug.evaluate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from advplug import tracking
from advplug.contracts import Tracker
from advplug.errors import UsageError
from advplug.executors import Placement
from advplug.plans import Bound
from advplug.results import RunResult
from advplug.session import Request, execute, plan_all
from advplug.studies.plan import spec_of

if TYPE_CHECKING:
    from torch import nn

    from advplug.progress import Progress


def evaluate(
    model: str | nn.Module | Sequence[str | nn.Module],
    attack: str | Sequence[str] = (),
    defense: str | Sequence[str] = (),
    *,
    dataset: Any = "digits",
    train: Any = None,
    classes: int | None = None,
    eps: str | float | Sequence[str | float] = (),
    n: int | None = None,
    seed: int | Sequence[int] = 0,
    baseline: bool = True,
    output: str | Path | None = None,
    fresh: bool = False,
    device: str = "auto",
    batch_size: int = 128,
    audit: Literal["none", "quick", "full"] = "quick",
    offline: bool = False,
    executor: str = "in-process",
    address: str | None = None,
    gpus_per_cell: float | None = None,
    cpus_per_cell: int | None = None,
    track: str | Tracker | Sequence[str | Tracker] = (),
    progress: Progress | None = None,
) -> RunResult:
    """Evaluates models under attack, with and without defenses; the same as `advplug eval`.

    Args:
        model: a reference (`"resnet18"`), a module of your own that maps pixels (B, C, H, W) in [0, 1] to
            logits (B, K), with normalisation inside, or several of them.
        attack: references such as `"pgd:steps=40"`; none means the standard protocol.
        defense: references such as `"prune:ratio=0.4"`; `"a+b"` stacks them.
        dataset: a reference, `(images, labels)`, or a DataLoader of such batches; images are uint8 or
            float in [0, 1], shape (N, C, H, W), labels int (N,).
        train: training data in the same form, for defenses that train, where `dataset` is an object.
        classes: the class count of `dataset` where not all classes occur in it.
        eps: budgets such as `"8/255"`, `0.1` or `"l2:0.5"`; none means the dataset's customary one.
        n: how many test images; a fixed random subset.
        seed: of training and attacks; several are an axis.
        output: folder to keep results in and resume from; None keeps nothing.
        executor: `"ray"` computes cells on a Ray cluster, the one at `address` (`"auto"`: this machine's) or one that
            is started for the call; each cell takes `gpus_per_cell` of a GPU (0 to 1) and `cpus_per_cell` CPUs.
        track: trackers that get the finished result, such as `"mlflow"`, or functions of your own (see
            `advplug.contracts.Tracker`). One that fails is logged as a warning; the result is returned all the same.
        audit: `"quick"` checks the evaluation's health on 64 images, `"full"` on all, `"none"` not at all.

    Returns:
        The result; `.to_json()` is what `advplug eval --json` prints.

    Raises:
        advplug.errors.UsageError: for anything that cannot be evaluated as asked.
    """
    request = Request(
        models=tuple(_models(_listed(model))),
        attacks=tuple(_references(attack, "an attack", "pgd:steps=40")),
        defenses=tuple(_references(defense, "a defense", "prune:ratio=0.4")),
        budgets=tuple(_budget(e) for e in _listed(eps)),
        datasets=tuple(_dataset(dataset, train, classes)),
        limit=n,
        seeds=tuple(seed) if isinstance(seed, Sequence) else (seed,),
        baseline=baseline,
        output=None if output is None else Path(output),
        fresh=fresh,
        device=str(device),
        batch_size=batch_size,
        audit=audit,
        offline=offline,
        command="advplug.evaluate",
        placement=Placement(executor, address, gpus_per_cell, cpus_per_cell),
    )
    sweeps, poisons = plan_all(request)
    ready = _trackers(_listed(track))
    spec = spec_of(request) if request.output is not None else None
    result = execute(request, sweeps, progress, poisons, spec)
    for told in tracking.track(result, ready):
        logging.getLogger("advplug").log(logging.INFO if told.ok else logging.WARNING, told.text)
    return result


def _trackers(given: Sequence[Any]) -> list[tuple[str, Tracker]]:
    """By name, whether registered or functions. Raises UsageError."""
    own = [(tracking.named(t), t) for t in given if not isinstance(t, str)]
    for name, tracker in own:
        if not callable(tracker):
            raise UsageError(f"a tracker is a reference such as 'mlflow' or a function, got {name}")
    return [*tracking.made(tracking.trackers([t for t in given if isinstance(t, str)])), *own]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _references(value: Any, what: str, example: str) -> Iterable[str]:
    for item in _listed(value):
        if not isinstance(item, str):
            kind = type(item).__name__
            got = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
            raise UsageError(f"{what} is a reference such as '{example}', got {got}")
        yield item


def _budget(eps: Any) -> str:
    """8/255 in floating point is 8/255."""
    if isinstance(eps, float) and math.isfinite(eps):
        near = Fraction(eps).limit_denominator(10**8)
        return str(near) if float(near) == eps else str(eps)
    return str(eps)


def _models(models: Sequence[Any]) -> Iterable[str | Bound]:
    """Modules of one class get labels that tell them apart."""
    labels: dict[str, list[str]] = {}
    for model in models:
        if isinstance(model, str):
            yield model
            continue
        from advplug.objects import bind_module

        bound = bind_module(model)
        same = labels.setdefault(bound.label, [])
        if bound.value.digest not in same:
            same.append(bound.value.digest)
        number = same.index(bound.value.digest) + 1
        yield bound if number == 1 else replace(bound, label=f"{bound.label}#{number}")


def _dataset(dataset: Any, train: Any, classes: int | None) -> Iterable[str | Bound]:
    if isinstance(dataset, str):
        return [dataset]
    from advplug.objects import bind_data

    return [bind_data(dataset, train=train, classes=classes)]
