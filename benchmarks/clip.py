"""caption-pgd beside the loop written by hand, with and without care: time, and how far it lowers similarities.

    python benchmarks/clip.py [--quick] [--images 200] [--repeats 9] [--output FILE]

`clip-tiny` on `digit-scenes`, retrieval, 8/255, 20 steps of 2/255 from a random point, in batches of 128, one thread,
float32. All variants get the same images, the mean of an image's own captions as what to leave, and starts of the
same kind, other ones in each repeat. Runs are interleaved; a ratio is the median of those of the repeats, since a
machine changes its pace from one to the next. Similarities are read off open_clip's model here, for all variants alike.
The model is trained the first time and then comes from the cache of weights; its captions are read before the clock
starts, except where they are read in every step. Wall time is what the bars are about; CPU time stands beside it
because it suffers less from other work on the machine.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kept
from advplug.allocator import keep_freed_memory
from advplug.artifacts import Artifacts
from advplug.build import Builder
from advplug.console import console_progress
from advplug.contracts import Ball, Batch, Minimise, Threat
from advplug.rng import Stream
from advplug.session import Request, plan
from advplug.victim import Victim
from advplug_clip.attack_specs import caption_pgd
from advplug_clip.scorer import ClipScorer
from bars import CAREFUL, OURS, PLAIN
from bars import captions as judge

EPS, ALPHA, STEPS, BATCH = Fraction(8, 255), Fraction(2, 255), 20, 128

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A victim, the images it is attacked on, and each image's own captions."""

    victim: Victim
    batch: Batch
    captions: tuple[tuple[str, ...], ...]

    @property
    def scorer(self) -> ClipScorer:
        assert isinstance(self.victim.module, ClipScorer)
        return self.victim.module

    @functools.cached_property
    def texts(self) -> Tensor:
        """(B, D): the mean of the unit features of each image's captions, as open_clip's model reads them."""
        tokens, owner = flat_tokens(self, self.captions)
        with torch.no_grad():
            features = self.scorer.clip.eval().encode_text(tokens, normalize=True)
        sums = torch.zeros(len(self.captions), features.shape[1]).index_add_(0, owner, features)
        return sums / torch.bincount(owner)[:, None]


def task(model: str, dataset: str, images: int) -> Task:
    """The victim as an evaluation builds it, and the images that it is judged on."""
    request = Request((model,), ("caption-pgd",), budgets=(str(EPS),), datasets=(dataset,), limit=images)
    (sweep,) = plan(request)
    with console_progress(quiet=False) as progress:
        built = Builder(Artifacts(), "cpu", True, progress).build(sweep.victim, images)
    built.victim.batch_size = BATCH
    assert built.split.captions is not None
    return Task(built.victim, built.split.batch(np.arange(len(built.split))), built.split.captions)


# --- the three variants ------------------------------------------------------------------------------


def ours(task: Task, steps: int, seed: int) -> Tensor:
    attack = caption_pgd(steps=steps, alpha=ALPHA)
    return attack(task.victim, task.batch, Threat(Ball("linf", EPS), Minimise()), Stream(seed, "benchmark")).x


def careful(task: Task, steps: int, seed: int) -> Tensor:
    """Texts were read before, only the image has a gradient, and the iterate of lowest similarity counts."""
    clip, eps, alpha = task.scorer.clip, float(EPS), float(ALPHA)
    torch.manual_seed(seed)
    flags = [(p, p.requires_grad) for p in clip.parameters()]
    clip.eval().requires_grad_(False)
    made = []
    for x, text in zip(torch.split(task.batch.x, BATCH), torch.split(task.texts, BATCH), strict=True):
        at = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp_(0, 1)
        best, lowest = at, torch.full((len(x),), torch.inf)
        for step in range(steps + 1):
            at.requires_grad_(step < steps)
            cosine = (clip.encode_image(normalised(task.scorer, at), normalize=True) * text).sum(1)
            lower = cosine.detach() < lowest
            best = torch.where(lower[:, None, None, None], at.detach(), best)
            lowest = torch.where(lower, cosine.detach(), lowest)
            if step < steps:
                (gradient,) = torch.autograd.grad(cosine.sum(), at)
                at = torch.clamp(at.detach() - alpha * gradient.sign(), x - eps, x + eps).clamp_(0, 1)
        made.append(best)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return torch.cat(made)


def plain(task: Task, steps: int, seed: int) -> Tensor:
    """Texts are read in every step, gradients reach all of the model, and the last iterate counts."""
    clip, eps, alpha = task.scorer.clip, float(EPS), float(ALPHA)
    torch.manual_seed(seed)
    flags = [(p, p.requires_grad) for p in clip.parameters()]
    clip.eval().requires_grad_(True)
    made = []
    for start in range(0, len(task.batch), BATCH):
        x, captions = task.batch.x[start : start + BATCH], task.captions[start : start + BATCH]
        tokens, owner = flat_tokens(task, captions)
        at = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp_(0, 1)
        for _ in range(steps):
            at = at.detach().requires_grad_(True)
            images = clip.encode_image(normalised(task.scorer, at), normalize=True)
            texts = clip.encode_text(tokens, normalize=True)
            cosine = (images[owner] * texts).sum(1)
            loss = torch.zeros(len(x)).index_add(0, owner, cosine / torch.bincount(owner)[owner]).sum()
            clip.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            assert at.grad is not None
            at = torch.clamp(at.detach() - alpha * at.grad.sign(), x - eps, x + eps).clamp(0, 1)
        made.append(at.detach())
    clip.zero_grad()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return torch.cat(made)


