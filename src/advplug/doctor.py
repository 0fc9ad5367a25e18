"""`advplug doctor`: what is installed, what is broken, and what to do about it."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import os
import platform
import re
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from advplug import __version__, hooks
from advplug.errors import AdvplugError
from advplug.registry import Registry, registry

Level: TypeAlias = Literal["ok", "warn", "problem"]
_AT_LEAST = re.compile(r"([A-Za-z0-9_.\-]+)\s*>=\s*([0-9.]+)")
_LONGEST = 40


@dataclass(frozen=True)
class Line:
    """One finding; `remedy` says what to do where something can be done."""

    level: Level
    what: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, in the order in which they were looked for."""

    lines: tuple[Line, ...]

    @property
    def exit_code(self) -> int:
        """1 if there is a problem, else 0."""
        return int(any(line.level == "problem" for line in self.lines))


def examine(quick: bool = False) -> Report:
    """Looks at the installation. `quick` imports no torch, and so cannot tell whether torch works."""
    parts: list[Callable[[], Iterator[Line]]] = [_python, _requirements, _torchattacks, _plugins, _cache, _cpu]
    if not quick:
        parts += [_targets, _torchvision, _accelerators]
    lines: list[Line] = []
    for part in parts:
        try:
            lines += part()
        except Exception as error:  # a doctor that falls ill helps nobody
            name = part.__name__.strip("_")
            lines.append(Line("problem", name, f"cannot be examined: {type(error).__name__}: {error}"))
    return Report(tuple(lines))


def render(report: Report) -> str:
    """The report as plain text, one finding a line and its remedy below it."""
    width = min(_LONGEST, max(len(line.what) for line in report.lines))
    rows = []
    for line in report.lines:
        rows.append(f"{line.level:<8} {line.what:<{width}}  {' '.join(line.detail.split())}")
        if line.remedy:
            rows.append(f"{'':<8} {'':<{width}}  -> {line.remedy}")
    counts = {level: sum(line.level == level for line in report.lines) for level in ("problem", "warn")}
    rows.append("")
    rows.append(", ".join(f"{n} {level}{'s' if n != 1 else ''}" for level, n in counts.items() if n) or "all is well")
    return "\n".join(rows)


