"""Makes packs: builds the defended model, exports it, and keeps it only if the graph answers as the system does."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from advplug.artifacts import Artifacts
from advplug.build import Builder, Built, Stages
from advplug.errors import UsageError
from advplug.judging import judge_victim
from advplug.packs.manifest import GRAPH, INPUT, MANIFEST, ONNX, OUTPUTS, RECORDED, File, Manifest, digest, measured
from advplug.packs.run import Answers, run_onnx, unlike
from advplug.parse import parse_reference, parse_stack
from advplug.plans import VictimPlan, bind, bind_stack
from advplug.registry import registry
from advplug.versions import versions
from advplug.victim import Victim, decide_padded

SEEN_BY_ONNX = 2
"""Images that ONNX's reference implementation is tried on: it is exact and slow."""


@dataclass(frozen=True)
class PackRequest:
    """What is to be packed; `run` is a folder of results that judged this victim, `images` how many are recorded."""

    model: str
    defense: str
    output: Path
    dataset: str = "digits"
    seed: int = 0
    run: Path | None = None
    images: int = 32
    onnx: bool = True
    device: str = "auto"
    offline: bool = False


class Deployed(nn.Module):
    """The defended system as one module: pixels (B, C, H, W) in [0, 1] to label, probabilities and acceptance."""

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.module = victim.module
        self._victim = victim

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, rejection = self._victim.deployed(pixels)
        finite = scores.isfinite().all(1)
        label = torch.where(finite, scores.argmax(1), torch.full_like(scores.argmax(1), -1))
        accepted = torch.ones_like(finite) if rejection is None else ~(rejection > 0)
        for wrap in self._victim.wraps:
            if wrap.accepts is not None:
                accepted = accepted & wrap.accepts(pixels, scores)
        return label, scores.softmax(1), accepted


