"""Makes a Jupyter notebook of an example in percent format: `python notebook.py fooled.py [-o fooled.ipynb]`.

Cells begin with `# %%`, those of text with `# %% [markdown]`, each line of which is a comment; Jupytext reads the same
files. The notebook holds no output: run it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARK = re.compile(r"^# %%[ ]*(\[markdown\])?[ ]*$", re.MULTILINE)


def notebook(text: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of a script. Raises ValueError where it has no cells or text that is no comment."""
    head, *parts = MARK.split(text)
    if head.strip() or not parts:
        raise ValueError("the file has to begin with a cell: # %% or # %% [markdown]")
    kinds = ["markdown" if mark else "code" for mark in parts[::2]]
    cells = [_cell(kind, body, number) for number, (kind, body) in enumerate(zip(kinds, parts[1::2], strict=True))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4, "nbformat_minor": 5}  # fmt: skip


def _cell(kind: str, body: str, number: int) -> dict[str, Any]:
    lines = body.strip("\n").split("\n")
    if kind == "markdown":
        stray = [line for line in lines if line and not re.match("#( |$)", line)]
        if stray:
            raise ValueError(f"in a cell of text every line is a comment, unlike {stray[0]!r}")
        lines = [line[2:] for line in lines]
    source = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
    made = {"cell_type": kind, "id": hashlib.sha256(f"{number} {body}".encode()).hexdigest()[:8], "metadata": {},
            "source": source}  # fmt: skip
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: beside the script")
    given = parser.parse_args(arguments)
    output = given.output or given.script.with_suffix(".ipynb")
    try:
        made = notebook(given.script.read_text())
        output.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        parser.error(f"{given.script}: {error}")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
