"""RobustBench's entries built: own networks, filled from the published files without running code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advplug import weights
from advplug.builtin import nets
from advplug.errors import UsageError
from advplug_hub import fetch, lock
from advplug_hub.networks import network
from advplug_hub.published import CIFAR_MEAN, CIFAR_STD, Entry

IGNORED = ("mu", "sigma", "mean", "std", "sub_block1.")
"""What some files hold beside the weights: the normalisation, which the table gives, and a stage that is never used."""
PREFIXES = ("module.", "model.")


def build(entry: Entry, file: Path | None, url: str | None, sha256: str | None, offline: bool) -> nn.Module:
    """The network of an entry with its weights, from pixels (B, 3, 32, 32) in [0, 1] to logits (B, 10).

    Its `notes` tell the published figures. Raises UsageError where the weights are not at hand or do not fit.
    """
    name = f"robustbench:{entry.name}"
    path = file
    if path is None:
        path = fetch.from_address(url or entry.url, place(entry), name, offline, sha256)
    else:
        lock.demand(path.expanduser(), sha256)
    with torch.device("meta"):
        net = network(entry.family, entry.depth, entry.width)
    net = net.to_empty(device="cpu")
    weights.fill(net, _state(path), path, ignore=IGNORED)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d) and part.num_batches_tracked is not None:
            part.num_batches_tracked.zero_()  # not every file has it, and evaluation has no use for it
    mean, std = (CIFAR_MEAN, CIFAR_STD) if entry.scaled else ((0.0,), (1.0,))
    model: Any = nets.classifier(net, mean, std)
    model.notes = (entry.told,)
    made: nn.Module = model
    return made


def place(entry: Entry) -> Path:
    """Where an entry's file is kept."""
    return lock.folder() / "robustbench" / f"{entry.name}-{entry.norm}.pt"


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors, from the top level or the entry `state_dict`, without what parallel training puts before names."""
    try:
        state = weights.load(path)
    except UsageError as error:
        if "key=state_dict" not in str(error):
            raise
        state = weights.load(path, "state_dict")
    for prefix in PREFIXES:
        state = {n.removeprefix(prefix): v for n, v in state.items()}
    return state