def pack(request: PackRequest, progress: Stages) -> Manifest:
    """Writes the pack to a new folder, whole or not at all.

    Raises UsageError for what cannot be packed, with the reason, and where the run judged another victim.
    """
    if request.output.exists() and (not request.output.is_dir() or any(request.output.iterdir())):
        raise UsageError(f"{request.output} is there already; name a new folder with -o")
    known = registry()
    plan = VictimPlan(
        bind(known, "dataset", parse_reference(request.dataset)),
        bind(known, "model", parse_reference(request.model)),
        bind_stack(known, parse_stack(request.defense)),
        request.seed,
    )
    _refuse(plan)
    named = (plan.model.label, plan.defense_label, plan.dataset.label, plan.seed)
    robustness, weights = measured(request.run, *named) if request.run else (None, set())
    built = Builder(Artifacts(), request.device, request.offline, progress).build(plan, None)
    if weights and weights != {built.weights_sha256}:
        raise UsageError(f"{request.run} judged other weights than these; run it again, here and now, then pack")
    victim = _on_cpu(built.victim)
    recorded, answers = _recorded(victim, built, request.images)
    with _whole(request.output) as folder, _quiet():
        graph = _exported(victim, plan, recorded, answers)
        torch.export.save(graph, folder / GRAPH)
        reason = _onnx(graph, folder / ONNX, recorded, answers) if request.onnx else "it was not asked for"
        save_file({INPUT: recorded, **answers.named()}, folder / RECORDED)
        (folder / RECORDED).chmod(0o644)
        info = plan.dataset.value.info()
        names = [GRAPH, RECORDED] + ([ONNX] if reason is None else [])
        files = {name: File(digest(folder / name), (folder / name).stat().st_size) for name in sorted(names)}
        manifest = Manifest(
            *named, tuple(info.classes), info.channels, tuple(info.size), victim.rejects, built.weights_sha256,
            versions(), robustness, reason, files, resize_of(plan.dataset.value),
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def resize_of(source: object) -> int | None:
    """What a source of image files scales their shorter side to."""
    found = getattr(source, "resize", None)
    return found if isinstance(found, int) else None


def _refuse(plan: VictimPlan) -> None:
    """Raises UsageError for what no graph can hold."""
    refused = judge_victim(plan, plan.dataset.value.info())
    if refused:
        raise UsageError(str(refused))
    drawn = [part.label for part in plan.defense if part.caps.stochastic]
    if drawn:
        raise UsageError(
            f"{' and '.join(drawn)} cannot be packed: each answer draws new random numbers, for which an exported "
            "graph has no generator of its own, and what was recorded could not be checked; pack the model without it"
        )
    if plan.model.caps.task != "classification":
        raise UsageError(f"{plan.model.label} compares images with the captions of one dataset; pack a classifier")


def _on_cpu(victim: Victim) -> Victim:
    columns = None if victim.columns is None else replace(victim.columns, group=victim.columns.group.cpu())
    module = victim.module.cpu().eval().requires_grad_(False)
    return replace(victim, module=module, device=torch.device("cpu"), columns=columns)


def _recorded(victim: Victim, built: Built, images: int) -> tuple[Tensor, Answers]:
    """Test images (N, C, H, W), and what the system itself answers."""
    some = built.split.subset(np.arange(min(images, len(built.split))))
    pixels = torch.cat([batch.x for batch in some.batches(victim.batch_size, victim.device)])
    said = decide_padded(victim, pixels)
    assert said.scores is not None
    return pixels, Answers(said.label, said.scores.softmax(1), said.accepted)


def _exported(victim: Victim, plan: VictimPlan, pixels: Tensor, answers: Answers) -> torch.export.ExportedProgram:
    """The graph, for any number of images. Raises UsageError where there is none or it answers otherwise."""
    try:
        graph = _graph(victim, pixels)
    except Exception as error:  # tracing raises whatever the model's code does
        raise UsageError(_culprit(victim, plan, pixels, error)) from error
    run = graph.module()
    for some in (slice(None), slice(0, 1)):
        off = unlike(Answers(*run(pixels[some])), answers.at(some))
        if off:
            raise UsageError(f"the exported graph answers otherwise than {plan.model.label}: {off}; it was not packed")
    return graph


def _graph(victim: Victim, pixels: Tensor) -> torch.export.ExportedProgram:
    example = pixels[:2] if len(pixels) > 1 else pixels.repeat(2, 1, 1, 1)  # of one image, one would become a constant
    with torch.no_grad():
        return torch.export.export(Deployed(victim), (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def _culprit(victim: Victim, plan: VictimPlan, pixels: Tensor, error: Exception) -> str:
    """Which part of the system is no graph: the first with which it is none."""
    parts = [bound.label for bound in plan.defense if "wrap" in bound.caps.stages]
    for count, label in enumerate([plan.model.label, *parts]):
        try:
            _graph(replace(victim, wraps=victim.wraps[:count]), pixels)
        except Exception as found:
            works = "; pack the model without it, and do this in front of the graph" if count else ""
            return f"{label} cannot be packed: it leaves PyTorch's graph ({_first_line(found)}){works}"
    return f"{plan.model.label} with {plan.defense_label} cannot be packed: {_first_line(error)}"


# --- ONNX --------------------------------------------------------------------------------------------


def _onnx(graph: torch.export.ExportedProgram, path: Path, pixels: Tensor, answers: Answers) -> str | None:
    """Writes the graph as ONNX; why it could not be, and then nothing is written."""
    try:
        import onnx  # noqa: F401 - whether it is there
        import onnxscript  # noqa: F401
    except ImportError:
        return "it needs onnx and onnxscript: pip install 'advplug[onnx]'"
    try:
        made: Any = torch.onnx.export(
            graph, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(OUTPUTS),
            dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
        made.save(path, external_data=False)
        some = slice(0, SEEN_BY_ONNX)
        off = unlike(run_onnx(path, pixels[some]), answers.at(some))
    except Exception as error:  # converters raise anything
        off = _first_line(_root(error))
    if off:
        path.unlink(missing_ok=True)
        return off
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200].rstrip(".") if lines else type(error).__name__


# --- around it ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end. Raises UsageError where it cannot be written."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error
    try:
        yield part
        part.chmod(0o755)
        part.replace(output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and warn of."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
