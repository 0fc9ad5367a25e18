"""What is registered."""

from __future__ import annotations

from advplug.contracts import ModelCaps, Spec


def _spec(name: str, summary: str, paper: str = "") -> Spec:
    return Spec(name, f"advplug_hub.models:{name}", ModelCaps(), summary, paper)


MODELS: list[Spec] = [
    _spec("timm", "any classifier of timm: NAME is trained, NAME@TAG has weights, NAME#weights=FILE your own"),
    _spec("hf", "a classifier in timm's format on the Hugging Face hub: ORG/REPO@REVISION"),
    _spec("robustbench", "an entry of RobustBench's CIFAR-10 leaderboards, beside its published figures",
          "Croce et al. 2021, arXiv 2010.09670"),
    _spec("onnx", "a classifier in an ONNX file, differentiable: FILE"),
]  # fmt: skip
