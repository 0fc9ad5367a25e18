"""A poisoned training set as files: images that a dataset source reads back, what is poisoned, and a page to look at.

The images say nothing of poisons. With labels they lie in `train/CLASS` and `test/CLASS`, as `folder:` reads them; with
captions in `train` and `test` beside `train.jsonl` and `test.jsonl`, as `captions:` does. `poisons.json` and
`poisons.html` stand beside them and are read by neither.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from advplug.errors import UsageError
from advplug.image_folders import class_folders, in_bytes, png, write_images
from advplug.params import plain
from advplug.parse import Reference

if TYPE_CHECKING:
    from advplug.contracts import DatasetInfo, Poisoned
    from advplug.data import Split

RECORD, PAGE = "poisons.json", "poisons.html"
SHOWN = 64
"""Poisons on the page, evenly taken from all."""
SMALLEST, LARGEST = 8, 1024
"""Pixels a side that the sources read."""
_SIDE = 128
"""Pixels of the screen that a small image is enlarged to, by a whole number."""

Array = np.ndarray[Any, Any]


def write(poisoned: Poisoned, test: Split, info: DatasetInfo, folder: Path, told: Mapping[str, Any]) -> None:
    """Writes the poisoned training split and the test split to `folder` as PNG of 8 bits, with record and page.

    Grey images come back in three equal channels, floats rounded to 8 bits. `told` is put in the record: the command,
    the seed. Raises UsageError where the folder is not empty or cannot be written, after which nothing is left in it,
    and for images or classes that the sources would not give back.
    """
    folders = _class_folders(poisoned.data, test, info)
    existed = _demand_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        train_names = _write_split(poisoned.data, info, folder, "train", folders)
        test_names = _write_split(test, info, folder, "test", folders)
        record = _record(poisoned, test, info, folder, train_names, test_names, told)
        (folder / PAGE).write_text(_page(poisoned, info, record), encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except BaseException as error:
        _clear(folder, existed)
        if not isinstance(error, OSError):
            raise
        why = error.strerror or str(error)
        raise UsageError(f"the folder '{folder}' cannot be written: {why}; make room, or name another one") from error


def _demand_empty(folder: Path) -> bool:
    """Whether it is there. Raises UsageError unless it is empty or not there."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"the folder '{folder}' is not empty; name a new one for the poisoned data")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"'{folder}' is a file; name a new folder for the poisoned data")
        return folder.exists()
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be read: {error.strerror}; name another one") from error


def _clear(folder: Path, existed: bool) -> None:
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        if not existed:
            folder.rmdir()


def _class_folders(data: Split, test: Split, info: DatasetInfo) -> tuple[str, ...] | None:
    """The folder of each class, in an order that sorts; None for data with captions. Raises UsageError."""
    height, width = info.size
    if height != width or not SMALLEST <= height <= LARGEST:
        raise UsageError(
            f"images of {height} x {width} cannot be read back from files, which give squares of {SMALLEST} to "
            f"{LARGEST} pixels; use data of such a size"
        )
    if info.channels not in (1, 3):
        raise UsageError(f"images of {info.channels} channels cannot be written as PNG; it takes 1 or 3")
    if data.captions is not None:
        if test.captions is None or not (all(data.captions) and all(test.captions)):
            raise UsageError("an image without a caption cannot be read back from files; give each one a caption")
        return None
    missing = np.flatnonzero(np.bincount(data.labels, minlength=len(info.classes)) == 0)
    if len(missing):
        name = info.classes[int(missing[0])]
        raise UsageError(f"no training image of class '{name}' is left, and no folder can say so; poison fewer images")
    return class_folders(info.classes)


