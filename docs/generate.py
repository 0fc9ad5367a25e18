"""Writes the generated parts of the documentation anew: `python docs/generate.py` (make docs)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from advplug.catalogue import attacks_markdown
from advplug.registry import Registry, registry

HERE = Path(__file__).parent
OURS = ("advplug", "advplug-advlib", "advplug-art", "advplug-autoattack", "advplug-torchattacks")


def own(known: Registry) -> Registry:
    """The registrations of this repository's distributions."""
    tables = {
        kind: {name: e for name, e in table.items() if e.source.distribution in OURS}
        for kind, table in known.tables.items()
    }
    return Registry(tables, {}, (), tuple(s for s in known.sources if s.distribution in OURS))


def filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- {name}: generated -->\n).*?(\n<!-- end of {name} -->)"
    found, count = re.subn(pattern, lambda m: m[1] + content + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"there is no place for '{name}'")
    return found


def attacks_page() -> tuple[Path, str]:
    path = HERE / "attacks.md"
    return path, filled(path.read_text(), "attacks", attacks_markdown(own(registry())))


def main() -> None:
    for path, text in (attacks_page(),):
        path.write_text(text)
        sys.stderr.write(f"{path.name} is up to date\n")


if __name__ == "__main__":
    main()
