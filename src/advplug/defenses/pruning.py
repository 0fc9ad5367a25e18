"""Structured pruning: which filters go, what goes with them, and their physical removal.

A filter's score is the l1 norm of its weights (Li et al. 2016, arXiv 1608.08710). Channels that several
filters write together, across a residual sum for one, are scored by the sum and removed together. Which
layers are coupled comes from torch-pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advplug.errors import UsageError, did_you_mean

PREFERRED = "layer4"
"""The layer that is pruned unless one is named, where a model has it: a ResNet's last stage."""
PROBES = 4
"""Images on which removal is compared with masking."""
TOLERANCE = 1e-3
"""Largest difference of logits between removal and masking, as a share of the largest logit."""

_FILTERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELWISE = (*_FILTERS, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU)
_SHARED = {
    "LN": "layer norm",
    "GN": "group norm",
    "MHA": "attention",
    "PARAMETER": "tokens, positions or scales outside any layer",
    "OUTPUT": "the class scores",
}


@dataclass(frozen=True)
class Slice:
    """Channels `index` of one side ('in' or 'out') of the module called `name`."""

    name: str
    side: str
    index: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be removed together with those of other layers.

    `filters` are the convolutions that write them; `scores` (channels,) are l1 norms summed over writers;
    `blocks` is how many equal blocks must lose the same positions (grouped convolutions); `obstacle` says
    what else depends on the channels, where that forbids removal.
    """

    root: Any
    filters: tuple[str, ...]
    scores: Tensor
    blocks: int
    obstacle: str = ""


class Graph:
    """Which channels of a model depend on each other, traced with images x (B, C, H, W).

    The model itself is neither changed nor held. Raises UsageError where it cannot be traced.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        import torch_pruning as tp

        # On a copy: tracing needs evaluation mode and a gradient on every parameter.
        probe = _probe(model).requires_grad_(True)
        self._names = {module: name for name, module in probe.named_modules()}
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")  # on free parameters, which are reported here as obstacles
                self._graph = tp.DependencyGraph().build_dependency(probe, example_inputs=x.cpu())
                roots = self._graph.get_all_groups(root_module_types=_FILTERS)
                self.groups = tuple(self._group(found) for found in roots)
        except Exception as error:  # a tracer fails in any way on code it was not made for
            raise UsageError(
                f"prune: the channels of this network cannot be traced ({type(error).__name__} in torch-pruning), "
                "as where channels are shuffled; use an architecture like resnet18"
            ) from error

    def _group(self, found: Any) -> Group:
        root = found[0].dep.target.module
        scores = torch.zeros(len(found[0].idxs))
        filters, blocks, obstacle = [], 1, ""
        for item in found:
            module, kind = item.dep.target.module, item.dep.target.type.name
            if isinstance(module, _FILTERS) and kind != "DEPTHWISE_CONV":
                blocks = max(blocks, module.groups)
            if self._side(item.dep) == "out" and isinstance(module, (*_FILTERS, nn.Linear)):
                norms = module.weight.detach().float().abs().flatten(1).sum(1)
                scores.index_add_(0, torch.tensor(item.root_idxs), norms[item.idxs])
                filters += [self._names[module]] if isinstance(module, _FILTERS) else []
            elif kind in _SHARED or (module in self._names and not isinstance(module, _CHANNELWISE)):
                obstacle = obstacle or _SHARED.get(kind, type(module).__name__)
        return Group(root, tuple(filters), scores, blocks, obstacle)

    def _side(self, dep: Any) -> str:
        # Batch norm and depthwise convolutions have one side only, which counts as both.
        return "out" if self._graph.is_out_channel_pruning_fn(dep.handler) else "in"

    def removal(self, group: Group, ratio: float) -> tuple[Slice, ...]:
        """Every slice that goes when the lowest-scored share `ratio` of the group's channels goes.

        floor((1 - ratio) n) of n channels stay, at least one; among equal scores the first goes.
        """
        scores = group.scores.view(group.blocks, -1).sum(0)
        width = len(scores)
        gone = width - max(1, math.floor((1 - ratio) * width + 1e-9))
        lowest = scores.argsort(stable=True)[:gone]
        index = (lowest + width * torch.arange(group.blocks)[:, None]).flatten().sort().values
        if not len(index):
            return ()
        pruner = self._graph.get_pruner_of_module(group.root)
        items = self._graph.get_pruning_group(group.root, pruner.prune_out_channels, index.tolist())
        return tuple(
            Slice(self._names[item.dep.target.module], self._side(item.dep), tuple(sorted(item.idxs)))
            for item in items
            if isinstance(item.dep.target.module, _CHANNELWISE) and not _scalar(item.dep.target.module)
        )


