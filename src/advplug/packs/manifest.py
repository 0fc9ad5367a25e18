"""Packs: a defended model as files to deploy, with a manifest that says what is in them. No torch here.

A pack is a folder: `manifest.json`; `model.pt2`, the defended system as a graph of torch.export; `model.onnx`, the same
for other runtimes where ONNX can say it; `recorded.safetensors`, images and what the system answered to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from advplug.errors import UsageError
from advplug.results import RunResult
from advplug.stored.runs import read

SCHEMA = 1
MANIFEST, GRAPH, ONNX, RECORDED = "manifest.json", "model.pt2", "model.onnx", "recorded.safetensors"
INPUT = "pixels"
OUTPUTS = ("label", "probabilities", "accepted")
"""label (B,) int64, -1 where a score is no number; probabilities (B, K) float32; accepted (B,) bool."""


@dataclass(frozen=True)
class File:
    """What a file of a pack must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a pack holds. `robustness` is what a run measured of this victim, None
    where none was given; `onnx` is why there is no ONNX file, None where there is one. `resize`: the shorter side that
    images were scaled to before their middle was taken, None for the model's own."""

    model: str
    defense: str
    dataset: str
    seed: int
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    rejects: bool
    weights_sha256: str
    versions: Mapping[str, str]
    robustness: Mapping[str, Any] | None
    onnx: str | None
    files: Mapping[str, File] = field(default_factory=dict)
    resize: int | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        """As it stands in `manifest.json`, with words on what goes in and comes out."""
        data = asdict(self)
        told = {
            "input": {"name": INPUT, "shape": ["batch", self.channels, *self.size], "type": "float32",
                      "range": [0, 1], "colours": {1: "grey", 3: "RGB"}.get(self.channels, "as trained")},
            "outputs": {"label": "int64 (batch,), -1 where a score is no number",
                        "probabilities": "float32 (batch, classes)",
                        "accepted": "bool (batch,), false where the defense rejects the image"},
        }  # fmt: skip
        return json.dumps({"schema": data.pop("schema"), **told, **data}, indent=2, allow_nan=False) + "\n"


def measured(folder: Path, model: str, defense: str, dataset: str, seed: int) -> tuple[dict[str, Any], set[str]]:
    """What the run in `folder` says of this victim, and the hashes of the weights that it judged.

    Raises UsageError where it says nothing of it.
    """
    result = read(folder)
    victim = (model, defense, dataset, seed)
    threats = [t for t in result.threats if (t.model, t.defense, t.dataset, t.seed) == victim]
    proofs = [c for c in result.certificates if (c.model, c.defense, c.dataset, c.seed) == victim]
    if not threats:
        held = dict.fromkeys(f"{t.model} ({t.defense}) on {t.dataset}, seed {t.seed}" for t in result.threats)
        raise UsageError(
            f"{folder} holds no finished threat of {model} ({defense}) on {dataset}, seed {seed}; it holds "
            + ("; ".join(held) or "none at all")
        )
    named = ("model", "defense", "dataset", "seed", "audit", "key", "provenance", "passes", "seconds")
    told: dict[str, Any] = {
        "command": result.run.command,
        "versions": dict(result.run.versions),
        "threats": [_without(row, named) for row in threats],
        "certificates": [_without(row, named) for row in proofs if row.status == "ok"],
    }
    return told, _judged(result, *victim)


def _judged(result: RunResult, *victim: Any) -> set[str]:
    own = [c for c in result.cells if (c.model, c.defense, c.dataset, c.seed) == victim and c.status == "ok"]
    return {str(c.provenance["weights_sha256"]) for c in own if "weights_sha256" in c.provenance}


def _without(row: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Of a row what is not said of the whole pack already, as JSON holds it."""
    kept = {k: v for k, v in asdict(row).items() if k not in names}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


# --- reading -----------------------------------------------------------------------------------------


def opened(folder: Path, sha256: str | None = None) -> Manifest:
    """The manifest of a pack all of whose files are as it says; `sha256` is what the manifest itself must hash to.

    Raises UsageError, in one line, for what is missing, cut off or changed.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise UsageError(f"there is no pack {folder}; advplug pack MODEL DEFENSE -o {folder} makes one")
    if not path.is_file():
        raise UsageError(f"{folder} is no pack: it has no {MANIFEST}; advplug pack MODEL DEFENSE -o DIR makes one")
    if sha256 is not None and (found := digest(path)) != sha256.strip().lower():
        raise UsageError(f"{path} is not the manifest that was asked for: its sha256 is {found}")
    manifest = _parsed(path)
    for name, told in manifest.files.items():
        _verify(folder / name, told)
    return manifest


def _parsed(path: Path) -> Manifest:
    from pydantic import TypeAdapter, ValidationError

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise UsageError(f"{path} is no manifest; get the pack again")
        if data.get("schema") != SCHEMA:
            raise UsageError(f"{path} has schema {data.get('schema')}, this advplug reads {SCHEMA}; pack it again")
        for told in ("input", "outputs"):
            data.pop(told, None)
        found: Manifest = TypeAdapter(Manifest).validate_python(data)
    except (ValueError, OSError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"{path} cannot be read ({why}); it is damaged or was changed: get the pack again") from error
    for name in (GRAPH, RECORDED):
        if name not in found.files:
            raise UsageError(f"{path} names no {name}; it is damaged or was changed: get the pack again")
    for name in found.files:
        if name not in (GRAPH, ONNX, RECORDED):
            raise UsageError(f"{path} names the file '{name}', which is no part of a pack; get the pack again")
    return found


def _verify(path: Path, told: File) -> None:
    """Raises UsageError unless the file is as the manifest says."""
    if not path.is_file():
        raise UsageError(f"{path} is missing, which the manifest names; get the pack again")
    size = path.stat().st_size
    if size != told.bytes:
        what = "cut off" if size < told.bytes else "longer than it was"
        raise UsageError(f"{path} is {what}: {size:,} bytes, the manifest says {told.bytes:,}; get it again")
    if digest(path) != told.sha256:
        raise UsageError(f"{path} was changed: its sha256 is not the manifest's; get it again")


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
