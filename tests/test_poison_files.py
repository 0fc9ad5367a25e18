"""A poisoned set as files: what is read back, what record and page say, and a line for what cannot be written."""

from __future__ import annotations

import base64
import errno
import html.parser
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from advplug.contracts import DatasetInfo, Poisoned, Targets, Trigger
from advplug.data import ArrayImages, Dataset, Split
from advplug.errors import UsageError
from advplug.poisons.files import write
from dataset_tools import make

TOLD = {"command": "advplug poison fake a<b>", "seed": 3, "dataset": {"name": "fake"}}


def split(n: int, channels: int, size: int = 12, classes: int = 3, captions: bool = False, seed: int = 0) -> Split:
    draw = np.random.RandomState([seed, channels])
    images = draw.randint(0, 256, (n, channels, size, size), dtype=np.uint8)
    texts = tuple((f"text {i} <i>", f'größer, "{i}"') for i in range(n)) if captions else None
    return Split(ArrayImages(images), np.arange(n) % classes, np.arange(n), texts)


def case(
    channels: int = 1, captions: bool = False, names: tuple[str, ...] = ("cat", "dog", "owl"), n: int = 30, **more: int
) -> tuple[Poisoned, Split, DatasetInfo]:
    """Three images darkened and called the first class."""
    train = split(n, channels, captions=captions, **more)
    test = split(9, channels, captions=captions, seed=1, **more)
    rows = np.array([4, 7, 20])
    pixels = (train.batch(rows).x * 127).byte().numpy()
    texts = [("now <script>",)] * 3
    data = train.changed(rows, pixels, np.zeros(3, np.int64), texts)
    poisons = np.zeros(n, dtype=bool)
    poisons[rows] = True
    trigger = Trigger(lambda x, index: x, torch.zeros_like)
    size = test.batch(np.arange(1)).x.shape[2:]
    info = DatasetInfo(names, channels, (size[0], size[1]), {}, captions=captions)
    return Poisoned(data, poisons, train.subset(rows), trigger, facts={"poisons": 3, "rate": 0.1}), test, info


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "poisons.json").read_text())
    return found


def reloaded(folder: Path) -> Dataset:
    return make(record(folder)["dataset"]).load(offline=True)


def by_row(data: Split) -> Split:
    """In the order of the file names, which is that of the rows."""
    paths: list[Path] = list(data.images.paths)  # type: ignore[attr-defined]
    return data.subset(np.argsort([int(p.stem) for p in paths]))


def pixels(data: Split) -> torch.Tensor:
    return (data.batch(np.arange(len(data))).x * 255).round()


# --- what is read back -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_and_pixels_come_back(tmp_path: Path, channels: int) -> None:
    made, test, info = case(channels)
    write(made, test, info, tmp_path / "out", TOLD)
    data = reloaded(tmp_path / "out")
    assert data.info.classes == info.classes
    for found, expected in ((data.train, made.data), (data.test, test)):
        back = by_row(found)
        assert np.array_equal(back.labels, expected.labels)
        assert torch.equal(pixels(back), pixels(expected).expand(-1, 3, -1, -1))


def test_captions_come_back(tmp_path: Path) -> None:
    made, test, info = case(3, captions=True)
    write(made, test, info, tmp_path / "a, b", TOLD)
    data = reloaded(tmp_path / "a, b")
    for found, expected in ((data.train, made.data), (data.test, test)):
        back = by_row(found)
        assert back.captions == expected.captions
        assert torch.equal(pixels(back), pixels(expected))
    line = json.loads((tmp_path / "a, b" / "train.jsonl").read_text().splitlines()[4])
    assert line == {"image": "train/04.png", "caption": ["now <script>"], "label": "cat"}


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("a", "b", "c"), ["a", "b", "c"]),
        (("zebra", "ant", "a/b"), ["0-zebra", "1-ant", "2-a_b"]),
        (("a", ".b", "c"), ["0-a", "1-.b", "2-c"]),
        (("A", "__MACOSX", "c"), ["0-A", "1-__MACOSX", "2-c"]),
    ],
)
def test_classes_keep_their_numbers(tmp_path: Path, names: tuple[str, ...], folders: list[str]) -> None:
    made, test, info = case(names=names)
    write(made, test, info, tmp_path, TOLD)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == folders
    assert np.array_equal(by_row(reloaded(tmp_path).train).labels, made.data.labels)
    assert record(tmp_path)["classes"] == list(names)


def test_a_class_without_test_images_has_no_folder_there(tmp_path: Path) -> None:
    made, test, info = case()
    write(made, test.subset(np.array([0, 1, 3])), info, tmp_path, TOLD)
    assert sorted(p.name for p in (tmp_path / "test").iterdir()) == ["cat", "dog"]
    assert reloaded(tmp_path).test.labels.max() == 1


