"""What attacks leave of the similarity of images and their own texts, beside the undefended model. Pure numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advplug.estimate import Estimate, mean
from advplug.evidence import Array
from advplug.health import Finding


@dataclass(frozen=True)
class Similarities:
    """Of one group: clean and lowest similarity of each image (n,), and the same of the undefended model, where it
    was attacked on the same images. `kept` are the lowest over the attacks that met both, `static` those of them under
    images crafted on the undefended model."""

    clean: Array
    lowest: Array
    kept: Array | None
    static: Array | None
    base_clean: Array | None
    base_lowest: Array | None

    @classmethod
    def of(
        cls, findings: Sequence[Finding], ours: Sequence[Finding], undefended: Sequence[Finding]
    ) -> Similarities | None:
        """None where no attack of the group has measured any; `ours` are those that met the `undefended` model, too."""
        clean, lowest = _clean_and_lowest(findings)
        if clean is None or lowest is None:
            return None
        kept = _clean_and_lowest(ours)[1]
        carried = [f.evidence.similarity(f.evidence.cosine_static) for f in ours]
        static = [s for s in carried if s is not None]
        base_clean, base_lowest = _clean_and_lowest(undefended)
        if base_clean is not None and len(base_clean) != len(clean):
            base_clean = base_lowest = None
        return cls(clean, lowest, kept, np.min(static, axis=0) if static else None, base_clean, base_lowest)

    @property
    def difference(self) -> Estimate | None:
        """Paired, to the undefended model."""
        return None if self.kept is None or self.base_lowest is None else mean(self.kept - self.base_lowest)

    def recovery(self, kept: Array | None) -> float | None:
        """(kept - undefended) / (undefended clean - undefended); None where the attacks took nothing."""
        if kept is None or self.base_clean is None or self.base_lowest is None:
            return None
        taken = float((self.base_clean - self.base_lowest).mean())
        return float((kept - self.base_lowest).mean()) / taken if taken > 0 else None

    def columns(self) -> dict[str, object]:
        """What a threat's row says of them."""
        return {
            "clean_similarity": mean(self.clean),
            "worst_case_similarity": mean(self.lowest),
            "recovery": self.recovery(self.kept),
            "static_recovery": self.recovery(self.static),
        }


def _clean_and_lowest(findings: Sequence[Finding]) -> tuple[Array | None, Array | None]:
    """Both (n,), the lowest by image over all attacks and places where they were crafted."""
    found = [s for f in findings for s in f.evidence.similarity_by_origin()]
    if not found:
        return None, None
    return findings[0].evidence.similarity(findings[0].evidence.cosine), np.asarray(np.min(found, axis=0))
