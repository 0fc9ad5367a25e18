"""How captions are written down: Flickr8k's files, COCO's, and tables of the user's own. Imports no torch."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advplug.errors import UsageError, did_you_mean
from advplug_clip.caption_files import Parts, Row, Table, Trouble, table

IMAGE_COLUMNS = ("image", "image_path", "image_name", "path", "file_name", "filename", "filepath", "file", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences", "description")
_GHOST = "2258277193_586949ec62.jpg.1"
"""Named by the official Flickr8k.token.txt, and in no copy of the images."""


# --- Flickr8k --------------------------------------------------------------------------------------


def read_flickr8k(path: Path, trouble: Trouble) -> Parts:
    """Flickr8k as it is distributed (Flickr8k.token.txt) or as Kaggle has it (captions.txt).

    The official lists of training and test images are used where both are there. Raises UsageError.
    """
    text = find(path, ("captions.txt", "Flickr8k.token.txt"), ("", "Flickr8k_text"), "a file of captions")
    images = find(path, ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images"), ("", "Flicker8k_Dataset"),
                  "a folder of images")  # fmt: skip
    rows = [r for r in (_tokens(text) if text.suffix == ".txt" and "token" in text.name else _kaggle(text))
            if r.image != _GHOST]  # fmt: skip
    lists = [text.parent / f"Flickr_8k.{part}Images.txt" for part in ("train", "test")]

    def part(wanted: Sequence[str] | None) -> Table:
        return table(rows, images, trouble, lambda name: f"flickr:{name.partition('_')[0]}", wanted)

    if not all(p.is_file() for p in lists):
        return None, part(None)
    train, test = ([line.strip() for line in lines(p) if line.strip()] for p in lists)
    both = set(train) & set(test)
    if both:
        raise UsageError(f"'{sorted(both)[0]}' is in the lists of training and of test images; take it out of one")
    return part(train), part(test)


def _tokens(path: Path) -> Iterator[Row]:
    """Lines `IMAGE#NUMBER<tab>CAPTION`."""
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        image, mark, _ = name.rpartition("#")
        if not tab or not mark:
            raise UsageError(f"{path}:{number} is not IMAGE#NUMBER, a tab and a caption")
        yield Row(image, caption, f"{path}:{number}")


def _kaggle(path: Path) -> Iterator[Row]:
    """Lines `IMAGE,CAPTION` below a heading; a caption may hold commas that nobody quoted."""
    for number, cells in _cells(path, ","):
        if number > 1 or [c.strip().lower() for c in cells] != ["image", "caption"]:
            yield Row(cells[0].partition("#")[0], ",".join(cells[1:]), f"{path}:{number}")


# --- COCO ------------------------------------------------------------------------------------------


def read_coco(path: Path, year: int | None, trouble: Trouble) -> Parts:
    """annotations/captions_{train,val}YEAR.json with folders of images named like them; the newest year.

    With the val file alone nothing can be trained on; the train file alone is split. Raises UsageError.
    """
    folder = find(path, ("annotations", "."), ("",), "a folder of annotations")
    files = {(m[1], int(m[2])): p for p in sorted(folder.glob("captions_*.json"))
             if (m := re.fullmatch(r"captions_(train|val)(\d{4})", p.stem))}  # fmt: skip
    years = sorted({y for _, y in files})
    if not years or (year is not None and year not in years):
        have = ", ".join(map(str, years)) or "none"
        what = "captions_train2017.json or captions_val2017.json" if year is None else f"captions of year={year}"
        raise UsageError(f"coco-captions: '{folder}' holds no {what} (years there: {have}); check the path")
    chosen = year or years[-1]
    parts = {kind: _coco_table(path, files[kind, chosen], f"{kind}{chosen}", trouble)
             for kind in ("train", "val") if (kind, chosen) in files}  # fmt: skip
    if "val" not in parts:
        return None, parts["train"]
    return parts.get("train", Table(path, (), (), ())), parts["val"]


def _coco_table(path: Path, file: Path, part: str, trouble: Trouble) -> Table:
    try:
        content = json.loads(read_text(file))
        names = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
        written = [(int(a["image_id"]), str(a["caption"]), a.get("id", "?")) for a in content["annotations"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"'{file}' is no COCO file of captions ({type(error).__name__}: {error})") from error
    rows = []
    for image, caption, number in written:
        if image in names:
            rows.append(Row(str(image), caption, f"{file}, annotation {number}"))
        else:
            trouble.found(f"{file}, annotation {number}: there is no image {image} in the file")
    root = find(path, (part, "."), ("", "images"), "a folder of images")
    return table(rows, root, trouble, lambda i: f"coco:{i}", [str(i) for i in names], lambda i: names[int(i)])


# --- tables of the user's own ----------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Which columns hold the image and the caption (None: a usual name), and the folder that paths start from."""

    image: str | None
    caption: str | None
    root: Path | None


