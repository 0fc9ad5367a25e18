"""What each benchmark has to reach, judged from its result alone: no PyTorch, so that pages can be made from results.

A bar is a dictionary: `what` is measured, its `value`, the limit as `at most` or `at least`, whether it `holds`, and
`on` what, with the number of images, cells or repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def at_most(what: str, value: float, limit: float, on: str) -> Row:
    return {"what": what, "value": value, "at most": limit, "holds": value <= limit, "on": on}


def at_least(what: str, value: float, limit: float, on: str) -> Row:
    return {"what": what, "value": value, "at least": limit, "holds": value >= limit, "on": on}


def text(bar: Row) -> str:
    """One line for a terminal."""
    side = "at most" if "at most" in bar else "at least"
    return f"{bar['what']}: {bar['value']:.4g}, {side} {bar[side]:g}: {'held' if bar['holds'] else 'MISSED'}"


def of(name: str, result: Row) -> list[Row]:
    """The bars of a benchmark's result; of a part of a result, those of the part."""
    return list(JUDGES[name](result))


# --- speed of the command line and of attacks ------------------------------------------------------


def startup(result: Row) -> Iterator[Row]:
    yield at_most("`advplug --help`, times as long as `import click`", result["ratio"], 3.0,
                  f"medians of {result['rounds']} rounds")  # fmt: skip


FASTER = {("standard", "8/255"): (6.0, 12.0), ("standard", "1/255"): (2.5, 5.0),
          ("adversarially trained", "8/255"): (2.5, 2.5)}  # fmt: skip
"""How many times as fast as torchattacks PGD has to be in float32, and where the processor has bfloat16: images that
are fooled at once leave it most to gain."""
AS_ART = {("standard", "8/255"): 4.0, ("standard", "1/255"): 1.5, ("adversarially trained", "8/255"): 1.5}
"""The same beside ART."""


def engine(result: Row) -> Iterator[Row]:
    images = f"{result['model']}, {result['images']} images"
    rows = [*result.get("pgd", []), *result.get("trained", [])]
    for (what, eps), (exact, fast) in FASTER.items():
        by = {r["variant"]: r for r in rows if (r["what"], r["eps"]) == (what, eps)}
        on = f"{'small net on the same data' if what != 'standard' else result['model']}, {what}, {eps}, " \
             f"{result['images']} images"  # fmt: skip
        told = f"PGD-{result['steps']}, times as fast as"
        if "torchattacks" in by:
            yield at_least(f"{told} torchattacks", _faster(by, "torchattacks", "advplug float32"), exact, on)
            if "avx512_bf16" in result.get("cpu flags", ()):
                gain = _faster(by, "torchattacks", "advplug auto")
                yield at_least(f"{told} torchattacks, in bfloat16", gain, fast, on)
        if "art" in by:
            yield at_least(f"{told} ART", _faster(by, "art", "advplug float32"), AS_ART[what, eps], on)
        if "torchattacks" in by:
            above = by["advplug float32"]["robust accuracy"] - by["torchattacks"]["robust accuracy"]
            yield at_most(f"PGD-{result['steps']}, robust accuracy above torchattacks'", above, 0.005, on)
            off = by["torchattacks"]["seconds"] / by["advplug float32, active set off"]["seconds"]
            yield at_least("the same without leaving early, times as fast as torchattacks", off, 0.9, on)
    if "curve" in result:
        curve = result["curve"]
        budgets = f"{images}, {len(curve['budgets'])} budgets"
        yield at_most("security curve, share of the passes of single runs", curve["passes over full"], 0.35, budgets)
        yield at_most("security curve, images left above single runs", curve["images above full"], 1, budgets)
    for eps, share in result.get("overhead", {}).items():
        yield at_most("share of the time outside the model's passes", share, 0.05, f"{images}, {eps}")
    if "memory" in result:
        yield at_most("MB more for 5,000 images than for 500", result["memory"]["difference"], 50, result["model"])


