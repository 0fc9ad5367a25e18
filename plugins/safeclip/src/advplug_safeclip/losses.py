"""What is lowered: contrastive losses within a modality and across, and pools of features to find neighbours in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def contrast(queries: Tensor, keys: Tensor, logit_scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Cross-entropy of telling each query's own key (both (B, D), of unit length) from the others, a scalar.

    InfoNCE (van den Oord et al. 2018): ln B where all features are the same. `logit_scale` is the logarithm of the
    scale. Keys that are the `same` (B, B) as the own one are no wrong answers and are left out.
    """
    logits = logit_scale.exp() * queries @ keys.T
    own = torch.arange(len(queries), device=queries.device)
    if same is not None:
        others = same & ~torch.eye(len(queries), dtype=torch.bool, device=queries.device)
        logits = logits.masked_fill(others, -math.inf)
    return functional.cross_entropy(logits, own)


@dataclass
class Pool:
    """The last `size` features that were put in, oldest first out; 0: none, and features are their own neighbours."""

    size: int
    features: Tensor | None = None

    def put(self, features: Tensor) -> None:
        """Adds features (B, D), without their gradients."""
        if not self.size:
            return
        fresh = features.detach()
        held = fresh if self.features is None else torch.cat([self.features, fresh])
        self.features = held[-self.size :]

    def nearest(self, features: Tensor) -> Tensor:
        """For each of the unit features (B, D) the one in the pool with the largest cosine, (B, D); itself where the
        pool is empty."""
        if self.features is None:
            return features
        with torch.no_grad():
            return self.features[(features @ self.features.T).argmax(1)]
