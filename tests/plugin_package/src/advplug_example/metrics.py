"""A metric: robust accuracy of the class that suffers most."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from advplug.estimate import Estimate, rate
from advplug.evidence import Evidence, worst_case


def weakest_class() -> Callable[[Evidence], Mapping[str, Estimate | None]]:
    def measure(evidence: Evidence) -> Mapping[str, Estimate | None]:
        robust = worst_case(evidence.robust_by_origin()).mean(axis=1)
        classes = [robust[evidence.y == label] for label in np.unique(evidence.y)]
        rates = [r for c in classes if (r := rate(float(c.sum()), len(c))) is not None]
        return {"weakest_class_accuracy": min(rates, key=lambda r: r.value, default=None)}

    return measure
