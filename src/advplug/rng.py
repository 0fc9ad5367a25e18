"""Seeded randomness: one stream a stage, one generator an image, so results do not depend on batches or order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """A named source of random numbers under a run's seed."""

    seed: int
    name: str = ""

    def child(self, *names: object) -> Stream:
        """A stream of its own for a part of the work."""
        return Stream(self.seed, "/".join([self.name, *map(str, names)]))

    def integer(self, *names: object) -> int:
        """A 63-bit number that depends on the seed, this stream and `names` only."""
        text = "/".join([str(self.seed), self.name, *map(str, names)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def generator(self, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator."""
        import torch

        return torch.Generator(device=device).manual_seed(self.integer(*names))

    def per_image(
        self, draw: Callable[[torch.Generator], Tensor], index: Tensor | Sequence[int], *names: object
    ) -> Tensor:
        """Stacks `draw(generator)` over images; each image's generator is seeded by its dataset index."""
        import torch

        base = self.integer(*names)
        generator = torch.Generator()
        rows = []
        for i in index.tolist() if isinstance(index, torch.Tensor) else index:
            # An odd multiplier permutes the 63-bit seeds: two images never share one.
            generator.manual_seed((base + i * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF)
            rows.append(draw(generator))
        return torch.stack(rows)

    @contextmanager
    def as_global(self, *names: object) -> Iterator[None]:
        """Seeds the global generators inside the block and restores them after it (Python's, NumPy's, torch's)."""
        import random

        import numpy as np
        import torch

        state, numpy_state = random.getstate(), np.random.get_state()
        seed = self.integer(*names)
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