def _scalar(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def shrink(
    model: nn.Module, x: Tensor, ratio: float, layers: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Removes the share `ratio` in [0, 1) of the filters of every convolution in `layers`, in place.

    `layers` are module names, without the wrapper's where that is unique; none means `layer4`, in models
    without one all convolutions that run after the feature map last shrank. x (B, C, H, W) are a few images
    to trace with. Returns the structure that `rebuild` takes, and facts: parameters and filters before and
    after, widths a layer, and `kept_whole`, chosen layers that had to stay as they are. The class
    scores are never touched. Raises UsageError for unknown names and where nothing can be removed.
    """
    chosen = _convolutions(model, x, layers)
    before = _parameters(model)
    facts = {"ratio": ratio, "layers": "+".join(layers) or (PREFERRED if _has_preferred(model) else "last stage")}
    structure: dict[str, Tensor] = {}
    whole: dict[str, str] = {}
    if ratio > 0:
        removals, whole = _removals(model, x, ratio, chosen)
        structure = _kept(model, [part for removal in removals for part in removal])
    widths = {
        short_name(model, name): [module.out_channels, len(structure[f"{name}:out"])]
        for name, module in model.named_modules()
        if isinstance(module, _FILTERS) and f"{name}:out" in structure
    }
    rebuild(model, structure)
    facts |= {
        "parameters_before": before,
        "parameters_after": _parameters(model),
        "filters_before": sum(old for old, _ in widths.values()),
        "filters_after": sum(new for _, new in widths.values()),
        "widths": widths,
        "kept_whole": {short_name(model, name): why for name, why in whole.items()},
    }
    return structure, facts


def rebuild(model: nn.Module, structure: Mapping[str, Tensor]) -> nn.Module:
    """Gives an unpruned model the pruned one's shapes, in place; weights of kept channels stay.

    `structure` maps 'NAME:out' and 'NAME:in' to the kept channels, int64 (kept,). Raises UsageError where
    it belongs to another model.
    """
    from torch_pruning import ops
    from torch_pruning.pruner.function import PrunerBox

    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    jobs = []
    for key, kept in structure.items():
        name, _, side = key.rpartition(":")
        if name not in modules:
            raise UsageError(f"a pruned model is stored that has a layer '{name}', this one has none")
        # All kinds first: a grouped convolution may look depthwise once one of its sides is cut.
        jobs.append((modules[name], PrunerBox[ops.module2type(modules[name])], side, kept))
    for module, pruner, side, kept in jobs:
        width = pruner.get_out_channels(module) if side == "out" else pruner.get_in_channels(module)
        gone = sorted(set(range(width)) - set(kept.tolist()))
        (pruner.prune_out_channels if side == "out" else pruner.prune_in_channels)(module, gone)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    return model


def short_name(model: nn.Module, name: str) -> str:
    """A module's name without the wrappers around the network."""
    prefix = _wrapper(model)
    return name[len(prefix) :] if name.startswith(prefix) else name


# --- which layers ----------------------------------------------------------------------------------


def _convolutions(model: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[str, ...]:
    found = [name for name, module in model.named_modules() if isinstance(module, _FILTERS)]
    if not found:
        raise UsageError("prune removes filters of convolutions, and this architecture has none; use one like resnet18")
    names = list(layers) or ([PREFERRED] if _has_preferred(model) else [])
    if not names:
        return _last_stage(model, x)
    inside = []
    for name in names:
        full = _resolve(model, name)
        members = [c for c in found if c == full or c.startswith(f"{full}.") or not full]
        if not members:
            raise UsageError(f"prune: '{name}' holds no convolution; these do: {_listing(model, found)}")
        inside += members
    return tuple(dict.fromkeys(inside))


def _has_preferred(model: nn.Module) -> bool:
    names = [n for n, _ in model.named_modules() if f".{n}".endswith(f".{PREFERRED}")]
    return bool(names) and any(isinstance(m, _FILTERS) for m in model.get_submodule(names[0]).modules())


def _resolve(model: nn.Module, name: str) -> str:
    """The full name of the module called `name`; the outermost one where several names end in it."""
    names: list[str] = [n for n, _ in model.named_modules() if n]
    if name in names:
        return name
    ending = [n for n in names if n.endswith(f".{name}")]
    if not ending:
        own = [n for n in names if n.startswith(_wrapper(model))]
        hint = did_you_mean(name, [short_name(model, n) for n in own]) or f"; its layers are {_listing(model, own)}"
        raise UsageError(f"prune: the model has no layer '{name}'{hint}")
    depth = min(n.count(".") for n in ending)
    outermost = [n for n in ending if n.count(".") == depth]
    if len(outermost) > 1:
        some = ", ".join(short_name(model, n) for n in outermost[:3]) + (", ..." if len(outermost) > 3 else "")
        raise UsageError(f"prune: '{name}' could be any of {some}; write more of the name")
    return outermost[0]


def _wrapper(model: nn.Module) -> str:
    """The prefix of the network's own names: down while a single child holds all parameters."""
    prefix, module = "", model
    while not list(module.parameters(recurse=False)):
        holders = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
        if len(holders) != 1 or not list(holders[0][1].children()):
            break
        prefix, module = f"{prefix}{holders[0][0]}.", holders[0][1]
    return prefix


def _listing(model: nn.Module, names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(short_name(model, n).partition(".")[0] for n in names))


def _last_stage(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The convolutions that run after the last one with a larger output than the final convolution has."""
    order: list[tuple[str, int]] = []
    probe = _probe(model)
    for name, module in probe.named_modules():
        if isinstance(module, _FILTERS):
            module.register_forward_hook(_recorder(order, name))
    with torch.no_grad():
        probe(x.cpu())
    final = order[-1][1]
    start = max((i + 1 for i, (_, area) in enumerate(order) if area > final), default=0)
    return tuple(dict.fromkeys(name for name, _ in order[start:]))


def _recorder(order: list[tuple[str, int]], name: str) -> Any:
    def record(module: nn.Module, inputs: object, output: Tensor) -> None:
        order.append((name, math.prod(output.shape[2:])))

    return record


# --- what goes -------------------------------------------------------------------------------------


def _removals(
    model: nn.Module, x: Tensor, ratio: float, chosen: Sequence[str]
) -> tuple[list[tuple[Slice, ...]], dict[str, str]]:
    """The slices of every group that a chosen convolution writes, and why other chosen ones stay whole."""
    graph = Graph(model, x)
    whole = dict.fromkeys(chosen, "it is not on the way to the class scores")
    planned: dict[Group, tuple[Slice, ...]] = {}
    for group in graph.groups:
        mine = [name for name in group.filters if name in chosen]
        removal = () if group.obstacle or not mine else graph.removal(group, ratio)
        if removal:
            planned[group] = removal
        else:
            why = f"its channels are shared with {group.obstacle}" if group.obstacle else "too few channels"
            whole |= dict.fromkeys(mine, why)
    if planned and not _sound(model, x, list(planned.values())):
        # One by one: in a network that reorders some channels, others can still be followed.
        bad = [group for group, removal in planned.items() if not _sound(model, x, [removal])]
        for group in bad or list(planned):
            del planned[group]
            whole |= dict.fromkeys((n for n in group.filters if n in chosen), "its channels are reordered on the way")
    cut = {part.name for removal in planned.values() for part in removal if part.side == "out"}
    whole = {name: why for name, why in whole.items() if name not in cut}
    if not planned:
        reasons = "; ".join(f"{short_name(model, name)}: {why}" for name, why in list(whole.items())[:3])
        others = _listing(model, (f for g in graph.groups if not g.obstacle for f in g.filters if f not in chosen))
        instead = f"layers that may be pruned: {others}" if others else "use an architecture like resnet18"
        raise UsageError(f"prune: no filter can be removed ({reasons}); {instead}")
    return list(planned.values()), whole


def _kept(model: nn.Module, removed: Iterable[Slice]) -> dict[str, Tensor]:
    gone: dict[tuple[str, str], set[int]] = {}
    for part in removed:
        gone.setdefault((part.name, part.side), set()).update(part.index)
    structure = {}
    for (name, side), index in gone.items():
        width = _width(model.get_submodule(name), side)
        structure[f"{name}:{side}"] = torch.tensor([i for i in range(width) if i not in index])
    return structure


def _width(module: nn.Module, side: str) -> int:
    names = (f"{side}_channels", f"{side}_features", "num_features", "num_parameters")
    return next(int(getattr(module, name)) for name in names if hasattr(module, name))


def _sound(model: nn.Module, x: Tensor, removals: Sequence[Sequence[Slice]]) -> bool:
    """Whether removing channels gives the logits of the whole model whose readers ignore those channels.

    It does not where the tracer lost track of channels, so that what is left is wired wrongly.
    """
    parts = [part for removal in removals for part in removal]
    small, masked = _probe(model), _probe(model)
    for part in parts:
        _ignore(masked.get_submodule(part.name), part)
    rebuild(small, _kept(model, parts))
    with torch.no_grad():
        wanted = masked(x.cpu())
        try:
            got = small(x.cpu())
        except Exception:  # shapes that do not fit; what a network's own code raises then is its affair
            return False
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _probe(model: nn.Module) -> nn.Module:
    # On the CPU, where a float32 product has the precision of float32.
    return copy.deepcopy(model).cpu().eval()


def _ignore(module: nn.Module, part: Slice) -> None:
    if part.side == "out" or not isinstance(module, (*_FILTERS, nn.Linear)):
        return
    weight = module.weight.data
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    seen = torch.ones(weight.shape[1] * groups, device=weight.device)
    seen[list(part.index)] = 0
    seen = seen.view(groups, 1, -1).expand(groups, len(weight) // groups, -1).reshape(len(weight), -1)
    weight *= seen.view(*seen.shape, *(1,) * (weight.ndim - 2)).to(weight.dtype)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
