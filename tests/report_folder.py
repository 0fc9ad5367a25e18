"""A folder of runs made by hand that has something for every part of the report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from advplug.evidence import Evidence
from advplug.results import AuditCost, Cell, Flag, Passes, Poisoning, RunInfo, RunResult, Seconds, ThreatRow
from advplug.store import Store
from advplug.stored.samples import PoisonSample, Sample
from run_folders import cell, certificate, evidence, poisoned, poisoning, threat

EVIL = "<script>alert(1)</script>"
"""What a model is called here."""
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine & <b>more</b>")
DETAIL = "all gradients of 3 images are <i>zero</i>"
ROBUST = {
    # model, defense, attack, eps: images of 50 that are not right under attack
    ("cnn", "none", "pgd", "1/20"): 20, ("cnn", "none", "pgd", "1/10"): 45,
    ("cnn", "none", "square", "1/20"): 5, ("cnn", "none", "square", "1/10"): 30,
    ("cnn", "jpeg", "pgd", "1/20"): 10, ("cnn", "jpeg", "pgd", "1/10"): 25,
    (EVIL, "none", "pgd", "1/20"): 15, (EVIL, "none", "pgd", "1/10"): 40,
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    path: Path
    result: RunResult


def sample(n: int = 3, side: int = 8, channels: int = 1, step: int = 10) -> Sample:
    """`n` images of one grey each, whose adversarial twins are brighter by `step` and answered otherwise."""
    clean = np.stack([np.full((channels, side, side), 20 * (i + 1), dtype=np.uint8) for i in range(n)])
    index = np.arange(n)
    return Sample(index, index, clean, clean + np.uint8(step), index, (index + 1) % 10, np.ones(n, dtype=bool))


def poisons(n: int = 4) -> PoisonSample:
    """`n` images with a white corner, once in training, said to be nines, and once as a trigger that works on two."""
    plain = np.full((n, 1, 8, 8), 40, dtype=np.uint8)
    marked = plain.copy()
    marked[:, :, 7, 7] = 255
    index, nines = np.arange(n), np.full(n, 9)
    answers = np.where(index < 2, 9, index)
    return PoisonSample(10 * index, plain, marked, index, nines, None, index, index, nines, answers, plain, marked)


def _effort(n: int, lost: int) -> Evidence:
    """The first `lost` images fall, one more with every step; the others see 20 steps."""
    steps = np.where(np.arange(n) < lost, 1 + np.arange(n) % 20, 20)
    static = np.arange(n)[:, None] < lost // 2
    return evidence(range(lost), n, steps=steps, static=static)


def whole(path: Path) -> Folder:
    """Writes it."""
    found: list[tuple[Cell, Evidence | None]] = []
    for (model, defense, attack, eps), lost in ROBUST.items():
        seen = _effort(50, lost)
        if defense == "none":
            seen = replace(seen, static=None)
        made = cell(seen, model=model, defense=defense, attack=attack, eps=eps, passes=Passes(50, 40, 60),
                    seconds=Seconds(1.0, 0.5, 2.0, 0.25), provenance={"weights_sha256": "ab" * 32})  # fmt: skip
        found.append((made, seen))
    for source in ("cnn", EVIL):
        for judge in ("cnn", EVIL):
            seen = evidence(range(45 if source == judge else 12))
            attack = f"transfer:from='{source}',attack=pgd"
            found.append((cell(seen, model=judge, attack=attack, eps="1/10"), seen))
    found.append((cell(status="failed", attack="boom", eps="1/10", reason="memory <ran> out"), None))
    found.append((cell(status="refused", attack="grad", defense="jpeg", eps="1/10", reason="use square instead"), None))
    poison = poisoning(poisoned(30), flags=(Flag("unreached", "warn", "half of the trigger is lost"),))
    info = RunInfo({"torch": "2.13.0"}, 0, "cpu", f"advplug eval -m '{EVIL}'", passes=1234, seconds=5.5)
    cells, poisonings = tuple(c for c, _ in found), (replace(poison, verdict="upper bound"),)
    result = RunResult(info, cells, _threats(), (certificate(),), poisonings)
    _write(path, found, result)
    return Folder(path, result)


def _threats() -> tuple[ThreatRow, ...]:
    cost = AuditCost("quick", 50, 100, 50)
    more = {"attacks": ("pgd", "square"), "audit": cost}
    zero, falls = Flag("zero-gradients", "error", DETAIL), Flag("not-converged", "warn", "it goes on falling")
    return (
        threat(1.0, 0.6, eps="1/20", **more),
        threat(1.0, 0.1, eps="1/10", **more | {"flags": (falls,), "verdict": "upper bound"}),
        threat(1.0, 0.8, defense="jpeg", eps="1/20", **more),
        threat(1.0, 0.5, defense="jpeg", eps="1/10", **more | {"flags": (zero,), "verdict": "not trustworthy"}),
        threat(1.0, 0.7, model=EVIL, eps="1/20", **more),
        threat(1.0, 0.2, model=EVIL, eps="1/10", **more),
    )  # fmt: skip


def _write(path: Path, found: list[tuple[Cell, Evidence | None]], result: RunResult) -> None:
    with Store(path) as kept:
        seen = {c.key: sample() for c, e in found if e is not None and not c.attack.startswith("transfer")}
        kept.put("sweep", found, samples=seen)
        kept.put_classes("digits", CLASSES)
        for proven in result.certificates:
            kept.put_certificate(proven, None)
        for made in result.poisonings:
            bare: Poisoning = replace(made, verdict=None, flags=())
            kept.put_poisoning(bare, poisoned(30).to_bytes(), poisons())
        kept.put_shown(result)
