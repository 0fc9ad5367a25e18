"""The page: sections in order, rendered to one file of HTML that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from advplug.errors import UsageError
from advplug.report import accuracies, observations, overview, poisons
from advplug.report.headline import headline
from advplug.report.images import images
from advplug.report.parts import Data, Section, load
from advplug.store import explained

NAME = "report.html"
SECTIONS: tuple[Callable[[Data], Section | None], ...] = (
    overview.threats,
    accuracies.curves,
    accuracies.heat_maps,
    accuracies.origins,
    accuracies.trade_off,
    observations.classes,
    accuracies.transfer,
    observations.convergence,
    images,
    observations.certificates,
    poisons.poisonings,
    overview.cost,
    overview.missing,
    overview.cells,
    overview.notes,
    overview.provenance,
)
"""Between the warnings and the end; those without data are left out."""


def write(folder: Path, path: Path | None = None, explain: Callable[[Data], Section | None] | None = None) -> Path:
    """Writes the page of the runs in `folder` to `path`, or to `report.html` beside them, and returns where it is.

    `explain` makes the section of explanations. The same runs give the same bytes. Raises UsageError where `folder` is
    no run's or holds nothing yet, and where the page cannot be written.
    """
    data = load(folder)
    if not data.result.done:
        raise UsageError(f"{folder} holds no finished cell yet; run an evaluation into it first, with -o {folder}")
    target = path or folder / NAME
    if target.is_dir():
        raise UsageError(f"'{target}' is a folder; name a file with -o, like {target / NAME}")
    text = render(data, explain(data) if explain else None)
    with explained(target.parent):
        _replace(target, text.encode())
    return target


def _replace(target: Path, content: bytes) -> None:
    """All or nothing, so that a full disk leaves the page that was there."""
    handle, name = tempfile.mkstemp(prefix=".report-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render(data: Data, explanations: Section | None = None) -> str:
    """The page as text. What comes from the runs is escaped; only drawings are markup, and of our own making."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("advplug.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # Matplotlib escapes the texts that it draws.
    environment.filters["drawing"] = Markup
    script = _asset("page.js")
    made: dict[str, Any] = {
        "title": _title(data),
        "policy": _policy(script),
        "style": Markup(_asset("page.css")),  # noqa: S704 - a file of this package
        "script": Markup(script),  # noqa: S704 - likewise
        "headline": headline(data),
        "summary": _summary(data),
        "warnings": overview.warnings(data),
        "sections": _sections(data, explanations),
        "run": data.result.run,
    }
    return environment.get_template("page.html.j2").render(made)


def _sections(data: Data, explanations: Section | None) -> Sequence[Section]:
    made = []
    for make in SECTIONS:
        section = make(data)
        if section is not None:
            made.append(section)
        if make is images and explanations is not None:
            made.append(explanations)
    return made


def _asset(name: str) -> str:
    return (files("advplug.report") / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but the page's own."""
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _title(data: Data) -> str:
    rows = data.result.done
    models, datasets = (list(dict.fromkeys(getattr(r, k) for r in rows)) for k in ("model", "dataset"))
    shown = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    return f"Robustness of {shown} on {', '.join(datasets[:3])}"


def _summary(data: Data) -> str:
    """What the page is about, in one line."""
    rows = data.result.done
    states = {s: sum(r.status == s for r in rows) for s in ("ok", "failed", "refused")}
    told = ", ".join(f"{n} {s}" for s, n in states.items() if n)
    return f"{len(rows)} cells: {told}."