def version_of(name: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- the installation ------------------------------------------------------------------------------


def _python() -> Iterator[Line]:
    fine = sys.version_info >= (3, 11)
    remedy = "" if fine else "install Python 3.11 or later"
    yield Line("ok" if fine else "problem", "python", f"{platform.python_version()} on {platform.system()}", remedy)
    yield Line("ok", "advplug", f"{__version__} in {Path(__file__).parent}")


def _requirements() -> Iterator[Line]:
    """Every hard dependency with the least version that advplug asks for."""
    for requirement in metadata.requires("advplug") or []:
        match = _AT_LEAST.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        name, least = match.groups()
        found = version_of(name)
        if found is None:
            yield Line("problem", name, "is not installed", f"pip install '{name}>={least}'")
        elif _numbers(found) < _numbers(least):
            yield Line("problem", name, f"{found} is too old", f"pip install '{name}>={least}'")
        else:
            yield Line("ok", name, found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


# --- torchattacks and its stray package ------------------------------------------------------------


def _torchattacks() -> Iterator[Line]:
    found = version_of("torchattacks")
    if found is None:
        yield Line("ok", "torchattacks", "not installed; only its wrapper plugin needs it")
    else:
        yield _requests_pin(found)
    yield from _robustbench()


def _requests_pin(version: str) -> Line:
    """torchattacks pins requests to its 2020 version and works with today's."""
    pins = [r for r in metadata.requires("torchattacks") or [] if r.startswith("requests") and "extra ==" not in r]
    requests = version_of("requests")
    if not pins:
        return Line("ok", "torchattacks", version)
    if requests is not None and _numbers(requests)[:2] == _numbers(pins[0])[:2]:
        detail = f"{version}; it holds requests at {requests}, and urllib3, idna and chardet with it"
        remedy = f"pip install --no-deps torchattacks=={version} && pip install --upgrade requests"
        return Line("warn", "torchattacks", detail, remedy)
    have = f"requests {requests} is installed" if requests else "requests is not installed"
    detail = f"{version}; it asks for {pins[0]} and {have}: right for an installation with --no-deps, "
    return Line("ok", "torchattacks", detail + "and what 'pip check' says about it can be ignored")


def _robustbench() -> Iterator[Line]:
    """The wheel of torchattacks carries files of a package that it does not own."""
    stray = {str(f) for f in metadata.files("torchattacks") or []} if version_of("torchattacks") else set()
    stray = {f for f in stray if f.startswith("robustbench/")}
    if version_of("robustbench") is None:
        if stray:
            detail = (
                f"'import robustbench' finds {len(stray)} files of 2022 out of torchattacks' wheel, not robustbench"
            )
            yield Line("warn", "robustbench", detail, "do not use it from there; see 'pip install robustbench'")
        return
    damaged = [str(f) for f in metadata.files("robustbench") or [] if _damaged(f)]
    if not damaged:
        yield Line("ok", "robustbench", str(version_of("robustbench")))
        return
    blame = " (torchattacks' wheel holds files of the same names)" if stray & set(damaged) else ""
    detail = f"{len(damaged)} of its files were changed or removed{blame}: {damaged[0]}"
    yield Line("problem", "robustbench", detail, "pip install --force-reinstall --no-deps robustbench")


def _damaged(file: metadata.PackagePath) -> bool:
    """Whether a file is gone, or is not what its distribution's record says."""
    if not str(file).endswith(".py"):
        return False
    path = Path(str(file.locate()))
    if not path.is_file():
        return True
    if file.hash is None or file.hash.mode != "sha256":
        return False
    digest = urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    return digest != file.hash.value


# --- plugins ---------------------------------------------------------------------------------------


def _plugins() -> Iterator[Line]:
    found = registry()
    for source in found.sources:
        counts = {kind: sum(e.source == source for e in found.entries(kind)) for kind in hooks.KINDS}
        text = ", ".join(f"{n} {kind if n == 1 else _plural(kind)}" for kind, n in counts.items() if n)
        yield Line("ok", f"plugin {source.plugin}", f"{source}: {text or 'nothing registered'}")
    for broken in found.broken:
        remedy = (
            f"repair or uninstall {broken.source.distribution}, or set ADVPLUG_DISABLE_PLUGINS={broken.source.plugin}"
        )
        yield Line("problem", f"plugin {broken.source.plugin}", f"{broken.source}: {broken.reason}", remedy)
    for kind, name in found.duplicates:
        reason, _, remedy = found.duplicate_reason(kind, name).partition("; ")
        yield Line("problem", f"{kind} {name}", reason, remedy)


def _plural(kind: str) -> str:
    return kind + "s"


def _targets() -> Iterator[Line]:
    """Every registration's factory can be imported and its parameters read."""
    found: Registry = registry()
    for entry in (e for kind in hooks.KINDS for e in found.entries(kind)):
        try:
            entry.params()
        except AdvplugError as error:
            yield Line("problem", entry.label, str(error), f"report this to the authors of {entry.source}")


# --- the machine -----------------------------------------------------------------------------------


def _cache() -> Iterator[Line]:
    from advplug.artifacts import default_root

    folder = default_root()
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "make it writable, or set ADVPLUG_CACHE to a folder that is"
        yield Line("problem", "cache", f"{folder} cannot be written: {error.strerror or error}", remedy)
    else:
        yield Line("ok", "cache", f"{folder}, {size / 2**20:.1f} MiB of trained weights")


def _cpu() -> Iterator[Line]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS")
    note = f"; OMP_NUM_THREADS={limit} limits torch" if limit else ""
    yield Line("ok", "cpu", f"{usable} cores{note}")


def _torchvision() -> Iterator[Line]:
    from advplug import vision

    state = vision.state()
    if state == "ok":
        yield Line("ok", "torchvision works", "yes")
    elif state == "repaired":
        detail = "models, transforms and datasets work; detection operators and torchvision.io codecs do not load"
        yield Line("ok", "torchvision works", f"{detail} beside this torch build, and advplug needs neither")
    else:
        remedy = f"install the torchvision that was built for torch {version_of('torch')}, from the same place"
        yield Line("problem", "torchvision works", state, remedy)


def _accelerators() -> Iterator[Line]:
    import torch

    yield Line("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Line("ok", "cuda", f"{names} (--device cuda)")
    else:
        yield Line("ok", "cuda", "not available")
    if torch.backends.mps.is_available():
        yield Line("ok", "mps", "available (--device mps)")
    fast = _cpu_bfloat16()
    yield Line("ok", "bfloat16", f"{fast}: precision=auto may use it in attack passes" if fast else "no CPU support")


def _cpu_bfloat16() -> str:
    """The CPU's bfloat16 instructions, as Linux names them; empty where there are none or it cannot be told."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ""
    return " and ".join(sorted(flags & {"avx512_bf16", "amx_bf16"}))
