"""Tables of what is registered beside attacks and defenses: datasets, models, metrics."""

from __future__ import annotations

from typing import Any

from advplug.contracts import DatasetInfo, MetricCaps
from advplug.errors import UsageError
from advplug.parse import parse_reference
from advplug.registry import Entry, Registry
from study_pages import table

ARCHITECTURE = "torchvision's architecture, built for the dataset and trained on it"


def datasets_markdown(known: Registry) -> str:
    """Each dataset with the images, the usual evaluation and the budgets of its default parameters."""
    head = ("dataset", "from", "what it is", "image", "classes", "evaluated unless `-n` says", "customary budgets")
    return table(head, (_dataset(e) for e in known.entries("dataset")))


def _dataset(entry: Entry) -> list[str]:
    try:
        info: DatasetInfo | None = entry.make(entry.bind(parse_reference(entry.name))).info()
    except UsageError:  # it needs a file or a name
        info = None
    first = [f"`{entry.name}`", entry.source.distribution, entry.spec.summary]
    if info is None:
        return [*first, "yours", "yours", "", ""]
    image = f"{info.channels} x {info.size[0]} x {info.size[1]}"
    budgets = ", ".join(f"{norm} {eps}" for norm, eps in info.budgets.items())
    return [*first, image, str(len(info.classes)), f"{info.evaluate or info.images:,}", budgets]


def models_markdown(known: Registry) -> str:
    """Each model, torchvision's architectures in one row."""
    entries = [e for e in known.entries("model") if e.spec.summary != ARCHITECTURE]
    named = len(list(known.entries("model"))) - len(entries)
    rows = [[f"`{e.name}`", e.source.distribution, e.spec.summary] for e in entries]
    rows.append([f"`resnet18`, `vit_b_16` and {named - 2} more", "advplug", ARCHITECTURE])
    return table(("model", "from", "what it is"), rows)


def metrics_markdown(known: Registry) -> str:
    """Each metric with its values."""
    rows = []
    for entry in known.entries("metric"):
        caps: Any = entry.spec.caps
        assert isinstance(caps, MetricCaps)
        values = ", ".join(f"`{name}`" for name in caps.values)
        rows.append([f"`{entry.name}`", entry.source.distribution, entry.spec.summary, values])
    return table(("metric", "from", "what it is", "values"), rows)
