"""A model with its wraps, as it is attacked and as it is judged; counts the images that pass through it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from advplug.contracts import Decision, Gradient, Wrap
from advplug.errors import CellFailure
from advplug.rng import Stream

_Part: TypeAlias = Callable[..., Tensor]
"""A wrap's function of (inner, x, generator)."""
_WEAKEST = (Gradient.EXACT, Gradient.BPDA, Gradient.NONE)


@dataclass
class Passes:
    """Images sent forward, and backward to the input; `model` are those that passed through the module itself, which a
    vote asks many times an image."""

    forward: int = 0
    backward: int = 0
    model: int = 0


@dataclass(frozen=True)
class Columns:
    """What the module's columns are, where they are texts.

    `group` (C,) int64 is the class that each text belongs to: a class is as likely as the likeliest of its texts.
    The module's logits are `scale` times cosines. `texts` are there for a gallery. `readable`: the deployed system's
    scores are the module's, so that similarities can be read off them.
    """

    group: Tensor
    scale: float
    classes: int
    texts: tuple[str, ...] = ()
    readable: bool = True

    def grouped(self, logits: Tensor) -> Tensor:
        """(B, C) to (B, K)."""
        if len(self.group) == self.classes:
            return logits
        least = logits.new_full((logits.shape[0], self.classes), -float("inf"))
        return least.scatter_reduce(1, self.group.expand_as(logits), logits, "amax")

    def own(self, classes: Tensor) -> Tensor:
        """(B, C) bool: which texts belong to each of these classes (B,)."""
        return self.group[None] == classes[:, None]

    def right(self, classes: Tensor) -> Tensor:
        """(B, C) bool: as `own`, and those of others that read the same."""
        numbers: dict[str, int] = {}
        same = torch.tensor([numbers.setdefault(t, len(numbers)) for t in self.texts], device=self.group.device)
        if not self.texts:
            return self.own(classes)
        says = torch.zeros(self.classes, len(numbers), dtype=torch.bool, device=self.group.device)
        says[self.group, same] = True
        return says[classes][:, same]

    def similarity(self, cosines: Tensor, classes: Tensor) -> Tensor:
        """(B,): the mean of each image's cosines (B, C) with the texts of the class (B,) given with it."""
        own = self.own(classes)
        return torch.where(own, cosines, 0).sum(1) / own.sum(1)


