"""How long a pass takes here: a short timing of every victim, on its trained weights where they are cached, otherwise
on fresh ones, which take as long. Nothing is trained, and nothing is stored."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from advplug.artifacts import Artifact, Artifacts
from advplug.attacks.engine import GradientAttack
from advplug.build import Builder
from advplug.contracts import (
    Access,
    Ball,
    Batch,
    Calibrated,
    DatasetInfo,
    Objective,
    Schedule,
    Threat,
    Tune,
    Untargeted,
    Wrap,
)
from advplug.costs.forecast import Forecast
from advplug.errors import AdvplugError, CellFailure
from advplug.plans import Bound, VictimPlan
from advplug.progress import Silent
from advplug.rng import Stream
from advplug.session import Request
from advplug.victim import Victim

STEPS = 4
"""Steps of the attack that is timed."""
REPEATS = 3
"""How often it is timed at most; the median counts, after one that warms up."""
ENOUGH = 2.0
"""Seconds after which it is not timed again."""
EPOCHS = 6
"""Epochs of a defense that trains and does not say how many."""


@dataclass(frozen=True)
class Speed:
    """Seconds an image: of a pass forward and back to the input, of a decision, and of a training step."""

    attacked: float
    decided: float
    trained: float


@dataclass(frozen=True)
class Timed:
    """Seconds that a matrix will take: of passes, and of trainings, whose number is `trainings`; `unknown` are the
    victims that could not be timed, with the reason."""

    passes: float = 0.0
    training: float = 0.0
    trainings: int = 0
    unknown: tuple[str, ...] = ()


def timed(cost: Forecast, request: Request) -> Timed:
    """The seconds of a forecast on this machine."""
    clock = _Clock(request)
    passes, unknown = 0.0, []
    for plan, spent in cost.victims.values():
        try:
            speed = clock.speed(plan)
        except AdvplugError as error:
            unknown.append(f"{plan.model.label} ({plan.defense_label}): {error}")
            continue
        # A backward pass comes with a forward one; what is left goes forward alone.
        alone = max(0, spent.forward - spent.backward) + spent.decisions
        passes += spent.backward * speed.attacked + alone * speed.decided
    return Timed(passes, sum(clock.trainings.values()), len(clock.trainings), tuple(dict.fromkeys(unknown)))


class _NotCached(Exception):  # noqa: N818 - a finding
    """The weights of this label would have to be trained."""


class _Cached(Artifacts):
    """The cache, which makes nothing."""

    def get_or_make(self, key: str, make: Callable[[], Artifact], label: str = "") -> Artifact:
        found = self._find(key)
        if found is None:
            raise _NotCached(label)
        return found


@dataclass
class _Clock:
    """Times victims, each once; `trainings` are seconds of those that are missing, by what is trained."""

    request: Request
    trainings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        artifacts = _Cached(self.request.cache) if self.request.cache else _Cached()
        self.builder = Builder(artifacts, self.request.device, self.request.offline, Silent())
        self._known: dict[str, Speed] = {}

    def speed(self, plan: VictimPlan) -> Speed:
        """Raises UsageError or CellFailure where the victim cannot be built."""
        seedless = str({**plan.recipe, "seed": None})
        try:
            # One image is enough to build it, and the timing repeats it.
            victim, y = self._of(plan)
        except _NotCached:
            victim, y = self._fresh(plan)
        if seedless not in self._known:
            self._known[seedless] = self._measure(plan, victim, y)
        if plan.model.value.schedule(plan.dataset.value.info()) is not None or plan.defense:
            self._count_trainings(plan, self._known[seedless])
        return self._known[seedless]

    def _of(self, plan: VictimPlan) -> tuple[Victim, torch.Tensor]:
        built = self.builder.build(plan, None)
        return built.victim, torch.from_numpy(built.split.labels[:1])

    def _fresh(self, plan: VictimPlan) -> tuple[Victim, torch.Tensor]:
        """With the weights that it begins with, and those of its wraps that need no data."""
        info: DatasetInfo = plan.dataset.value.info()
        if plan.model.caps.modality != "image":
            raise CellFailure("its weights are not cached, and it cannot be timed without them; train it once")
        model = plan.model.value.build(info, offline=self.request.offline).to(self.builder.device).eval()
        wraps = tuple(
            s for d in plan.defense for s in _stages(d) if isinstance(s, Wrap) and not isinstance(s, Calibrated)
        )
        victim = Victim(model, len(info.classes), wraps, self.builder.device, Stream(plan.seed, "calibrate"))
        return victim, torch.zeros(1, dtype=torch.int64)

    def _measure(self, plan: VictimPlan, victim: Victim, y: torch.Tensor) -> Speed:
        info: DatasetInfo = plan.dataset.value.info()
        n = max(1, min(self.request.batch_size, self.request.limit or info.evaluate or self.request.batch_size))
        victim.batch_size = n
        x = torch.rand((n, info.channels, *info.size), generator=torch.Generator().manual_seed(0)).to(victim.device)
        batch = Batch(x, y.to(victim.device).repeat(n)[:n], torch.arange(n))
        attack = GradientAttack(steps=STEPS, keep_going=True)
        threat = Threat(Ball("linf", Fraction(1, 255)), Untargeted(), Access.GRADIENT)
        before = victim.passes.model
        attack(victim, batch, threat, Stream(0, "calibrate"))
        # As the runner counts: images that go through the module, of which a vote sends several.
        sent = max(1, victim.passes.model - before)
        seconds = _median(lambda: attack(victim, batch, threat, Stream(0, "calibrate")), victim.device)
        before = victim.passes.model
        with victim.frozen():
            victim.decide(x)
            asked = max(1, victim.passes.model - before)
            decided = _median(lambda: victim.decide(x), victim.device)
        attacked = seconds * (STEPS + 1) / STEPS / sent
        return Speed(attacked, decided / asked, self._training_step(plan, victim, x))

    def _training_step(self, plan: VictimPlan, victim: Victim, x: torch.Tensor) -> float:
        """Seconds an image, of a step that changes no weight."""
        schedule: Schedule | None = plan.model.value.schedule(plan.dataset.value.info())
        if schedule is None or victim.columns is not None:
            return 0.0
        size = min(len(x), int(schedule.batch_size))
        part, module = x[:size], victim.module

        def step() -> None:
            module.train()
            module(part).logsumexp(1).sum().backward()
            module.zero_grad(set_to_none=True)

        state = {name: value.clone() for name, value in module.state_dict().items()}
        try:
            step()
            return _median(step, victim.device) / size
        except Exception:  # a module that cannot be trained, frozen or of the user's own
            return 0.0
        finally:
            module.load_state_dict(state)
            module.eval()

    def _count_trainings(self, plan: VictimPlan, speed: Speed) -> None:
        """Notes what of this victim is not in the cache; a defense's epochs are told by its parameters."""
        info: DatasetInfo = plan.dataset.value.info()
        schedule: Schedule | None = plan.model.value.schedule(info)
        images = len(self.builder.dataset(plan.dataset).train) if info.trainable else 0
        instead = any("objective" in d.caps.stages for d in plan.defense)
        origin = getattr(plan.model.value, "origin", None)
        if origin is not None and not self._is_cached(plan.baseline):
            self._count_trainings(origin(), speed)
        if not self._is_cached(plan.baseline) and schedule is not None and not instead:
            self.trainings[plan.baseline.key] = schedule.epochs * images * speed.trained
        for number, bound in enumerate(plan.defense, 1):
            part = VictimPlan(plan.dataset, plan.model, plan.defense[:number], plan.seed)
            if set(bound.caps.stages) & {"objective", "tune"} and not self._is_cached(part):
                own = bound.params.get("epochs")
                epochs = own if isinstance(own, int) else schedule.epochs if schedule else EPOCHS
                self.trainings[part.key] = epochs * images * speed.trained * _times(bound)

    def _is_cached(self, plan: VictimPlan) -> bool:
        try:
            self.builder.build(plan, 1)
        except _NotCached:
            return False
        return True


def _stages(bound: Bound) -> Any:
    made = bound.make()
    return made if isinstance(made, tuple) else (made,)


def _times(bound: Bound) -> float:
    """Passes that a training step takes beside its own: the steps of the attack that it trains on."""
    attack = bound.params.get("attack")
    steps = bound.params.get("steps")
    if not isinstance(steps, int) and attack is not None:
        found = next((value for part in attack for key, value in part.params if key == "steps"), "10")
        steps = int(found) if str(found).isdecimal() else 10
    stages = [s for s in _stages(bound) if isinstance(s, Objective | Tune)]
    return 1.0 + (steps if isinstance(steps, int) and stages else 0)


def _median(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        clock = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - clock)
        if sum(seconds) > ENOUGH:
            break
    return statistics.median(seconds)