VARIANTS: dict[str, Callable[[Task, int, int], Tensor]] = {OURS: ours, CAREFUL: careful, PLAIN: plain}


def normalised(scorer: ClipScorer, x: Tensor) -> Tensor:
    """Pixels as the image tower takes them."""
    return (x - scorer.mean) / scorer.std


def flat_tokens(task: Task, captions: tuple[tuple[str, ...], ...]) -> tuple[Tensor, Tensor]:
    """Token numbers (N, length) of all captions, and which image each belongs to (N,)."""
    owner = torch.tensor([i for i, own in enumerate(captions) for _ in own])
    return task.scorer.tokens([text for own in captions for text in own]), owner


# --- what is compared --------------------------------------------------------------------------------


@torch.no_grad()
def similarities(task: Task, x: Tensor) -> Tensor:
    """(B,): the mean cosine of each image and its own captions, in float32."""
    clip = task.scorer.clip.eval()
    pieces = zip(torch.split(x, BATCH), torch.split(task.texts, BATCH), strict=True)
    return torch.cat([(clip.encode_image(normalised(task.scorer, a), normalize=True) * t).sum(1) for a, t in pieces])


def demand_inside(task: Task, x: Tensor, name: str) -> None:
    """Ends the benchmark where a variant left the ball or the box."""
    if x.dtype != torch.float32 or (x - task.batch.x).abs().max() > float(EPS) + 1e-6 or x.min() < 0 or x.max() > 1:
        raise SystemExit(f"{name} left its budget")


def measure(task: Task, repeats: int, steps: int) -> list[Row]:
    """Times every variant `repeats` times, in turn; seconds are medians, cosines means over images and repeats."""
    wall: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    left: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for run in VARIANTS.values():
        run(task, 1, 0)  # captions are read, kernels are prepared for each size of a pass once
    for turn in range(repeats):
        for name in list(VARIANTS) if turn % 2 == 0 else list(reversed(VARIANTS)):
            w, c = time.perf_counter(), time.process_time()
            x = VARIANTS[name](task, steps, turn)
            wall[name].append(time.perf_counter() - w)
            cpu[name].append(time.process_time() - c)
            demand_inside(task, x, name)
            left[name].append(similarities(task, x).mean().item())
    return [
        {
            "variant": name, "seconds": statistics.median(wall[name]), "cpu": statistics.median(cpu[name]),
            "cosine": statistics.mean(left[name]), "all seconds": wall[name], "all cpu": cpu[name],
            "all cosines": left[name],
        }
        for name in VARIANTS
    ]  # fmt: skip


def render(clean: float, rows: list[Row], bars: list[Row]) -> str:
    """Two tables: the variants, and the bars."""
    lines = [f"  {'':24s} {'seconds':>9s} {'CPU':>9s} {'mean cosine':>12s}", f"  {'clean':44s} {clean:12.4f}"]
    lines += [f"  {r['variant']:24s} {r['seconds']:9.3f} {r['cpu']:9.3f} {r['cosine']:12.4f}" for r in rows]
    for b in bars:
        side = "at most" if "at most" in b else "at least"
        cpu = f" (CPU {b['cpu value']:.3f})" if "cpu value" in b else ""
        verdict = "holds" if b["holds"] else "MISSED"
        lines.append(f"  {b['bar']:40s} {b['value']:8.4f}{cpu}, {side} {b[side]:g}: {verdict}")
    return "\n".join(lines)


def main() -> int:
    parser = kept.parser(__doc__, "clip", "64 images, one repeat")
    parser.add_argument("--images", type=int, help="how many test images (default 200)")
    parser.add_argument("--repeats", type=int, help="how many times each variant is timed (default 9)")
    options = parser.parse_args()
    keep_freed_memory()  # as every evaluation does; the other loops profit alike
    torch.set_num_threads(1)
    repeats = options.repeats or (1 if options.quick else 9)
    model, dataset = "clip-tiny:task=retrieval", "digit-scenes"
    made = task(model, dataset, options.images or (64 if options.quick else 200))
    print(f"{model} on {dataset}, {len(made.batch)} images, {EPS}, {STEPS} steps of {ALPHA}, {repeats} repeats")
    sys.stdout.flush()
    clean = similarities(made, made.batch.x).mean().item()
    rows = measure(made, repeats, STEPS)
    print(render(clean, rows, judge(rows)))
    result = kept.header(1) | {
        "model": model, "dataset": dataset, "images": len(made.batch), "batch": BATCH, "eps": str(EPS),
        "alpha": str(ALPHA), "steps": STEPS, "repeats": repeats, "clean cosine": clean, "variants": rows,
    }  # fmt: skip
    return kept.finish("clip", result, kept.place("clip", options))


if __name__ == "__main__":
    sys.exit(main())
