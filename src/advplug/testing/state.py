"""Everything that somebody else's code may leave changed, before and after."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from advplug.testing.report import require


def fingerprint(module: nn.Module | None = None) -> dict[str, object]:
    """The process's random states and torch settings, and the module's weights, modes, flags and gradients."""
    found: dict[str, object] = {
        "the global random state of torch": bytes(torch.get_rng_state().numpy()),
        "the global random state of NumPy": repr(np.random.get_state(legacy=False)),
        "the global random state of Python": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's thread count": torch.get_num_threads(),
    }
    if module is None:
        return found
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return found | {
        "the model's weights": {k: v.detach().cpu().numpy().tobytes() for k, v in tensors.items()},
        "the model's train and eval modes": [m.training for m in module.modules()],
        "the parameters' requires_grad": [p.requires_grad for p in module.parameters()],
        "the parameters' gradients": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "the model's hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    }


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The names of what changed between two fingerprints."""
    return [name for name, value in before.items() if after[name] != value]


def demand_unchanged(changed: list[str]) -> None:
    """Raises Breach if anything is in the list."""
    require(not changed, f"it leaves changed: {', '.join(changed)}; advplug.isolation.isolated puts these back")


@contextmanager
def unchanged(module: nn.Module | None = None) -> Iterator[None]:
    """Raises Breach if what runs inside leaves the process or the module changed."""
    before = fingerprint(module)
    yield
    demand_unchanged(differences(before, fingerprint(module)))


def with_gradients(module: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> None:
    """Fills the parameters' gradients, so that an attack which clears or adds to them is noticed."""
    loss(module).backward()  # type: ignore[no-untyped-call]
