"""Runs packs: loads a graph, checks it against what was recorded, answers images."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from advplug.builtin.dataset_files import read_rgb, square
from advplug.errors import GateError, UsageError
from advplug.packs.manifest import GRAPH, INPUT, ONNX, OUTPUTS, RECORDED, Manifest, opened

TOLERANCE = 1e-4
"""By how much probabilities may differ: machines add in other orders. Where the two best are nearer, labels may too."""
_CODE = ("data/aotinductor/", "data/constants/custom_obj", "data/constants/opaque_obj")
"""Parts that an archive of torch.export may have and ours never do: compiled code and pickles."""


@dataclass(frozen=True)
class Answers:
    """What the system says of B images: label (B,), probabilities (B, K), accepted (B,) bool."""

    label: Tensor
    probabilities: Tensor
    accepted: Tensor

    def named(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).contiguous() for name in OUTPUTS}

    def at(self, rows: slice) -> Answers:
        return Answers(self.label[rows], self.probabilities[rows], self.accepted[rows])


@dataclass(frozen=True)
class Prediction:
    """One image's answer; `label` and `name` are None where a score is no number."""

    image: str
    label: int | None
    name: str | None
    probability: float | None
    accepted: bool


def difference(ours: Answers, theirs: Answers) -> float:
    """The largest of a probability; 0 where both are no numbers."""
    apart = (ours.probabilities - theirs.probabilities).abs()
    both = ours.probabilities.isnan() & theirs.probabilities.isnan()
    return float(apart.masked_fill(both, 0.0).nan_to_num(1.0).amax()) if len(apart) else 0.0


def unlike(ours: Answers, theirs: Answers) -> str | None:
    """How two sets of answers differ, None where they do not; labels that are as likely may change places."""
    if ours.probabilities.shape != theirs.probabilities.shape:
        return f"{tuple(ours.probabilities.shape)} probabilities, not {tuple(theirs.probabilities.shape)}"
    best = theirs.probabilities.nan_to_num(0.0).sort(dim=1, descending=True).values
    near = best[:, :1] - best[:, 1:2] <= TOLERANCE
    wrong = (ours.label != theirs.label) & ~near.any(1)
    if bool(wrong.any()):
        return f"{int(wrong.sum())} of {len(wrong)} images get another label"
    turned = ours.accepted != theirs.accepted
    if bool(turned.any()):
        return f"{int(turned.sum())} of {len(turned)} images are accepted by one and rejected by the other"
    apart = difference(ours, theirs)
    return f"a probability differs by {apart:.2g}" if apart > TOLERANCE else None


def load(folder: Path, manifest: Manifest) -> Callable[[Tensor], Answers]:
    """The system of a pack whose files have been verified. Raises UsageError where it cannot be loaded."""
    path = folder / GRAPH
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no exported model: {error}") from error
    if any(name.startswith(_CODE) for name in names):
        raise UsageError(f"{path} holds compiled code or a pickle, which packs never do; do not trust it")
    try:
        with _weights_only():
            graph = torch.export.load(path).module()
    except Exception as error:  # of another version of torch, or made by hand
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} cannot be loaded with torch {torch.__version__}: {first}") from error

    def answer(pixels: Tensor) -> Answers:
        with torch.no_grad():
            return Answers(*graph(pixels))

    return answer


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.export.load would read pickles of any kind where the safe reader fails."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before, quiet = os.environ.get(name), logging.root.manager.disable
    os.environ[name] = "1"
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(quiet)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def run_onnx(path: Path, pixels: Tensor) -> Answers:
    """What the ONNX file answers, by ONNX's reference implementation. Raises ImportError without onnx."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ReferenceEvaluator(onnx.load(path)).run(None, {INPUT: pixels.numpy()})
    return Answers(*(torch.from_numpy(np.asarray(found)) for found in made))


# --- checking ----------------------------------------------------------------------------------------


def check(folder: Path, sha256: str | None = None) -> list[str]:
    """What was found, a line a file. Raises UsageError for a pack that is not whole, GateError where one of its files
    answers otherwise than was recorded."""
    manifest = opened(folder, sha256)
    pixels, recorded = _recorded(folder)
    run = load(folder, manifest)
    lines = [_compared(GRAPH, run(pixels), recorded)]
    if ONNX in manifest.files:
        try:
            some = slice(0, 2)
            lines.append(_compared(ONNX, run_onnx(folder / ONNX, pixels[some]), recorded.at(some)))
        except ImportError:
            lines.append(f"{ONNX}: not checked, which needs onnx: pip install 'advplug[onnx]'")
    return lines


def _recorded(folder: Path) -> tuple[Tensor, Answers]:
    path = folder / RECORDED
    try:
        found = load_file(path)
        return found[INPUT], Answers(*(found[name] for name in OUTPUTS))
    except Exception as error:  # a header of any kind
        raise UsageError(f"{path} cannot be read ({error}); get the pack again") from error


def _compared(name: str, ours: Answers, recorded: Answers) -> str:
    off = unlike(ours, recorded)
    if off:
        raise GateError(f"{name} answers otherwise than was recorded: {off}")
    apart = difference(ours, recorded)
    return f"{name}: {len(recorded.label)} images are answered as recorded; probabilities differ by {apart:.1g} at most"


# --- predicting --------------------------------------------------------------------------------------


def predict(folder: Path, images: Sequence[Path], sha256: str | None = None) -> list[Prediction]:
    """What the packed system says of image files. Raises UsageError for a pack or an image that cannot be used."""
    manifest = opened(folder, sha256)
    pixels = [as_pixels(path, manifest) for path in images]
    run = load(folder, manifest)
    made = []
    for at in range(0, len(pixels), 32):
        said = run(torch.from_numpy(np.stack(pixels[at : at + 32])))
        rows = zip(images[at : at + 32], said.label.tolist(), said.probabilities, said.accepted.tolist(), strict=True)
        for path, label, chances, accepted in rows:
            known = label >= 0
            made.append(
                Prediction(str(path), label if known else None, manifest.classes[label] if known else None,
                           float(chances[label]) if known else None, accepted)
            )  # fmt: skip
    return made


def as_pixels(path: Path, manifest: Manifest) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(C, H, W) in [0, 1]. Images of another size are scaled to cover it, and their middle is taken.

    Raises UsageError for a file that is no image, and for channels that no image file has.
    """
    from PIL import Image, ImageOps

    if manifest.channels not in (1, 3):
        raise UsageError(f"this pack takes {manifest.channels} channels, which image files have not; call its graph")
    if not path.is_file():
        what = f"{path} is a folder; name the images in it" if path.is_dir() else f"there is no image {path}"
        raise UsageError(what)
    image, (height, width) = read_rgb(path, advice="give an image such as a PNG or JPEG file"), manifest.size
    if height == width:
        found = square(image, height, manifest.resize or height)
    else:
        found = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    if manifest.channels == 1:
        found = np.asarray(Image.fromarray(found.transpose(1, 2, 0)).convert("L"))[None]
    return np.ascontiguousarray(found, dtype=np.float32) / np.float32(255)
