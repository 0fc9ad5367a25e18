"""torchvision, imported so that it also works beside a torch build without CUDA."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

log = logging.getLogger("advplug")

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MISSING = "operator torchvision::nms does not exist"
_library: Any = None  # holds the two schemas: dropping it would unregister them


def import_torchvision() -> ModuleType:
    """The torchvision module; call this before timm, open_clip, torchmetrics, lpips, piq or onnx2torch are imported.

    torchvision's wheels on PyPI are built for CUDA; where their compiled operators do not load, the
    import stops at two registrations. Only then the schemas of these two (`nms`, `qnms`) are defined and
    the import is tried again: models, transforms and datasets work, detection operators and the codecs
    of torchvision.io do not. Healthy installations are untouched. Raises whatever else the import raises.
    """
    global _library
    loaded = sys.modules.get("torchvision")
    if loaded is not None:
        return loaded
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    import torch

    # What the failed attempt left behind would be taken for the real thing.
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            _library.define(operator + _SCHEMA)
    module = importlib.import_module("torchvision")
    log.info(
        "torchvision's compiled operators do not load beside this torch build: models, transforms and datasets "
        "work, detection operators and torchvision.io codecs do not"
    )
    return module


def state() -> str:
    """`ok`, `repaired` (works without its compiled operators), or why it cannot be imported. Imports torch."""
    try:
        import_torchvision()
    except Exception as error:  # an extension module may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "ok" if _library is None else "repaired"