def _faster(by: Mapping[str, Row], other: str, mine: str) -> float:
    return float(by[other]["seconds"] / by[mine]["seconds"])


def backends(result: Row) -> Iterator[Row]:
    """The native attack of a group, its first, against the strongest of the others."""
    for group in result["groups"]:
        first, *others = group["rows"]
        left = [r["robust accuracy"] for r in others if "failed" not in r]
        native = "." not in first["attack"].partition(":")[0]
        if native and left and "failed" not in first:
            above = round(first["robust accuracy"] - min(left), 6)
            on = f"{result['model']}, {group['norm']} {group['eps']}, {group['images']} images"
            what = f"{group['group']}, robust accuracy above the strongest of {len(left)} other backends'"
            yield at_most(what, above, 0.025, on)


def autoattack(result: Row) -> Iterator[Row]:
    for part in (result.get("cifar10"), result.get("mnist")):
        if part:
            by = {r["attack"]: r for r in part["rows"]}
            on = f"{part['what']}, {part['eps']:.4g}, {part['images']} images"
            mine, official = by["autoattack"], by["aa.standard"]
            yield at_most("AutoAttack, time beside the official code", mine["seconds"] / official["seconds"], 1.0, on)
            above = (mine["standing"] - official["standing"]) / part["images"]
            yield at_most("AutoAttack, robust accuracy above the official code's", above, 0.005, on)
    for name, share in result.get("overhead", {}).items():
        yield at_most(f"`{name}`, share of the time outside the model's passes", share, 0.05, "1/255")


# --- defenses, poisons, captions -------------------------------------------------------------------


def broken_defenses(result: Row) -> Iterator[Row]:
    rows = result["rows"]
    on = f"{result['model']} on {result['dataset']}, {result['eps']}, {result['images']} images"
    yield at_least(f"faults of {len(rows)} that are exposed", sum(map(exposed, rows)), len(rows), on)
    clean = sum(not row["twin_flags"] for row in rows)
    yield at_least(f"repaired twins of {len(rows)} without a flag", clean, len(rows), on)


def exposed(row: Row) -> bool:
    """The number is right, or called what it is through the check that names the fault."""
    named = row["verdict"] == "not trustworthy" and bool(set(row["flags"]) & set(row["checks"]))
    return named or row["reported"] <= row["broken"] + 0.01


def poisoning(result: Row) -> Iterator[Row]:
    """SafeCLIP, over all seeds that were run."""
    plain = {r["seed"]: r for r in result["rows"] if r["defense"] == "none"}
    mine = [r for r in result["rows"] if r["defense"].startswith("safeclip")]
    if not mine:
        return
    aimed = [r["poison_success_rate"] for r in mine]
    taken = sum(a["value"] * a["n"] for a in aimed) / sum(a["n"] for a in aimed)
    on = f"clip-tiny on digit-scenes, {len(mine)} trainings, {mine[0]['clean_accuracy']['n']} images each"
    worst = max(r["attack_success_rate"]["value"] for r in mine)
    yield at_most("SafeCLIP, triggered images taken for the target, most of a seed", worst, 0.05, on)
    yield at_most("SafeCLIP, targets taken over all seeds", taken, 1 / 8, on)
    lost = max(plain[r["seed"]]["clean_accuracy"]["value"] - r["clean_accuracy"]["value"] for r in mine)
    yield at_most("SafeCLIP, zero-shot accuracy lost, most of a seed", lost, 0.08, on)
    # The median: other work on the machine slows single runs.
    slower = [r["seconds_ratio"] / r["passes_ratio"] for r in mine if "seconds_ratio" in r]
    if slower:
        yield at_most("SafeCLIP, time beside what it encodes, both over the undefended training's",
                      statistics.median(slower), 1.15, on)  # fmt: skip


