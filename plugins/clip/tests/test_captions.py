"""Captioned datasets in files and from the hub: what is read, how it is split, and a line for what is wrong."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advplug.errors import UsageError
from advplug.leakage import find_leaks
from advplug.naming import named_most, naming
from advplug.skipping import all_skipping
from advplug_clip import hub_captions
from cli_tools import run
from dataset_tools import make, rejects

WORDS = ("a red ball", "the cat, asleep", 'he said "no"', "two dogs", "snow")


def images(folder: Path, names: list[str], seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.RandomState(seed)
    for name in names:
        Image.fromarray(draw.randint(0, 256, (14, 20, 3), dtype=np.uint8)).save(folder / name)


@pytest.fixture
def shop(tmp_path):
    """Ten images with two captions each, as CSV."""
    names = [f"{i}.png" for i in range(10)]
    images(tmp_path / "pics", names)
    rows = ["image,caption,price"]
    for i, name in enumerate(names):
        rows += [f'pics/{name},"{WORDS[(i + k) % 5].replace(chr(34), chr(34) * 2)}",{k}' for k in (0, 1)]
    (tmp_path / "shop.csv").write_text("\n".join(rows))
    return tmp_path / "shop.csv"


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


# --- tables ----------------------------------------------------------------------------------------


def test_csv(shop, tmp_path):
    source = make(f"captions:{shop},size=12")
    info, data = source.info(), source.load()
    assert (info.classes, info.channels, info.size, info.captions, info.trainable) == ((), 3, (12, 12), True, True)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert data.train.batch(np.arange(8)).x.shape == (8, 3, 12, 12)
    assert not data.train.labels.any()
    by_file = {}
    for split in (data.train, data.test):
        by_file |= dict(zip([Path(n).name for n in split.names], split.captions, strict=True))
    assert by_file == {f"{i}.png": (WORDS[i % 5], WORDS[(i + 1) % 5]) for i in range(10)}
    assert not find_leaks(data.train, data.test)
    assert data.notes == ()
    again = make(f"captions:{shop},size=12")
    assert again.fingerprint() == source.fingerprint()
    assert again.load().test.names == data.test.names
    assert (len(make(f"captions:{shop},train=0.5,n=1").load().train)) == 4
    edited(shop, "two dogs", "three dogs")
    assert make(f"captions:{shop},size=12").fingerprint() != source.fingerprint()


def test_the_same_as_json_lines_and_tabs(shop, tmp_path):
    expected = make(f"captions:{shop}").load()
    rows = [{"path": f"{i}.png", "text": [WORDS[i % 5], WORDS[(i + 1) % 5]], "more": None} for i in range(10)]
    (tmp_path / "shop.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "shop.json").write_text(json.dumps([{**r, "bild": r["path"], "worte": r["text"]} for r in rows]))
    lines = [f"{i}.png\t{WORDS[(i + k) % 5]}" for i in range(10) for k in (0, 1) if '"' not in WORDS[(i + k) % 5]]
    (tmp_path / "shop.tsv").write_text("\ufefffile_name\tsentence\n" + "\r\n".join(lines), encoding="utf-8")
    pics = tmp_path / "pics"
    for text in ("shop.jsonl", "shop.json,image=bild,caption=worte"):
        found = make(f"captions:{tmp_path}/{text},root={pics}").load()
        captions = {Path(n).name: c for n, c in zip(found.train.names, found.train.captions, strict=True)}
        for name, own in zip(expected.train.names, expected.train.captions, strict=True):
            assert captions.get(Path(name).name, own) == own
        assert len(found.train) == 8
    assert len(make(f"captions:{tmp_path}/shop.tsv,root={pics}").load().train) == 8


def test_a_file_of_its_own_for_testing(shop, tmp_path):
    images(tmp_path, ["x.png", "y.png"], seed=1)
    (tmp_path / "test.csv").write_text("image,caption\nx.png,a boat, at sea\ny.png,hills\n")
    data = make(f"captions:{shop},test={tmp_path / 'test.csv'}").load()
    assert (len(data.train), len(data.test)) == (10, 2)
    assert set(data.test.captions) == {("a boat, at sea",), ("hills",)}, "the last column may hold commas"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"a red ball"', '" "', ["shop.csv:2", "caption of 'pics/0.png' is empty", "skip_bad=true"]),
        ("pics/0.png", "pics/none.png", ["none.png' is not there", "skip_bad=true"]),
        ("image,caption,price", "image,words,price", ["no column for the caption", "image, words, price", "caption="]),
        ("image,caption,price", "bild,caption,price", ["no column for the image", "image=COLUMN"]),
        ('"a red ball",0', "a, red, ball,0", ["shop.csv:2", "5 cells", "3"]),
        ('"a red ball",0', '"a red ball"', ["shop.csv:2 has 2 cells, the heading 3; fill in what is missing"]),
        ("image,caption,price", "image,captoin,price", ["no column for the caption; did you mean caption=captoin?"]),
        ("pics/0.png", "", ["shop.csv:2 names no image", "skip_bad=true"]),
        ("pics/0.png", "pics", ["pics' is a folder", "skip_bad=true"]),
        ("pics/0.png", "https://a.b/0.png", ["shop.csv:2: 'https://a.b/0.png' is an address", "download", "skip_bad"]),
        ("image,caption,price", "image;caption;price", ["'image;caption;price' is one column", "commas"]),
        ("image,caption,price", "image\tcaption\tprice", ["is one column", ".tsv"]),
    ],
)
def test_tables_that_cannot_be_used(shop, old, new, words):
    edited(shop, old, new)
    rejects(f"captions:{shop}", *words)


def test_other_tables_that_cannot_be_used(shop, tmp_path):
    rejects(f"captions:{shop},caption=captoin", "no column 'captoin'", "did you mean 'caption'")
    rejects(f"captions:{shop},root={tmp_path / 'none'}", "no folder")
    rejects(f"captions:{tmp_path / 'none.csv'}", "cannot be read")
    rejects(f"captions:{shop},size=64,resize=32", "resize=32 is below size=64")
    rejects(f"captions:{shop},n=3", "2 test images")
    bad = tmp_path / "bad.jsonl"
    for text, words in {
        '{"image": "a.png"': ["bad.jsonl:1 is no JSON"],
        "[1]": ["bad.jsonl:1 is no JSON object"],
        '{"image": 3, "caption": "x"}': ["bad.jsonl:1", "takes a path"],
        '{"image": "a.png", "caption": 3}': ["bad.jsonl:1", "a text or a list"],
        '{"image": "pics/0.png", "caption": []}': ["bad.jsonl:1", "is empty"],
        '{"image": "pics/0.png", "caption": null}': ["bad.jsonl:1", "is empty"],
        "": ["holds no row; it takes one or more for each image"],
    }.items():
        bad.write_text(text)
        rejects(f"captions:{bad}", *words)
    (tmp_path / "coco.json").write_text("{}")
    rejects(f"captions:{tmp_path / 'coco.json'}", "coco-captions")
    (tmp_path / "latin.csv").write_bytes("image,caption\nx.png,Stra\xdfe".encode("latin-1"))
    rejects(f"captions:{tmp_path / 'latin.csv'}", "not UTF-8")
    (tmp_path / "only.csv").write_text("image,caption\n")
    rejects(f"captions:{tmp_path / 'only.csv'}", "holds no row")
    (tmp_path / "empty.csv").write_text("\n")
    rejects(f"captions:{tmp_path / 'empty.csv'}", "holds no row")


def test_an_unreadable_image_is_named_or_skipped(shop, tmp_path):
    whole = (tmp_path / "pics" / "4.png").read_bytes()
    (tmp_path / "pics" / "4.png").write_bytes(whole[: len(whole) // 2])
    rejects(f"captions:{shop}", "pics/4.png", "cannot be read", "skip_bad=true")
    data = make(f"captions:{shop},skip_bad=true").load()
    assert len(data.train) + len(data.test) == 9
    (note,) = data.notes
    assert "1 left out" in note
    assert "4.png' cannot be read" in note
    for part in (data.train, data.test):
        part.batch(np.arange(len(part)))
    assert run("leakage", shop, shop).code == 2
    skipped = run("leakage", shop, f"captions:{shop}", "--skip-bad")
    assert skipped.code == 1, "the same file is on both sides"
    assert "4.png" in skipped.err


def test_where_nothing_is_left_it_says_why(tmp_path):
    (tmp_path / "x.csv").write_text("image,caption\n" + "\n".join(f"{i}.png,x" for i in range(7)))
    rejects(f"captions:{tmp_path}/x.csv,skip_bad=true", "no image with a caption", "7 left out", "0.png' is not there")


def test_images_on_both_sides_are_noted(shop, tmp_path):
    (tmp_path / "some.csv").write_text(f"image,caption\n{tmp_path}/pics/3.png,x\npics/4.png,y\n")
    assert make(f"captions:{shop},test={tmp_path}/some.csv").load().notes == (
        "captions: all of the 2 test images are training images, too; a model that is trained here has seen them",
    )
    images(tmp_path, ["new.png"], seed=1)
    edited(tmp_path / "some.csv", "pics/4.png", "new.png")
    (note,) = make(f"captions:{shop},test={tmp_path}/some.csv").load().notes
    assert "1 of the 2 test images is a training image" in note


def test_what_is_skipped_and_what_counts_once(shop):
    edited(shop, '"a red ball"', '""')
    edited(shop, "pics/1.png", "pics/none.png")
    edited(shop, 'pics/2.png,"two dogs"', 'pics/2.png,"he said ""no"" "')
    data = make(f"captions:{shop},skip_bad=true").load()
    first, second = data.notes
    assert "2 left out" in first
    assert "1 captions" in second
    captions = {Path(n).name: c for s in (data.train, data.test) for n, c in zip(s.names, s.captions, strict=True)}
    assert captions["0.png"] == (WORDS[1],)
    assert captions["1.png"] == (WORDS[2],)
    assert captions["2.png"] == (WORDS[2],)


def test_skip_bad_on_the_command_line():
    asked = ("digits:n=20", "captions:'a b,c'", "captions:x,skip-bad=false")
    assert all_skipping(asked) == ("digits:n=20", "captions:'a b,c',skip_bad=true", "captions:x,skip-bad=false")
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        all_skipping(("digitz",))


# --- Flickr8k --------------------------------------------------------------------------------------


def flickr(root: Path, official: bool, token: bool) -> Path:
    names = [f"{1000 + i}_ab{i}.jpg" for i in range(10)]
    images(root / ("Flicker8k_Dataset" if token else "Images"), names)
    if token:
        rows = [f"{n}#{k}\t{w} ." for n in [*names, "2258277193_586949ec62.jpg.1"] for k, w in enumerate(WORDS)]
        (root / "Flickr8k.token.txt").write_text("\n".join(rows))
    else:
        rows = [f"{n},{w} ." for n in names for w in WORDS]
        (root / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    if official:
        (root / "Flickr_8k.trainImages.txt").write_text("\n".join(names[:6]) + "\n")
        (root / "Flickr_8k.testImages.txt").write_text("\n".join(names[6:9]))
    return root


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("official", [True, False])
def test_flickr8k(tmp_path, official, token):
    data = make(f"flickr8k:{flickr(tmp_path, official, token)},size=12").load()
    assert (len(data.train), len(data.test)) == ((6, 3) if official else (8, 2))
    if official:
        assert set(data.test.names) == {"flickr:1006", "flickr:1007", "flickr:1008"}
    assert set(data.train.captions) == {tuple(f"{w} ." for w in WORDS)}, "commas need no quotes there"
    assert data.notes == ()


def test_flickr8k_that_cannot_be_used(tmp_path):
    rejects(f"flickr8k:{tmp_path / 'none'}", "no folder")
    rejects(f"flickr8k:{tmp_path}", "captions.txt, Flickr8k.token.txt")
    root = flickr(tmp_path / "f", official=True, token=True)
    (root / "Flickr_8k.testImages.txt").write_text("1006_ab6.jpg\n4711_x.jpg\n")
    rejects(f"flickr8k:{root}", "4711_x.jpg' has no caption", "skip_bad=true")
    assert len(make(f"flickr8k:{root},skip_bad=true").load().test) == 1
    (root / "Flickr_8k.testImages.txt").write_text("1000_ab0.jpg\n")
    rejects(f"flickr8k:{root}", "1000_ab0.jpg", "training and of test images")
    (root / "Flickr8k.token.txt").write_text("no tab\n")
    rejects(f"flickr8k:{root}", "Flickr8k.token.txt:1")


# --- COCO ------------------------------------------------------------------------------------------


def coco(root: Path, part: str, first: int = 0, **changes) -> Path:
    ids = range(first, first + 6)
    images(root / part, [f"{i:012}.jpg" for i in ids], seed=first)
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in ids],
        "annotations": [{"image_id": i, "id": 10 * i + k, "caption": w} for i in ids for k, w in enumerate(WORDS)],
    } | changes
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
    return root


def test_coco(tmp_path):
    coco(tmp_path, "train2017")
    alone = make(f"coco-captions:{tmp_path},size=12").load()
    assert (len(alone.train), len(alone.test)) == (4, 2)
    coco(tmp_path, "val2017", 100)
    data = make(f"coco-captions:{tmp_path},size=12").load()
    assert (len(data.train), len(data.test)) == (6, 6)
    assert set(data.test.names) == {f"coco:{i}" for i in range(100, 106)}
    assert data.test.captions[0] == WORDS
    coco(tmp_path, "val2020", 200)
    newest = make(f"coco-captions:{tmp_path}")
    assert not newest.info().trainable
    assert (len(newest.load().train), len(newest.load().test)) == (0, 6)
    assert len(make(f"coco-captions:{tmp_path},year=2017").load().train) == 6
    rejects(f"coco-captions:{tmp_path},year=2014", "year=2014", "2017, 2020")


def test_coco_that_cannot_be_used(tmp_path):
    rejects(f"coco-captions:{tmp_path}", "captions_train2017.json")
    coco(tmp_path, "val2017", annotations=[{"image_id": 0, "caption": "one", "id": 7}])
    rejects(f"coco-captions:{tmp_path}", "000000000001.jpg' has no caption")
    skipped = make(f"coco-captions:{tmp_path},skip_bad=true").load()
    assert len(skipped.test) == 1
    assert "5 left out" in skipped.notes[0]
    coco(tmp_path, "val2017", annotations=[{"image_id": 99, "caption": "one", "id": 7}])
    rejects(f"coco-captions:{tmp_path}", "annotation 7", "no image 99")
    coco(tmp_path, "val2017", annotations=None)
    rejects(f"coco-captions:{tmp_path}", "no COCO file of captions")
    (tmp_path / "annotations" / "captions_val2017.json").write_text("<html>")
    rejects(f"coco-captions:{tmp_path}", "no COCO file of captions")


# --- the hub ---------------------------------------------------------------------------------------


class Rows:
    """A stand-in for datasets.Dataset."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        return [r[key] for r in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, name: str, feature: object) -> Rows:
        if not isinstance(self.rows[0][name], dict):
            raise TypeError("not an image")
        return self


