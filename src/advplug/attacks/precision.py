"""How attack passes run: float32 or bfloat16 autocast, contiguous or channels-last, batch norms folded or not, eager or
compiled.

Nothing is assumed: a short timing of one forward pass with its input gradient decides, once a module.
bfloat16 is several times faster for convolutional nets on CPUs that have it, and several times slower
for some transformers on the same CPUs.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from advplug.attacks.folding import folded, last_fold
from advplug.victim import input_gradient

log = logging.getLogger(__name__)

Runner = Callable[[Tensor], Tensor]

CALIBRATION_SECONDS = 1.0
"""The most that timing may take, a module and image shape."""
WORTH_SECONDS = 10.0
"""Planned float32 work below this is done as it is: timing would cost more than it saves."""
WORTH_SHARE = 0.05
"""The most that timing may take of the planned work, which early leaving makes several times shorter."""
COMPILE_AFTER = 300.0
"""Seconds spent on one module after which compiling, a minute's work or more, is tried: whoever has paid
that much is likely to go on, and at worst pays a third more."""
SMALLEST_COMPILED = 16
"""Below this many images a compiled pass would be compiled anew; the module itself runs them."""
GAIN, GAIN_REDUCED, GAIN_COMPILED = 1.1, 1.4, 1.15
"""How many times as fast a way must be; bfloat16 has to make up for its float32 re-checks and last steps."""


@dataclass(frozen=True)
class Mode:
    """One way to run attack passes; the default is the module as it is."""

    bfloat16: bool = False
    channels_last: bool = False
    folded: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        more = ("+folded" if self.folded else "") + ("+compiled" if self.compiled else "")
        return ("bf16+" if self.bfloat16 else "float32+") + layout + more


PLAIN = Mode()
CANDIDATES = (Mode(channels_last=True), Mode(bfloat16=True, channels_last=True), Mode(bfloat16=True))
"""Tried beside the module as it is; where batch norms can be folded they are, in each of these."""


@dataclass
class _Known:
    """One module at one image shape: seconds an image, the choice, work planned and done in seconds."""

    seconds: float | None = None
    mode: Mode | None = None
    planned: float = 0.0
    spent: float = 0.0
    tried_compiling: bool = False
    timings: dict[str, float] = field(default_factory=dict)


# A compiled pass holds on to its module, so only the latest one is kept.
_COMPILED: dict[int, Runner] = {}
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], _Known]] = weakref.WeakKeyDictionary()


def runner(module: nn.Module, mode: Mode) -> Runner | None:
    """What stands in for the module under `mode`; None for the module itself. The result is float32."""
    if mode == PLAIN:
        return None
    return _Pass(_stand_in(module, mode), mode)


def _stand_in(module: nn.Module, mode: Mode) -> nn.Module:
    found = last_fold(module) if mode.folded else None
    return module if found is None else found


@dataclass(frozen=True)
class _Pass:
    module: Runner
    mode: Mode
    compiled: Runner | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.mode.channels_last:
            # The kernels follow the layout of the images; the weights stay as they are.
            x = x.contiguous(memory_format=torch.channels_last)
        run = self.compiled if self.compiled is not None and len(x) >= SMALLEST_COMPILED else self.module
        if not self.mode.bfloat16:
            return run(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = run(x)
        return logits.float()


def choose(module: nn.Module, x: Tensor, passes: int) -> tuple[Mode, Runner | None]:
    """The fastest way to run `passes` images forward and backward through `module`, and its runner.

    `x` (B, C, H, W) is a batch of the size that will be used. The module must be in evaluation mode with
    frozen parameters (`Victim.frozen`). Float64 images or weights, other than 4-D input and little work
    give the module as it is.
    """
    floats = {p.dtype for p in module.parameters()} | {x.dtype}
    if floats != {torch.float32} or x.dim() != 4 or not len(x):
        return PLAIN, None
    known = _known(module, x)
    if known.seconds is None and passes < 16 * len(x[:8]):
        return PLAIN, None
    if known.seconds is None:
        known.seconds = _time(module, PLAIN, x[:8], repeats=1)
    known.planned += passes * known.seconds
    if known.planned < WORTH_SECONDS:
        return PLAIN, None
    if known.mode is None:
        known.mode = _calibrate(module, x, known)
        log.info("attack passes run as %s (%s)", known.mode, known.timings)
    elif known.mode.folded:
        folded(module, x)  # anew, where the weights have changed
    if known.spent > COMPILE_AFTER and not known.tried_compiling:
        known.tried_compiling = True
        _try_compile(module, x, known.mode, known.timings)
    stand_in = _stand_in(module, known.mode)
    if id(stand_in) in _COMPILED:
        mode = replace(known.mode, compiled=True)
        return mode, _Pass(stand_in, mode, _COMPILED[id(stand_in)])
    return known.mode, runner(module, known.mode)


def spent(module: nn.Module, x: Tensor, seconds: float) -> None:
    """Notes how long an attack's passes of images like `x` took: compiling is tried only where much is done."""
    _known(module, x).spent += seconds


