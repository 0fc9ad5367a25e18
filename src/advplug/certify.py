"""Proves the answers of a built victim, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from advplug.allocator import release_freed_memory
from advplug.build import Built
from advplug.certificates import Proofs
from advplug.contracts import Certified, Certifier
from advplug.decisions import CHUNK, Batching
from advplug.errors import AdvplugError, CellFailure
from advplug.victim import Victim


@dataclass(frozen=True)
class Proven:
    """The proofs, and how many images were sent through the model for them."""

    proofs: Proofs
    passes: int


def prove(built: Built, batching: Batching, progress: Callable[[int], None] = lambda _: None) -> Proven:
    """Certifies every evaluated image by the outermost wrap of the victim.

    The draws of an image depend on the run's seed and on the image's position in the dataset only, and are none of
    those that decide or attack. Raises CellFailure where the model or the wrap raises.
    """
    victim = built.victim
    certifier = victim.wraps[-1].certifier if victim.wraps else None
    if certifier is None:
        raise CellFailure("its defense declares certificates and has none")
    inside = replace(victim, wraps=victim.wraps[:-1])
    before = victim.passes.forward
    found: list[Certified] = []
    with victim.frozen():
        for batch in built.split.batches(CHUNK, victim.device):
            for image, index in zip(batch.x, batch.index.tolist(), strict=True):
                found.append(_prove(inside, certifier, image, index, batching))
                progress(1)
            release_freed_memory()
    proofs = Proofs(
        index=np.asarray(built.split.index),
        y=np.asarray(built.split.labels),
        label=np.array([made.label for made in found], dtype=np.int64),
        radius=np.array([made.radius for made in found], dtype=np.float64),
        error=certifier.error,
        radii=np.array(certifier.radii, dtype=np.float64),
    )
    return Proven(proofs, victim.passes.forward - before)


def _prove(inside: Victim, certifier: Certifier, image: Tensor, index: int, batching: Batching) -> Certified:
    stream = inside.stream.child("certify", index)

    def work(size: int) -> Certified:
        inside.reseed("certify", index)
        return certifier.certify(inside.logits, image, stream.generator(device=inside.device), size)

    try:
        return batching.run(work)
    except AdvplugError:
        raise
    except Exception as error:  # the model may be the user's own
        raise CellFailure(f"the model raised {type(error).__name__}: {' '.join(str(error).split())}") from error