OURS, CAREFUL, PLAIN = "caption-pgd", "by hand, with care", "by hand, as usual"
SLOWER, QUICKER, HIGHER = 1.05, 1.3, 0.001
"""caption-pgd takes at most SLOWER times as long as the careful loop, is at least QUICKER times as fast as the usual
one, and leaves a mean cosine at most HIGHER above theirs."""


def captions(rows: Sequence[Row]) -> list[Row]:
    """The bars of the variants that were timed, with the CPU's ratios beside those of wall time."""
    by = {row["variant"]: row for row in rows}

    def bar(what: str, value: float, limit: float, most: bool) -> Row:
        holds = value <= limit if most else value >= limit
        return {"bar": what, "value": value, "at most" if most else "at least": limit, "holds": holds}

    def ratio(a: str, b: str, column: str = "seconds") -> float:
        pairs = zip(by[a][f"all {column}"], by[b][f"all {column}"], strict=True)
        return statistics.median(x / y for x, y in pairs)

    found = [
        bar(f"time beside '{CAREFUL}'", ratio(OURS, CAREFUL), SLOWER, True),
        bar(f"times as fast as '{PLAIN}'", ratio(PLAIN, OURS), QUICKER, False),
    ]
    found[0]["cpu value"], found[1]["cpu value"] = ratio(OURS, CAREFUL, "cpu"), ratio(PLAIN, OURS, "cpu")
    for other in (CAREFUL, PLAIN):
        higher = by[OURS]["cosine"] - by[other]["cosine"]
        found.append(bar(f"mean cosine above '{other}'", higher, HIGHER, True))
    return found


def clip(result: Row) -> Iterator[Row]:
    on = f"{result['model']} on {result['dataset']}, {result['eps']}, {result['images']} images"
    for found in captions(result["variants"]):
        told = {key: value for key, value in found.items() if key not in ("bar", "cpu value")}
        yield {"what": f"{OURS}, {found['bar']}", **told, "on": on}


# --- what advplug itself takes ---------------------------------------------------------------------


def executors(result: Row) -> Iterator[Row]:
    on = f"{result['cells']} cells of {result['steps']} steps, {len(result['rounds'])} rounds"
    yield at_most(f"a run on {result['workers']} of Ray's workers beside one process", result["ratio"], 0.65, on)
    same = sum(bool(row["same cells"]) for row in result["rounds"])
    yield at_least("rounds in which both give the same cells", same, len(result["rounds"]), on)


def load(result: Row) -> Iterator[Row]:
    small, large = result["rows"][0]["cells"], result["rows"][-1]["cells"]
    yield at_most("ms of one CPU a cell, apart from arithmetic", 1000 * result["seconds_a_cell"], 50, f"{large} cells")
    for name, times in result["growth"].items():
        yield at_most(f"{name}, growth of a cell's share", times, 1.5, f"{large} cells beside {small}")


def forecast(result: Row) -> Iterator[Row]:
    for name in ("passes", "seconds"):
        ratio = result[name]["ratio"]
        yield at_most(f"forecast of {name}, off by a factor", max(ratio, 1 / ratio), 2.0,
                      f"{result['matrix']}, {result['cells']} cells")  # fmt: skip


def report(result: Row) -> Iterator[Row]:
    for kind, told in result["kinds"].items():
        on = f"{told['cells']} cells, {told['images']} {kind} images each"
        yield at_most("report, MB", told["megabytes"], 3.0, on)
        yield at_most("report, seconds of one CPU", told["processor_seconds"], 10.0, on)


JUDGES: dict[str, Callable[[Row], Iterator[Row]]] = {
    "startup": startup,
    "engine": engine,
    "backends": backends,
    "autoattack": autoattack,
    "broken_defenses": broken_defenses,
    "executors": executors,
    "poisoning": poisoning,
    "clip": clip,
    "load": load,
    "forecast": forecast,
    "report": report,
}
"""By name, in the order in which they are run and shown."""