def read_captions(path: Path, test: Path | None, columns: Columns, trouble: Trouble) -> Parts:
    """CSV, TSV, JSON lines or a JSON list, one caption or a list of captions a row. Raises UsageError."""
    first = _own_table(path, columns, trouble)
    return (None, first) if test is None else (first, _own_table(test, columns, trouble))


def _own_table(path: Path, columns: Columns, trouble: Trouble) -> Table:
    root = columns.root or path.parent
    if not root.is_dir():
        raise UsageError(f"captions: there is no folder '{root}'; check root")
    rows = list(_json_rows(path, columns) if path.suffix.lower() in (".json", ".jsonl") else _csv_rows(path, columns))
    if not rows:
        raise UsageError(f"'{path}' holds no row; it takes one or more for each image")
    return table(rows, root, trouble, lambda name: str((root / name).absolute()))


def _csv_rows(path: Path, columns: Columns) -> Iterator[Row]:
    found = _cells(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    _, header = next(found, (0, []))
    if not header:
        return
    header = [name.strip() for name in header]
    if len(header) == 1 and re.search("[,;\t]", header[0]):
        raise UsageError(f"{path}: '{header[0]}' is one column; separate by commas, or by tabs in a file named .tsv")
    image, caption = (header.index(name) for name in _columns(path, header, columns))
    for number, cells in found:
        where = f"{path}:{number}"
        if len(cells) > len(header) and caption == len(header) - 1:
            cells = [*cells[:caption], ",".join(cells[caption:])]
        if len(cells) != len(header):
            advice = "quote what holds a comma" if len(cells) > len(header) else "fill in what is missing"
            raise UsageError(f"{where} has {len(cells)} cells, the heading {len(header)}; {advice}")
        yield Row(cells[image].strip(), cells[caption], where)


def _json_rows(path: Path, columns: Columns) -> Iterator[Row]:
    image = caption = ""
    for where, item in _json_items(path):
        if not isinstance(item, dict):
            raise UsageError(f"{where} is no JSON object with an image and a caption")
        if not image:
            image, caption = _columns(path, list(item), columns)
        name, texts = item.get(image), item.get(caption, "")
        texts = texts if isinstance(texts, list) else [texts]
        if not isinstance(name, str) or not all(isinstance(t, str | None) for t in texts):
            raise UsageError(f"{where}: '{image}' takes a path, '{caption}' a text or a list of texts")
        yield from (Row(name, t or "", where) for t in texts or [""])


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        try:
            items = json.loads(read_text(path))
        except ValueError as error:
            raise UsageError(f"'{path}' is no JSON ({error}); JSON lines are named .jsonl") from error
        if not isinstance(items, list):
            raise UsageError(f"'{path}' is no list of objects (COCO's files: coco-captions:FOLDER)")
        yield from ((f"{path}, item {i}", item) for i, item in enumerate(items))
        return
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}:{number} is no JSON ({error})") from error


def _columns(path: Path, have: list[str], columns: Columns) -> tuple[str, str]:
    return column(path, have, "image", columns.image), column(path, have, "caption", columns.caption)


def column(what: object, have: Sequence[str], role: str, given: str | None) -> str:
    """The column `given`, or the first usual one for that role. Raises UsageError that names those there are."""
    usual = IMAGE_COLUMNS if role == "image" else CAPTION_COLUMNS
    name = given or next((n for n in usual if n in have), None)
    if name is None or name not in have:
        missing = f"no column '{name}'" if name else f"no column for the {role}"
        near = difflib.get_close_matches(role, have, n=1)
        hint = did_you_mean(name, have) if name else "".join(f"; did you mean {role}={n}?" for n in near)
        hint = hint or f"; it has {', '.join(have) or 'none'}: write {role}=COLUMN"
        raise UsageError(f"'{what}' has {missing}{hint}")
    return name


# --- files -----------------------------------------------------------------------------------------


def find(path: Path, names: Sequence[str], below: Sequence[str], what: str) -> Path:
    """The first of `names` that is there, in `path` or its folders `below`. Raises UsageError."""
    if not path.is_dir():
        raise UsageError(f"there is no folder '{path}'; check the path")
    found = next((path / b / n for n in names for b in below if (path / b / n).exists()), None)
    if found is None:
        raise UsageError(f"'{path}' has not {what} ({', '.join(n for n in names if n != '.')}); check the path")
    return found


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"the file '{path}' cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it") from error


def lines(path: Path) -> list[str]:
    """The lines of a file; only line feeds end them, since captions may hold other separators."""
    return read_text(path).split("\n")


def _cells(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not blank."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator)
    try:
        for cells in reader:
            if any(c.strip() for c in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num} cannot be read as a table: {error}") from error
