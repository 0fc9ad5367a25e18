"""Batch norms folded into the convolutions before them: the same function in fewer operations, for attack passes only.

Every fold is compared with the module on a few images, answers and input gradients, before it is used.
"""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from advplug.victim import input_gradient

log = logging.getLogger(__name__)

NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d
}  # fmt: skip
"""The norm that can be folded into each kind of convolution; subclasses may do more, and are left alone."""
PROBED = 4
"""Images that a fold is compared on."""
CLOSE = 1e-3
"""The most that answers and gradients may differ, as a share of the largest of each; rounding stays well below."""

_FOLDED: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], nn.Module | None]] = weakref.WeakKeyDictionary()


def folded(module: nn.Module, x: Tensor) -> nn.Module | None:
    """`module` with its batch norms folded; None where there are none, or where the result would not be the same.

    `x` (B, C, H, W) are images to compare on. The module has to be in evaluation mode. What is returned holds copies of
    the weights, and is made anew after these have changed.
    """
    if not any(type(m) in NORMS.values() for m in module.modules()):
        return None
    state = _state(module)
    known = _FOLDED.get(module)
    if known is None or known[0] != state:
        known = state, _checked(module, x[:PROBED])
        _FOLDED[module] = known
    return known[1]


def last_fold(module: nn.Module) -> nn.Module | None:
    """What `folded` last made of `module`; None where the weights have changed since."""
    known = _FOLDED.get(module)
    return known[1] if known is not None and known[0] == _state(module) else None


def _state(module: nn.Module) -> tuple[int, ...]:
    """Changes with every change of a weight or a running mean, in place or by another tensor."""
    tensors = (*module.parameters(), *module.buffers())
    return tuple(number for t in tensors for number in (id(t), t._version))


def _checked(module: nn.Module, x: Tensor) -> nn.Module | None:
    try:
        made = _fold(module)
        if made is not None and _same(module, made, x):
            return made
    except Exception as error:  # code that cannot be traced: branches on values, functions of its own
        log.debug("batch norms stay as they are: %s", " ".join(str(error).split())[:200])
    return None


def _fold(module: nn.Module) -> nn.Module | None:
    """The traced module with each norm that follows one convolution, and nothing else, in that convolution."""
    if any(m.training or _hooked(m) for m in module.modules()):
        return None
    graph = fx.Tracer().trace(module)
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    pairs = [node for node in calls if _foldable(module, node, targets)]
    if not pairs:
        return None
    made = fx.GraphModule(copy.deepcopy(module), graph)
    for norm in pairs:
        before = norm.args[0]
        assert isinstance(before, fx.Node)
        conv: Any = made.get_submodule(str(before.target))
        own: Any = made.get_submodule(str(norm.target))
        made.set_submodule(str(before.target), fuse_conv_bn_eval(conv, own))
        norm.replace_all_uses_with(before)
        graph.erase_node(norm)
    made.delete_all_unused_submodules()
    made.recompile()
    return made.eval().requires_grad_(False)


def _hooked(module: nn.Module) -> bool:
    """Whether calls of it do more than its forward, which a trace would lose."""
    return any(getattr(module, name) for name in vars(module) if name.endswith("_hooks") and "state_dict" not in name)


def _foldable(module: nn.Module, norm: fx.Node, targets: list[str]) -> bool:
    before = norm.args[0] if len(norm.args) == 1 else None
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
        return False
    conv, own = module.get_submodule(str(before.target)), module.get_submodule(str(norm.target))
    kept = getattr(own, "running_mean", None) is not None
    once = targets.count(str(before.target)) == targets.count(str(norm.target)) == 1
    return kept and once and NORMS.get(type(conv)) is type(own)


def _same(module: nn.Module, made: nn.Module, x: Tensor) -> bool:
    """Whether both give the same answers and input gradients, up to rounding."""

    def seen(net: nn.Module) -> tuple[Tensor, Tensor]:
        point = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            answers = net(point)
            weights = torch.linspace(-1, 1, answers[0].numel(), device=x.device).view_as(answers[0])
            return answers.detach(), input_gradient((answers * weights).flatten(1).sum(1), point)

    for ours, theirs in zip(seen(made), seen(module), strict=True):
        if not bool((ours - theirs).abs().max() <= CLOSE * theirs.abs().max().clamp_min(1e-12)):
            return False
    return True
