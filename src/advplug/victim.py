"""A model with its wraps, as it is attacked and as it is judged; counts the images that pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from advplug.contracts import Decision, Gradient, Wrap
from advplug.rng import Stream

_WEAKEST = (Gradient.EXACT, Gradient.BPDA, Gradient.NONE)


@dataclass
class Passes:
    """Images sent forward, and backward to the input."""

    forward: int = 0
    backward: int = 0


@dataclass
class Victim:
    """`module` maps pixels (B, C, H, W) in [0, 1] to logits (B, K); `wraps` stand around it, inside out.

    `attacked` is what an attacker differentiates: each wrap's declared stand-in number `view`, or the
    wrap itself where it is differentiable. `logits` and `decide` are the deployed system. Both draw
    fresh randomness on each call, from streams of their own. `run_attack_pass`, where the attack engine
    sets it, stands in for the module in attack passes (reduced precision, compiled). `batch_size` is the most
    images that should pass at once; an attack may be handed more and then splits them. `key` names what the victim
    was made from, where that is known.
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
    def draws(self) -> int:
        """How many samples an attacker has to average over."""
        return max((w.draws for w in self.wraps if w.stochastic), default=1)

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
        parts: list[Callable[..., Tensor]] = [
            w.surrogates[min(view, len(w.surrogates) - 1)] if w.surrogates else w.forward for w in self.wraps
        ]
        return _chain(self.run_attack_pass or self.module, parts, self._attack_noise)(x)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The deployed system's logits (B, K), in float32 (float64 for float64 input)."""
        self.passes.forward += len(x)
        with _full_float32(self.device):
            return _chain(self.module, [w.forward for w in self.wraps], self._decision_noise)(x)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """What the deployed system answers; NaN scores answer -1, which is never right."""
        scores = self.logits(x)
        label = scores.argmax(1)
        label = torch.where(scores.isfinite().all(1), label, torch.full_like(label, -1))
        accepted = torch.ones_like(label, dtype=torch.bool)
        for wrap in self.wraps:
            if wrap.accepts is not None:
                accepted &= wrap.accepts(x, scores)
        return Decision(label, accepted, scores)

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


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
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


def common_size(n: int, most: int) -> int:
    """`n` images or a few more: `most`, or one of its halves down to a thirty-second.

    Kernels are prepared and kept for each size, several megabytes a network and size, so sizes are few.
    """
    size = most
    while size // 2 >= max(n, most // 32, 1):
        size //= 2
    return max(n, size)


def common_parts(n: int, most: int) -> list[tuple[int, int]]:
    """(images, batch size) of the passes that `n` images make: a few full batches of common sizes.

    One large batch where it is nearly full, otherwise its halves: filling up 100 images to 128 would cost a quarter.
    """
    parts, size = [], most
    while n > 0:
        nearly = size * 7 // 8 if size > most // 4 else size // 2
        if n >= nearly or size <= max(most // 32, 1):
            parts.append((min(n, size), size))
            n -= min(n, size)
        else:
            size //= 2
    return parts


def decide_padded(victim: Victim, x: Tensor, most: int) -> Decision:
    """The victim's answers; where nothing depends on the rest of the batch, it is filled up with repeats."""
    n = len(x)
    size = n if victim.stochastic or victim.batch_dependent else common_size(n, most)
    if size <= n:
        return victim.decide(x)
    made = victim.decide(x[torch.arange(size, device=x.device) % n])
    scores = None if made.scores is None else made.scores[:n]
    return Decision(made.label[:n], made.accepted[:n], scores)


def input_gradient(loss: Tensor, point: Tensor) -> Tensor:
    """The gradient of the summed `loss` at `point`; zero, and so seen to vanish, where the model cut the graph."""
    if not loss.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(loss.sum(), point, allow_unused=True)
    return torch.zeros_like(point) if gradient is None else gradient


def _chain(
    model: Callable[[Tensor], Tensor], parts: Sequence[Callable[..., Tensor]], noise: torch.Generator
) -> Callable[[Tensor], Tensor]:
    def around(inner: Callable[[Tensor], Tensor], part: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: part(inner, x, noise)

    for part in parts:
        model = around(model, part)
    return model
