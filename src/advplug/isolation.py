"""Around a call of somebody else's code: modes, gradients, flags and random states come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from advplug.rng import Stream


@contextmanager
def isolated(module: nn.Module, stream: Stream) -> Iterator[None]:
    """Restores module modes, parameter gradients and flags, default dtype, autograd mode and global random states.

    Inside, the global generators are seeded from `stream`, so that libraries that use them are reproducible.
    """
    modes = [(m, m.training) for m in module.modules()]
    state = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    for parameter, _, _ in state:
        parameter.grad = None  # out of reach: a library's zero_grad would overwrite it in place
    dtype = torch.get_default_dtype()
    enabled = torch.is_grad_enabled()
    deterministic = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        with stream.as_global("global"), torch.enable_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter, flag, grad in state:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(enabled)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic
