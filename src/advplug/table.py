"""Results as text tables for people: cells, then the worst case of every threat with its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advplug.estimate import Estimate
from advplug.health import CHECKS
from advplug.health.poisons import CHECKS as POISON_CHECKS
from advplug.health.poisons import why_bound
from advplug.registry import registry
from advplug.results import Cell, Certificate, CertifiedAccuracy, Flag, Poisoning, RunResult, ThreatRow
from advplug.separation import sentence
from advplug.tables.text import cosine, percent, points, titled


def _metric(name: str, interval: bool = False) -> Callable[[Cell], str]:
    return lambda cell: percent(cell.metrics.get(name), interval)


def _cosine(name: str, beside: str = "", interval: bool = False) -> Callable[[Cell], str]:
    """A similarity; nothing where the one `beside` it does not apply."""
    return lambda cell: cosine(cell.metrics.get(name) if cell.metrics.get(beside or name) else None, interval)


def render(result: RunResult) -> str:
    """The whole result as text; columns that say the same in every row are written above the table."""
    tables = [_cells(result.cells), _threats(result.threats), _certificates(result.certificates)]
    parts = [*tables, _poisonings(result.poisonings), *remarks(result)]
    return "\n\n".join(p for p in parts if p)


def _shown_metrics() -> list[tuple[str, str]]:
    """(heading, value) of what metrics ask to be shown."""
    return [(heading, name) for entry in registry().entries("metric") for name, heading in entry.spec.caps.shown]  # type: ignore[union-attr]


def _cells(cells: Sequence[Cell]) -> str:
    columns: dict[str, Callable[[Cell], str]] = {
        "dataset": lambda c: c.dataset,
        "model": lambda c: c.model,
        "defense": lambda c: c.defense,
        **_seed(cells),
        "attack": lambda c: c.attack,
        "norm": lambda c: c.norm,
        "eps": lambda c: c.eps,
        "goal": lambda c: c.goal,
        "clean %": _metric("clean_accuracy"),
        "robust % [95 %]": _metric("robust_accuracy", True),
        "static %": _metric("static_robust_accuracy"),
        "adaptive %": _metric("adaptive_robust_accuracy"),
        "8-bit %": _metric("robust_accuracy_8bit"),
        "success %": _metric("attack_success_rate"),
        "clean cosine": _cosine("clean_similarity", "adversarial_similarity"),
        "under attack [95 %]": _cosine("adversarial_similarity", interval=True),
        "static": _cosine("static_similarity"),
        "adaptive": _cosine("adaptive_similarity"),
        "8-bit": _cosine("similarity_8bit"),
        **{heading: _metric(name) for heading, name in _shown_metrics()},
        "status": lambda c: c.status if c.status != "ok" else ", ".join(f.name for f in c.flags) or "ok",
    }
    return titled("Attacks", columns, cells, constant=("dataset", "model", "norm", "goal"))


def _threats(threats: Sequence[ThreatRow]) -> str:
    columns: dict[str, Callable[[ThreatRow], str]] = {
        "dataset": lambda t: t.dataset,
        "model": lambda t: t.model,
        "defense": lambda t: t.defense,
        **_seed(threats),
        "norm": lambda t: t.norm,
        "eps": lambda t: t.eps,
        "goal": lambda t: t.goal,
        "attacks": _apart(threats),
        "clean % [95 %]": lambda t: percent(t.clean_accuracy, True),
        "worst case % [95 %]": lambda t: percent(t.worst_case_accuracy, True),
        "clean cosine": lambda t: cosine(t.clean_similarity),
        "worst case cosine [95 %]": lambda t: cosine(t.worst_case_similarity, True),
        "recovery %": lambda t: "-" if t.recovery is None else f"{100 * t.recovery:.1f}",
        "static recovery %": lambda t: "-" if t.static_recovery is None else f"{100 * t.static_recovery:.1f}",
        "against undefended": _against,
        "verdict": lambda t: t.verdict or "not measured",
    }
    return titled("Worst case over the attacks", columns, threats, constant=("dataset", "model", "norm", "goal"))


def _apart(threats: Sequence[ThreatRow]) -> Callable[[ThreatRow], str]:
    """A threat's attacks where another one reads the same, as shifts beside rotations do; otherwise a dash."""
    alike = Counter(map(_read, threats))
    return lambda t: ", ".join(t.attacks) if alike[_read(t)] > 1 else "-"


def _read(threat: ThreatRow) -> tuple[object, ...]:
    t = threat
    return t.dataset, t.model, t.defense, t.norm, t.eps, t.goal, t.seed


def _places(threats: Sequence[ThreatRow]) -> Callable[[ThreatRow], str]:
    """What a message calls a threat: victim and budget, with the goal and the attacks where they are needed."""
    goals, attacks = len({t.goal for t in threats}) > 1, _apart(threats)

    def place(threat: ThreatRow) -> str:
        parts = [f"{threat.model} ({threat.defense})", f"{threat.norm} {threat.eps}", *[threat.goal] * goals]
        return ", ".join([*parts, *[f"by {attacks(threat)}"] * (attacks(threat) != "-")])

    return place


def _against(threat: ThreatRow) -> str:
    difference = threat.difference_to_baseline
    if threat.worst_case_similarity is None or difference is None:
        return points(difference)
    text = f"{difference.value:+.3f}"
    if difference.low is not None and difference.high is not None:
        text += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return text


def _certificates(certificates: Sequence[Certificate]) -> str:
    rows = [(c, at) for c in certificates for at in c.certified_accuracy or (None,)]
    columns: dict[str, Callable[[tuple[Certificate, CertifiedAccuracy | None]], str]] = {
        "dataset": lambda row: row[0].dataset,
        "model": lambda row: row[0].model,
        "defense": lambda row: row[0].defense,
        **_seed(rows, lambda row: row[0]),
        "norm": lambda row: row[0].norm,
        "clean %": lambda row: percent(row[0].clean_accuracy),
        "abstains %": lambda row: percent(row[0].abstention_rate),
        "radius": lambda row: row[1].radius if row[1] else "-",
        "certified % [95 %]": lambda row: percent(row[1].certified_accuracy, True) if row[1] else "-",
        "attacks leave %": lambda row: percent(row[1].worst_case_accuracy) if row[1] else "-",
        "status": lambda row: row[0].status,
    }
    shared = ("dataset", "model", "defense", "norm", "clean %", "abstains %")
    return titled("Certificates", columns, rows, constant=shared)


def _poisonings(poisonings: Sequence[Poisoning]) -> str:
    def metric(name: str, interval: bool = False) -> Callable[[Poisoning], str]:
        return lambda p: percent(p.metrics.get(name), interval)

    columns: dict[str, Callable[[Poisoning], str]] = {
        "dataset": lambda p: p.dataset,
        "model": lambda p: p.model,
        "attack": lambda p: p.attack,
        "defense": lambda p: p.defense,
        **_seed(poisonings),
        "poisons": lambda p: "-" if p.poisons is None else f"{p.poisons} of {p.training_images}",
        "clean %": metric("clean_accuracy"),
        "triggered as wanted % [95 %]": metric("attack_success_rate", True),
        "by the clean model %": metric("clean_model_success_rate"),
        "triggered, still right %": metric("triggered_accuracy"),
        "targets as wanted % [95 %]": metric("poison_success_rate", True),
        "targets by the clean model %": metric("clean_model_poison_success_rate"),
        "verdict": lambda p: p.verdict or p.status,
    }
    shared = ("dataset", "model", "attack", "poisons")
    return titled("Attacks on the training data", columns, poisonings, constant=shared)


def _seed(items: Sequence[Any], of: Callable[[Any], Any] = lambda item: item) -> dict[str, Callable[[Any], str]]:
    """A column, where there are several seeds."""
    several = len({of(item).seed for item in items}) > 1
    return {"seed": lambda item: str(of(item).seed)} if several else {}


def remarks(result: RunResult) -> list[str]:
    """What has to be said below the tables, as one paragraph or none."""
    lines = [f"leakage: {check.dataset}: {sentence(check)}" for check in result.run.leakage]
    notes: dict[str, dict[str, None]] = {}
    for cell in result.cells:
        if cell.status != "ok":
            lines.append(
                f"{cell.status}: {cell.attack} on {cell.model} ({cell.defense}), {cell.norm} {cell.eps}: {cell.reason}"
            )
        for note in cell.notes:
            notes.setdefault(f"{cell.model} ({cell.defense}): {note}", {})[cell.attack] = None
        lines += _spread(cell)
    lines += [f"note: {', '.join(attacks)} on {text}" for text, attacks in notes.items()]
    for certificate in result.certificates:
        lines += _certificate_remarks(certificate)
    for poisoning in result.poisonings:
        lines += _poisoning_remarks(poisoning)
    lines += _facts(result.cells)
    lines += _facts(result.poisonings)
    flags: dict[Flag, list[str]] = {}
    place = _places(result.threats)
    for threat in result.threats:
        for flag in threat.flags:
            flags.setdefault(flag, []).append(place(threat))
    lines += [
        f"{flag.level}: {flag.name}: {'; '.join(where)}: {flag.detail}; {CHECKS[flag.name].advice}"
        for flag, where in flags.items()
    ]
    audits = [t.audit for t in result.threats if t.audit is not None]
    if audits:
        most = max(audits, key=lambda a: a.forward)
        cost = f"{most.forward:,} forward and {most.backward:,} backward passes of an image"
        lines.append(f"audit ({most.level}): {most.images} images, {cost}{' a threat at most' * (len(audits) > 1)}")
    bounds: dict[str, list[str]] = {}
    for threat in result.threats:
        if threat.verdict == "upper bound":
            missing = ", ".join(name for name in threat.unchecked if CHECKS[name].required)
            why = f"not checked: {missing}" if missing else "a stronger attack may break more"
            bounds.setdefault(why, []).append(place(threat))
    lines += [f"upper bound: {'; '.join(where)}: {why}" for why, where in bounds.items()]
    return ["\n".join(dict.fromkeys(lines))] if lines else []


def _spread(cell: Cell) -> list[str]:
    robust = cell.metrics.get("robust_accuracy")
    if robust is None or robust.spread is None:
        return []
    varies = f"robust accuracy varies by {100 * robust.spread:.1f} points (standard deviation)"
    return [
        f"note: {cell.attack} on {cell.model} ({cell.defense}): {cell.draws} decisions of each image, "
        f"figures are their means; {varies}"
    ]


def _certificate_remarks(made: Certificate) -> list[str]:
    what = f"certificate of {made.model} ({made.defense})"
    if made.status != "ok":
        return [f"{made.status}: {what}: {made.reason}"]
    assert made.passes is not None
    assert made.failure_probability is not None
    cost = f"{made.passes.forward:,} passes of an image through the model"
    held = f"each image's proof fails with probability {made.failure_probability:g} at most"
    lines = [f"{what}: {held}; {cost}", *(f"note: {what}: {note}" for note in made.notes)]
    if any(_above(c.certified_accuracy, c.worst_case_accuracy) for c in made.certified_accuracy):
        lines.append(
            f"note: {what}: attacks leave less than is certified because answers to them come from fewer noisy copies, "
            "and more of them are withheld; more votes narrow the gap"
        )
    return lines


def _poisoning_remarks(made: Poisoning) -> list[str]:
    what = f"{made.attack} on {made.model} ({made.defense})"
    if made.status != "ok":
        return [f"{made.status}: {what}: {made.reason}"]
    lines = [f"note: {what}: {note}" for note in made.notes]
    for name, facts in made.provenance.get("facts", {}).items():
        lines += [f"{name} on {made.model}: {text}" for text in _chosen(facts.get("rounds", ()))]
    for flag in made.flags:
        lines.append(f"{flag.level}: {flag.name}: {what}: {flag.detail}; {POISON_CHECKS[flag.name].advice}")
    if made.verdict == "upper bound":
        lines.append(f"upper bound: {what}: {why_bound(made.defense)}")
    return lines


def _chosen(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a training trusted, in its first round and in its last."""
    if not rounds:
        return []
    ends = [rounds[0], rounds[-1]] if len(rounds) > 1 else [rounds[0]]
    return [
        f"trusted {r['trusted']:,} images in round {number}, {r['poisons']} of them poisons"
        for number, r in zip((1, len(rounds)), ends, strict=False)
    ]


def _above(certified: Estimate | None, left: Estimate | None) -> bool:
    return certified is not None and left is not None and certified.value > left.value


def _facts(cells: Sequence[Cell | Poisoning]) -> list[str]:
    lines = []
    for cell in cells:
        for defense, facts in cell.provenance.get("facts", {}).items():
            told = ", ".join(f"{k.replace('_', ' ')} {_told(v)}"
                             for k, v in facts.items() if isinstance(v, int | float | str))  # fmt: skip
            where = "" if defense == cell.model else f" on {cell.model}"  # a model's own training has facts, too
            lines.append(f"{defense}{where}: {told}")
    return lines


def _told(fact: float | str) -> str:
    if isinstance(fact, float):
        return f"{fact:.4g}" if abs(fact) < 1e4 else f"{fact:,.0f}"
    return f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)