@pytest.mark.parametrize(("part", "rows"), [
    ("train", ["train/0", "train/1"]),
    ("train[500:]", ["train/500", "train/501"]),
    ("train[:2]", ["train/0", "train/1"]),
    ("train[50%:]", ["train[50%:]/0", "train[50%:]/1"]),
    ("train+test", ["train+test/0", "train+test/1"]),
])  # fmt: skip
def test_rows_of_slices_are_those_of_the_split(part: str, rows: list[str]) -> None:
    assert hub_captions._rows(part, 2) == rows


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the library datasets, which knows one dataset."""
    images(tmp_path, [f"{i}.png" for i in range(4)])
    rows = [{"image": {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None}, "caption": list(WORDS[i:i + 2]),
             "title": "x"} for i in range(4)]  # fmt: skip
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision, library.config.HF_HUB_OFFLINE))
        known = {"train": rows[:3], "test": rows[3:], "train[1:2]": rows[1:2], "train[:1]": rows[:1]}
        if name != "me/mine" or split not in known:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(LocalEntryNotFoundError)")
        return Rows(known[split])

    library = types.ModuleType("datasets")
    library.load_dataset, library.Image = load_dataset, lambda decode: None
    library.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    library.are_progress_bars_disabled, library.disable_progress_bars = lambda: True, lambda: None
    monkeypatch.setitem(sys.modules, "datasets", library)
    return rows, asked


def test_hub(hub):
    _, asked = hub
    source = make("hf-captions:me/mine,size=12,revision=abc")
    assert source.info().captions
    assert asked == [], "facts need no network"
    data = source.load(offline=True)
    assert asked == [("me/mine", None, part, "abc", True) for part in ("test", "train")]
    assert sys.modules["datasets"].config.HF_HUB_OFFLINE is False
    assert (len(data.train), len(data.test)) == (3, 1)
    assert data.train.captions[1] == WORDS[1:3]
    assert data.test.names == ("me/mine/test/0",)
    assert data.train.batch(np.arange(3)).x.shape == (3, 3, 12, 12)
    only = make("hf-captions:me/mine,train_split=none")
    assert not only.info().trainable
    assert len(only.load().train) == 0
    assert only.fingerprint() != source.fingerprint()


def test_slices_of_one_split_that_overlap_are_noted(hub):
    data = make("hf-captions:me/mine,test_split=train[1:2]").load()
    assert data.notes == ("hf-captions: all of the 1 test images is a training image, too; a model that is trained "
                          "here has seen them",)  # fmt: skip
    apart = make("hf-captions:me/mine,train_split=train[:1],test_split=train[1:2]").load()
    assert apart.notes == ()


def test_hub_that_cannot_be_used(hub):
    rows, _ = hub
    rejects("hf-captions:you/yours", "you/yours", "Couldn't reach", "HF_HOME", "--offline")
    rejects("hf-captions:me/mine,caption=words", "no column 'words'")
    rejects("hf-captions:me/mine,image=title", "holds no images")
    rejects("hf-captions:me/mine,test_split=train", "nothing may be in both")
    rows[3]["caption"] = [" "]
    rejects("hf-captions:me/mine", "me/mine[test], row 0 has no caption", "skip_bad")
    rows[3]["caption"] = 5
    rejects("hf-captions:me/mine", "a text or a list of texts")
    rows[3]["caption"], rows[1]["image"] = "a boat", {"bytes": b"<html>", "path": None}
    rejects("hf-captions:me/mine", "me/mine[train], row 1", "cannot be read")
    skipped = make("hf-captions:me/mine,skip_bad=true").load()
    assert len(skipped.train) == 2
    assert "row 1' cannot be read" in skipped.notes[0]


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    rejects("hf-captions:me/mine", "pip install 'advplug-clip[datasets]'")


# --- real data -------------------------------------------------------------------------------------


def test_real_flickr8k(data_folder):
    data = make(f"flickr8k:{data_folder / 'flickr8k'}").load(offline=True)
    assert (len(data.train), len(data.test)) == (450, 125)
    assert {len(c) for s in (data.train, data.test) for c in s.captions} == {5}
    assert not find_leaks(data.train, data.test)
    listed = (data_folder / "flickr8k" / "Flickr_8k.testImages.txt").read_text().split()
    assert set(data.test.names) == {f"flickr:{name.partition('_')[0]}" for name in listed}
    assert data.test.batch(np.arange(4)).x.shape == (4, 3, 224, 224)


def test_real_coco(data_folder):
    data = make(f"coco-captions:{data_folder / 'coco_mini'}").load(offline=True)
    assert (len(data.train), len(data.test)) == (80, 79)
    assert {len(c) for c in data.test.captions} <= {5, 6, 7}
    assert not find_leaks(data.train, data.test)
    where = data.test.names.index("coco:205401")
    assert "A plane floating on top of a lake surrounded by mountains." in data.test.captions[where]


# --- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "label"),
    [
        (["a dog runs", "the Dogs rest", "a man"], 0),
        (["a man", "a man and a dog", "a fire truck"], 1),
        (["a fire truck", "fire trucks", "dogma"], 2),
        (["a man", "a dog"], 0),
        (["dogma", "fire", "a woman"], None),
    ],
)
def test_a_class_is_what_most_captions_name(texts, label):
    assert named_most(texts, ("dog", "man", "fire_truck")) == label


def test_images_of_classes_that_captions_name(shop):
    """The ten images have two captions each of `WORDS`, in turn: balls and dogs are in those of eight."""
    named = make(f"captions:{shop},size=8,classes=ball:dog")
    whole = make(f"captions:{shop},size=8")
    assert named.info().classes == ("ball", "dog")
    assert named.fingerprint() != whole.fingerprint()
    data = named.load()
    assert len(data.train) + len(data.test) == 8
    assert data.notes == ("captions: 2 images whose captions name no class are left out",)
    for split in (data.train, data.test):
        for label, own in zip(split.labels.tolist(), split.captions, strict=True):
            assert any(naming(data.info.classes[label])(text) for text in own)


def test_classes_that_cannot_be_used(shop):
    rejects(f"captions:{shop},classes=dog", "at least two different words with a colon between, such as dog:man")
    rejects(f"captions:{shop},classes=dog:Dog", "at least two different words")
    told = "holds no image that names one of whale, squid to test on; captions: 10 images"
    rejects(f"captions:{shop},classes=whale:squid", told)


def test_real_classes_of_flickr8k(data_folder):
    data = make(f"flickr8k:{data_folder / 'flickr8k'},size=16,classes=dog:man:woman:child").load()
    assert set(data.test.labels.tolist()) == {0, 1, 2, 3}
    assert 0.5 * 450 < len(data.train) < 450
    dogs = [own for label, own in zip(data.test.labels, data.test.captions, strict=True) if label == 0]
    assert all("dog" in " ".join(own).lower() for own in dogs)