# --- what is said of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [False, True])
def test_the_record_tells_what_was_done_and_the_data_do_not(tmp_path: Path, captions: bool) -> None:
    made, test, info = case(captions=captions)
    write(made, test, info, tmp_path, TOLD)
    told = record(tmp_path)
    assert told["run"] == TOLD
    assert told["facts"] == {"poisons": 3, "rate": 0.1}
    assert [p["row"] for p in told["poisons"]] == [4, 7, 20]
    for poison in told["poisons"]:
        assert (tmp_path / poison["file"]).is_file()
        assert poison["label"] == "cat"
        assert poison["original"]["label"] == info.classes[poison["row"] % 3]
        assert poison.get("captions") == (["now <script>"] if captions else None)
        if captions:
            assert poison["original"]["captions"] == list(split(30, 1, captions=True).captions[poison["row"]])
    others = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("poisons.json", "poisons.html")]
    assert len(others) == 39 + 2 * captions
    assert not any("poison" in p.relative_to(tmp_path).as_posix() for p in others)
    assert "targets" not in told


def test_targets_are_recorded(tmp_path: Path) -> None:
    made, test, info = case()
    targets = Targets(np.array([2, 5]), np.array([0, 1]))
    write(Poisoned(made.data, made.poisons, made.originals, None, targets), test, info, tmp_path, TOLD)
    assert record(tmp_path)["targets"] == [
        {"file": "test/owl/2.png", "label": "owl", "wanted": "cat"},
        {"file": "test/owl/5.png", "label": "owl", "wanted": "dog"},
    ]


class Page(html.parser.HTMLParser):
    """Images, texts and tags; fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[np.ndarray[Any, Any]] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            kind, _, code = (dict(attrs)["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_shows_poisons_beside_what_they_were(tmp_path: Path, channels: int) -> None:
    made, test, info = case(channels, captions=True)
    write(made, test, info, tmp_path, TOLD)
    text = (tmp_path / "poisons.html").read_text()
    page = Page(text)
    before, after = pixels(made.originals), pixels(made.data.subset(np.array([4, 7, 20])))
    expected = torch.stack([before, after], dim=1).flatten(0, 1).permute(0, 2, 3, 1).squeeze(3).byte().numpy()
    assert np.array_equal(np.stack(page.images), expected)
    for words in ("All 3 poisons, each beside its original.", "text 4 <i>", "now <script>", "train/04.png",
                  "advplug poison fake a<b>", "0.1"):  # fmt: skip
        assert words in page.texts
    assert not page.tags & {"script", "link", "i", "iframe"}
    assert "http:" not in text
    assert "https:" not in text
    assert "Content-Security-Policy" in text
    assert "image-rendering: pixelated" in text


def test_the_page_shows_some_of_many(tmp_path: Path) -> None:
    train = split(200, 1)
    data = train.changed(np.arange(150), np.zeros((150, 1, 12, 12), np.uint8))
    poisons = np.arange(200) < 150
    made = Poisoned(data, poisons, train.subset(np.arange(150)), Trigger(lambda x, i: x, torch.zeros_like))
    write(made, split(9, 1), DatasetInfo(("a", "b", "c"), 1, (12, 12), {}), tmp_path, {})
    page = Page((tmp_path / "poisons.html").read_text())
    assert len(page.images) == 128
    assert "64 of 150 poisons, each beside its original." in page.texts
    assert {"train/a/000.png", "train/c/149.png"} <= set(page.texts)


# --- what cannot be written ------------------------------------------------------------------------


def refused(folder: Path, made: Poisoned, test: Split, info: DatasetInfo, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        write(made, test, info, folder, TOLD)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(tmp_path, *case(), "is not empty", "name a new one")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    refused(tmp_path / "mine.txt", *case(), "is a file")
    refused(tmp_path / "mine.txt" / "below", *case(), "cannot be", "name another one")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.stem == "20":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(tmp_path / "new", *case(), "cannot be written", "No space left on device", "make room")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    refused(tmp_path / "there", *case(), "No space left")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused(tmp_path / "new", *case(), "cannot be written", "Permission denied")


def test_what_the_sources_would_not_give_back(tmp_path: Path) -> None:
    made, test, info = case()
    for size in ((12, 16), (7, 7), (1025, 1025)):
        refused(tmp_path, made, test, DatasetInfo(info.classes, 1, size, {}), "cannot be read back", "squares")
    refused(tmp_path, made, test, DatasetInfo(info.classes, 4, (12, 12), {}), "4 channels")
    four = DatasetInfo((*info.classes, "yak"), 1, (12, 12), {})
    refused(tmp_path, made, test, four, "no training image of class 'yak'", "fewer")
    silent = split(9, 1)
    made, _, info = case(captions=True)
    refused(tmp_path, made, silent, info, "without a caption")
    assert not list(tmp_path.iterdir())