def chosen(module: nn.Module) -> str:
    """How the module's attack passes run, where that was calibrated; otherwise `float32+contiguous`."""
    modes = {str(known.mode) for known in _KNOWN.get(module, {}).values() if known.mode is not None}
    return ", ".join(sorted(modes)) or str(PLAIN)


def _known(module: nn.Module, x: Tensor) -> _Known:
    return _KNOWN.setdefault(module, {}).setdefault((tuple(x.shape[1:]), str(x.device)), _Known())


def timings(module: nn.Module) -> dict[str, float]:
    """The seconds an image measured for each way, by name; empty where nothing was timed."""
    return {name: s for known in _KNOWN.get(module, {}).values() for name, s in known.timings.items()}


def _calibrate(module: nn.Module, x: Tensor, known: _Known) -> Mode:
    """Times the candidates on as many images as fit into the time allowed."""
    began = time.perf_counter()
    assert known.seconds is not None
    allowed = min(CALIBRATION_SECONDS, WORTH_SHARE * known.planned)
    fold = folded(module, x) is not None
    candidates = [replace(mode, folded=fold) for mode in ((PLAIN, *CANDIDATES) if fold else CANDIDATES)]
    # Three passes each of the plain way and the others, with half of the time in reserve.
    fits = int(0.5 * allowed / (3 * (1 + len(candidates)) * max(known.seconds, 1e-7)))
    probe = x[: max(1, min(fits, len(x)))]

    def left() -> float:
        return allowed - (time.perf_counter() - began)

    plain = _time(module, PLAIN, probe, repeats=2, warm=False)
    known.timings[str(PLAIN)] = plain
    best, best_seconds = PLAIN, plain
    for mode in candidates:
        slow = mode.bfloat16 and not mode.channels_last and _hopeless(known, mode, plain)
        if slow or left() < 3 * plain * len(probe):
            continue
        try:
            seconds = _time(module, mode, probe, repeats=2, limit=1.5 * plain * len(probe))
        except RuntimeError as error:  # a view that needs contiguous memory, an operator without bfloat16
            log.debug("%s cannot run: %s", mode, error)
            continue
        known.timings[str(mode)] = seconds
        rival = best_seconds / (GAIN_REDUCED / GAIN if mode.bfloat16 and not best.bfloat16 else 1.0)
        if plain / seconds >= (GAIN_REDUCED if mode.bfloat16 else GAIN) and seconds < rival:
            best, best_seconds = mode, seconds
    return best


def _hopeless(known: _Known, mode: Mode, plain: float) -> bool:
    """Whether bfloat16 in the other layout was so slow that this one need not be tried."""
    other = known.timings.get(str(replace(mode, channels_last=True)))
    return other is not None and other > plain


def _time(
    module: nn.Module, mode: Mode, x: Tensor, repeats: int, warm: bool = True, limit: float | None = None
) -> float:
    """Seconds an image of a forward pass with its input gradient: the fastest of `repeats`.

    After a first pass that takes longer than 3 x `limit` seconds, that pass is the answer.
    """
    run = runner(module, mode) or module
    taken = []
    for turn in range(repeats + warm):
        taken.append(_clock(run, x))
        if turn == 0 and limit is not None and taken[0] > 3 * limit:
            break
    return min(taken) / len(x)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _try_compile(module: nn.Module, x: Tensor, mode: Mode, timings: dict[str, float]) -> None:
    """Compiles for changing batch sizes and keeps the result where it works and is faster."""
    _quieten_compiler()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stand_in = _stand_in(module, mode)
            compiled: Runner = torch.compile(stand_in, dynamic=True)
            eager, swift = _Pass(stand_in, mode), _Pass(stand_in, mode, compiled)
            for rows in (x, x[: max(SMALLEST_COMPILED, len(x) // 2)], x):
                _clock(swift, rows)
            gain = min(_clock(eager, x) for _ in range(3)) / min(_clock(swift, x) for _ in range(3))
    except Exception as error:  # no compiler, no Python headers, an operator without a lowering
        log.info("not compiled: %s", " ".join(str(error).split())[:200])
        return
    timings["gain of compiling"] = gain
    log.info("compiled passes are %.2f times as fast", gain)
    if gain >= GAIN_COMPILED:
        _COMPILED.clear()
        _COMPILED[id(stand_in)] = compiled


def _quieten_compiler() -> None:
    """Advice to who writes a model on how it could be compiled whole is of no use to who attacks it."""
    if not log.isEnabledFor(logging.INFO):
        import torch._logging

        torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)  # type: ignore[attr-defined]


def _clock(run: Runner, x: Tensor) -> float:
    """Seconds of one forward pass with its input gradient."""
    started = _now(x.device)
    point = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        input_gradient(run(point), point)
    return _now(x.device) - started
