"""ONNX files: checked, looked into, and tidied for onnx2torch. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from advplug import weights
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError

Side = int | None
"""A dimension; None where any number fits."""


@dataclass(frozen=True)
class Shapes:
    """The image input (B, C, H, W) and the first output (B, K) as far as the file states them."""

    input: tuple[Side, ...]
    output: tuple[Side, ...] | None


def digest(path: Path) -> str:
    """The file's SHA-256. Weights kept in further files are not covered, and such files are refused."""
    return weights.sha256(weights.find(path))


def load(path: Path) -> Any:
    """The model of a file. Raises UsageError for a file that is missing, damaged, or refers to further files."""
    import onnx

    path = weights.find(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
            raise UsageError(
                f"{path} keeps its weights in further files; save it as one: onnx.save(onnx.load(...), FILE)"
            )
        onnx.checker.check_model(model, full_check=False)
    except UsageError:
        raise
    except Exception as error:  # protobuf and the checker raise many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is no ONNX model that can be read ({why}); export or fetch it again") from error
    return model


def shapes(path: Path) -> Shapes:
    """What goes in and comes out. Raises UsageError where that is not one batch of images."""
    path = weights.find(path)
    state = path.stat()
    return _shapes(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _shapes(path: Path, size: int, changed: int) -> Shapes:
    graph = load(path).graph
    held = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in held]
    if len(inputs) != 1 or not graph.output:
        names = ", ".join(i.name for i in inputs) or "none"
        raise UsageError(f"{path} has {len(inputs)} inputs ({names}); a classifier has one, images (B, C, H, W)")
    shape = _sides(inputs[0])
    if shape is None or len(shape) != 4:
        raise UsageError(f"{path} takes no images: its input is {shape or 'of unknown shape'}, not (B, C, H, W)")
    return Shapes(shape, _sides(graph.output[0]))


def _sides(value: Any) -> tuple[Side, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(int(d.dim_value) if d.dim_value > 0 else None for d in kind.shape.dim)


def misfit(
    path: Path, info: DatasetInfo, norm: tuple[tuple[float, ...], tuple[float, ...]]
) -> str | None:  # fmt: skip
    """Why a file's model cannot take that dataset, as far as it can be seen."""
    found, name = shapes(path), path.name
    _, channels, *size = found.input
    if channels not in (None, info.channels):
        if found.input[3] == info.channels:
            return f"{name} takes images (B, H, W, C); export it for (B, C, H, W)"
        return f"{name} takes images of {channels} channels, the dataset's have {info.channels}; use data that fits"
    if any(have not in (None, want) for have, want in zip(size, info.size, strict=True)):
        have, want = (" x ".join(str(s) if s else "any" for s in sides) for sides in (size, info.size))
        return f"{name} takes images of {have} px, the dataset's have {want}; use data that fits"
    classes = found.output[-1] if found.output else None
    if classes not in (None, len(info.classes)):
        return f"{name} tells {classes} classes apart, the dataset has {len(info.classes)}; use data that fits"
    for what, values in zip(("mean", "std"), norm, strict=True):
        if len(values) not in (1, info.channels):
            return f"{what} has {len(values)} numbers for {info.channels} channels; give one or {info.channels}"
    return None


def tidied(model: Any) -> tuple[Any, bool]:
    """A copy of the model as onnx2torch wants it, and whether a last softmax was taken off it.

    Equal tensors are stored once by some exporters, the others being Identity nodes of them, which onnx2torch does not
    look through where a layer needs its weights; nor does it know `allowzero`, which torch sets although its shapes
    hold no 0. Attacks want logits, so that probabilities are undone.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    bare = _without_softmax(graph)
    _without_allowzero(graph)
    held = {t.name for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    stands_for: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = stands_for.get(name, name)
        if node.op_type == "Identity" and node.input[0] in held and node.output[0] not in outputs:
            stands_for[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    if stands_for:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
    return made, bare


def _without_softmax(graph: Any) -> bool:
    """Makes the scores before a last softmax the output; whether there was one."""
    last = next((n for n in graph.node if graph.output[0].name in n.output), None)
    if last is None or last.op_type != "Softmax":
        return False
    producer = next((n for n in graph.node if last.input[0] in n.output), None)
    if producer is None or any(last.input[0] in n.input for n in graph.node if n is not last):
        return False
    producer.output[list(producer.output).index(last.input[0])] = last.output[0]
    graph.node.remove(last)
    return True


def _without_allowzero(graph: Any) -> None:
    """Takes the attribute off where it means nothing: batches of images leave no side of length 0."""
    from onnx import numpy_helper

    held = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        shape = held.get(node.input[1])
        if shape is not None and (numpy_helper.to_array(shape) == 0).any():
            continue
        kept = [a for a in node.attribute if a.name != "allowzero"]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