@dataclass
class Victim:
    """`module` maps pixels (B, C, H, W) in [0, 1] to logits (B, K); `wraps` stand around it, inside out.

    `attacked` is what an attacker differentiates: each wrap's declared stand-in number `view`, or the
    wrap itself where it is differentiable. `logits` and `decide` are the deployed system. Both draw
    fresh randomness on each call, from streams of their own. `run_attack_pass`, where the attack engine
    sets it, stands in for the module in attack passes (reduced precision, compiled). `batch_size` is the most
    images that should pass at once; an attack may be handed more and then splits them. `key` names what the victim
    was made from, where that is known. `columns` describe a module whose columns are texts; wraps and attackers then
    see one logit a class, `attacked_texts` and `cosines` one a text.
    """

    module: nn.Module
    classes: int
    wraps: tuple[Wrap, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stream: Stream = field(default_factory=lambda: Stream(0, "victim"))
    passes: Passes = field(default_factory=Passes)
    batch_dependent: bool = False
    batch_size: int = 128
    run_attack_pass: Callable[[Tensor], Tensor] | None = None
    key: str = ""
    columns: Columns | None = None

    def __post_init__(self) -> None:
        self._attack_noise = self.stream.generator("attack", device=self.device)
        self._decision_noise = self.stream.generator("decide", device=self.device)

    @property
    def gradient(self) -> Gradient:
        """How gradients pass: the weakest of the wraps."""
        return max((w.gradient for w in self.wraps), key=_WEAKEST.index, default=Gradient.EXACT)

    @property
    def stochastic(self) -> bool:
        return any(w.stochastic for w in self.wraps)

    @property
    def rejects(self) -> bool:
        """Whether it may refuse to answer."""
        return any(w.rejects for w in self.wraps)

    @property
    def draws(self) -> int:
        """How many samples an attacker has to draw for a gradient."""
        return max((w.draws for w in self.wraps if w.stochastic), default=1)

    @property
    def decisions(self) -> int:
        """How many times an image is decided afresh: once where nothing is drawn."""
        return max((w.decisions for w in self.wraps if w.stochastic), default=1)

    @property
    def views(self) -> int:
        """How many differentiable stand-ins there are to attack; they combine index by index."""
        return max((len(w.surrogates) for w in self.wraps), default=1) or 1

    @property
    def bare(self) -> Victim:
        """The same weights without the wraps."""
        return replace(self, wraps=())

    def reseed(self, *names: object) -> None:
        """Starts the victim's randomness anew: what it draws next depends on the run's seed and `names` only."""
        self._attack_noise = self.stream.generator("attack", *names, device=self.device)
        self._decision_noise = self.stream.generator("decide", *names, device=self.device)

    def attacked(self, x: Tensor, view: int = 0) -> Tensor:
        """Differentiable logits (B, K) as the attacker sees them."""
        self.passes.forward += len(x)
        return _chain(self._counted(self.run_attack_pass), self._views(view), self._attack_noise)(x)

    def attacked_detector(self, x: Tensor, view: int = 0) -> tuple[Tensor, Tensor | None]:
        """`attacked`, and how clearly the detector rejects, differentiable (B,); None where there is none."""
        self.passes.forward += len(x)
        return self._detected(x, self._counted(self.run_attack_pass), self._views(view), self._attack_noise)

    def attacked_texts(self, x: Tensor, view: int = 0) -> tuple[Tensor, Tensor | None]:
        """As `attacked_detector`, with a logit for each text (B, C)."""
        self.passes.forward += len(x)
        model = self._counted(self.run_attack_pass, texts=True)
        return self._detected(x, model, self._views(view), self._attack_noise)

    @torch.no_grad()
    def cosines(self, x: Tensor) -> Tensor:
        """The deployed system's cosines (B, C) of images and texts, in float32. Raises CellFailure without texts."""
        if self.columns is None:
            raise CellFailure("similarities are of images and texts; use a CLIP model")
        self.passes.forward += len(x)
        with full_float32(self.device):
            logits = _chain(self._counted(texts=True), [w.forward for w in self.wraps], self._decision_noise)(x)
        return logits / self.columns.scale

    def _counted(
        self, stand_in: Callable[[Tensor], Tensor] | None = None, texts: bool = False
    ) -> Callable[[Tensor], Tensor]:
        model, columns = stand_in or self.module, None if texts else self.columns

        def call(x: Tensor) -> Tensor:
            self.passes.model += len(x)
            logits = model(x)
            return logits if columns is None else columns.grouped(logits)

        return call

    def _views(self, view: int) -> list[_Part]:
        return [w.surrogates[min(view, len(w.surrogates) - 1)] if w.surrogates else w.forward for w in self.wraps]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The deployed system's logits (B, K), in float32 (float64 for float64 input)."""
        self.passes.forward += len(x)
        with full_float32(self.device):
            return _chain(self._counted(), [w.forward for w in self.wraps], self._decision_noise)(x)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """What the deployed system answers; NaN scores answer -1, which is never right."""
        self.passes.forward += len(x)
        with full_float32(self.device):
            parts = [w.forward for w in self.wraps]
            scores, rejection = self._detected(x, self._counted(), parts, self._decision_noise)
        label = scores.argmax(1)
        label = torch.where(scores.isfinite().all(1), label, torch.full_like(label, -1))
        accepted = torch.ones_like(label, dtype=torch.bool) if rejection is None else ~(rejection > 0)
        for wrap in self.wraps:
            if wrap.accepts is not None:
                accepted &= wrap.accepts(x, scores)
        return Decision(label, accepted, scores)

    def deployed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The deployed system's logits (B, K), and how clearly its detector rejects (B,), None where there is none.

        As in `decide`, but uncounted and differentiable where its parts are; tracing it gives a graph of the system.
        """
        columns = self.columns
        model = self.module if columns is None else lambda pixels: columns.grouped(self.module(pixels))
        return self._detected(x, model, [w.forward for w in self.wraps], self._decision_noise)

    def _detected(
        self, x: Tensor, model: Callable[[Tensor], Tensor], parts: Sequence[_Part], noise: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Logits through `parts`, and what the detector among the wraps says of the images that reach it."""
        seen: list[Tensor] = []
        watched = [
            part if wrap.rejection is None else _watched(part, wrap.rejection, seen)
            for part, wrap in zip(parts, self.wraps, strict=True)
        ]
        logits = _chain(model, watched, noise)(x)
        if not any(w.rejection for w in self.wraps):
            return logits, None
        # Not len(), which tracing would take for a constant.
        if len(seen) != 1 or seen[0].shape[0] != x.shape[0]:
            raise CellFailure("a defense asks the detector inside it several times an image; write the detector last")
        return logits, seen[0]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no parameter gradients inside; every module's mode and flag as before afterwards."""
        modes = [(m, m.training) for m in self.module.modules()]
        flags = [(p, p.requires_grad) for p in self.module.parameters()]
        try:
            self.module.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def rounds_convolutions(device: torch.device) -> bool:
    """Whether float32 convolutions may run in TF32 on this device, with 10 bits in place of 23."""
    return device.type == "cuda" and bool(torch.backends.cudnn.allow_tf32)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Decisions are float32: cuDNN would round convolutions to TF32's 10 bits."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


PASS_COST = 8
"""What a pass costs beside its images, in images: about 3 for a ResNet-20 on a CPU, 29 for a net of four layers."""


@functools.cache
def cover(n: int, most: int) -> tuple[tuple[int, int], ...]:
    """(images, batch size) of the passes that `n` images make, the cheapest there are; the last may be filled up.

    Kernels are prepared and kept for each size, several megabytes a network and size, so sizes are few: `most`, its
    halves, and three quarters of these.
    """
    if n <= 0:
        return ()
    if n >= most:
        return ((most, most), *cover(n - most, most))
    ways: list[tuple[tuple[int, int], ...]] = []
    for size in _sizes(most):
        if size >= n:
            ways.append(((n, size),))
        else:
            ways.append(((size, size), *cover(n - size, most)))
    return min(ways, key=lambda way: sum(size + PASS_COST for _, size in way))


def span(n: int, most: int) -> int:
    """How many images the passes of `cover` hold together, those that only fill up the last one included."""
    return sum(size for _, size in cover(n, most))


def _sizes(most: int) -> list[int]:
    halves = [most >> k for k in range(most.bit_length())]
    return sorted({*halves, *(3 * size // 4 for size in halves if size >= 8)}, reverse=True)


def parts_of(victim: Victim, n: int, most: int | None = None) -> Iterator[tuple[Tensor, int]]:
    """Passes of `n` images: the rows of each, on the CPU, and how many of them count, the others being repeats.

    Without repeats where an answer depends on the rest of the batch, or is drawn. `most` is `victim.batch_size`
    unless given.
    """
    alone, most = victim.stochastic or victim.batch_dependent, most or victim.batch_size
    begin = 0
    for count, size in ((min(most, n - at), 0) for at in range(0, n, most)) if alone else cover(n, most):
        rows = torch.arange(begin, begin + count)
        yield (rows[torch.arange(size) % count] if size > count else rows), count
        begin += count


def decide_padded(victim: Victim, x: Tensor, most: int | None = None) -> Decision:
    """The victim's answers to images (B, C, H, W), in batches of few sizes (`parts_of`)."""
    made = []
    for rows, count in parts_of(victim, len(x), most):
        whole = x if len(rows) == len(x) and count == len(x) else x[rows.to(x.device)]
        answer = victim.decide(whole)
        scores = None if answer.scores is None else answer.scores[:count]
        made.append(Decision(answer.label[:count], answer.accepted[:count], scores))
    if len(made) == 1:
        return made[0]
    if not made:
        return victim.decide(x)
    scores = None if made[0].scores is None else torch.cat([m.scores for m in made if m.scores is not None])
    return Decision(torch.cat([m.label for m in made]), torch.cat([m.accepted for m in made]), scores)


def input_gradient(loss: Tensor, point: Tensor) -> Tensor:
    """The gradient of the summed `loss` at `point`; zero, and so seen to vanish, where the model cut the graph."""
    if not loss.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(loss.sum(), point, allow_unused=True)
    return torch.zeros_like(point) if gradient is None else gradient


def _watched(part: _Part, rejection: _Part, seen: list[Tensor]) -> _Part:
    """`part`, noting what `rejection` says of its images; what both ask of the model inside is asked once."""

    def call(inner: Callable[[Tensor], Tensor], x: Tensor, noise: torch.Generator) -> Tensor:
        known: list[tuple[Tensor, Tensor]] = []

        def once(asked: Tensor) -> Tensor:
            if not known or known[0][0] is not asked:
                known[:] = [(asked, inner(asked))]
            return known[0][1]

        logits = part(once, x, noise)
        seen.append(rejection(once, x, noise))
        return logits

    return call


def _chain(
    model: Callable[[Tensor], Tensor], parts: Sequence[_Part], noise: torch.Generator
) -> Callable[[Tensor], Tensor]:
    def around(inner: Callable[[Tensor], Tensor], part: _Part) -> Callable[[Tensor], Tensor]:
        return lambda x: part(inner, x, noise)

    for part in parts:
        model = around(model, part)
    return model