def _write_split(data: Split, info: DatasetInfo, folder: Path, part: str, folders: tuple[str, ...] | None) -> list[str]:
    """The files of the images, from `folder` on."""
    names = write_images(data, folder, part, folders)
    if data.captions is not None:
        lines = [
            json.dumps({"image": name, "caption": texts, **_label(info, label)}, ensure_ascii=False)
            for name, texts, label in zip(names, data.captions, data.labels.tolist(), strict=True)
        ]
        (folder / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return names


def _label(info: DatasetInfo, label: int) -> dict[str, str]:
    return {"label": info.classes[label]} if info.classes else {}


def _told(data: Split, row: int, info: DatasetInfo) -> dict[str, Any]:
    """What an image is said to show."""
    captions = {} if data.captions is None else {"captions": list(data.captions[row])}
    return {**_label(info, int(data.labels[row])), **captions}


def _record(
    poisoned: Poisoned,
    test: Split,
    info: DatasetInfo,
    folder: Path,
    train_names: Sequence[str],
    test_names: Sequence[str],
    told: Mapping[str, Any],
) -> dict[str, Any]:
    """What `poisons.json` says."""
    if poisoned.data.captions is None:
        source = Reference("folder", (("", str(folder)), ("size", str(info.size[0]))))
    else:
        paths = (("", str(folder / "train.jsonl")), ("test", str(folder / "test.jsonl")))
        source = Reference("captions", (*paths, ("size", str(info.size[0]))))
    record: dict[str, Any] = {
        "dataset": str(source),
        "run": plain(told),
        "facts": plain(poisoned.facts),
        "classes": list(info.classes),
        "poisons": [
            {
                "file": train_names[row],
                "row": row,
                **_told(poisoned.data, row, info),
                "original": _told(poisoned.originals, place, info),
            }
            for place, row in enumerate(np.flatnonzero(poisoned.poisons).tolist())
        ],
    }
    if poisoned.targets is not None:
        pairs = zip(poisoned.targets.rows.tolist(), poisoned.targets.wanted.tolist(), strict=True)
        record["targets"] = [
            {"file": test_names[row], **_told(test, row, info), "wanted": info.classes[wanted]} for row, wanted in pairs
        ]
    return record


# --- the page --------------------------------------------------------------------------------------

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Poisoned training images</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.5em }
dt { color: #555 } dd { margin: 0; overflow-wrap: anywhere }
ol { list-style: none; padding: 0; display: grid; gap: 1.2em;
  grid-template-columns: repeat(auto-fill, minmax(WIDE, 1fr)) }
li { border: 1px solid #ccc; border-radius: 4px; padding: .6em }
.pair { display: flex; gap: 1em }
figure { margin: 0; width: SIDE; overflow-wrap: anywhere }
img { width: SIDE; image-rendering: pixelated; display: block; background: #eee }
figcaption b { display: block; font-weight: 600 }
figcaption small { color: #555 }
</style>
"""


def _page(poisoned: Poisoned, info: DatasetInfo, record: Mapping[str, Any]) -> str:
    """A page without scripts and without anything to load; what comes from the data is escaped."""
    amount = len(record["poisons"])
    places = np.unique(np.linspace(0, amount - 1, min(SHOWN, amount)).round().astype(int))
    rows = np.flatnonzero(poisoned.poisons)[places]
    side = info.size[0] * max(1, _SIDE // info.size[0])
    head = _HEAD.replace("SIDE", f"{side}px").replace("WIDE", f"{2 * side + 40}px")
    facts = {"to be read as": record["dataset"], **record["run"], **record["facts"]}
    terms = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_shown(v))}</dd>\n" for k, v in facts.items())
    items = []
    if amount:
        before, after = in_bytes(poisoned.originals, places), in_bytes(poisoned.data, rows)
        for place, old, new in zip(places.tolist(), before, after, strict=True):
            poison = record["poisons"][place]
            pair = _figure("as it was", old, poison["original"]) + _figure("poisoned", new, poison)
            items.append(f'<li><div class="pair">{pair}</div><small>{html.escape(poison["file"])}</small></li>\n')
    of = f"{len(items)} of {amount} poisons" if len(items) < amount else f"All {amount} poisons"
    return (
        f"{head}<h1>Poisoned training images</h1>\n<dl>\n{terms}</dl>\n"
        f"<p>{of}, each beside its original.</p>\n<ol>\n{''.join(items)}</ol>\n</html>\n"
    )


def _figure(what: str, pixels: Array, told: Mapping[str, Any]) -> str:
    lines = [f"<b>{html.escape(told['label'])}</b>"] if "label" in told else []
    lines += [html.escape(text) for text in told.get("captions", ())]
    data = base64.b64encode(png(pixels)).decode()
    caption = f"<small>{what}</small>{'<br>'.join(lines)}"
    return f'<figure><img src="data:image/png;base64,{data}" alt="{what}"><figcaption>{caption}</figcaption></figure>'


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return "; ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if not isinstance(value, Mapping) else "; ".join(f"{k}: {_shown(v)}" for k, v in value.items())
