"""Some classes of a dataset, and a dataset written to image files: the same pixels, once, whole or not at all."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advplug.builtin import dataset_downloads, dataset_folders
from advplug.builtin.dataset_classes import Kept
from advplug.builtin.dataset_sources import MNIST_COUNTS
from advplug.contracts import DatasetSource
from advplug.data import Split
from advplug.parse import parse_reference
from advplug.plans import bind
from advplug.registry import registry
from advplug.testing import check_dataset
from dataset_tools import make, rejects

NAMES = ("ant", "bee", "cow", "dog")


def save(path: Path, count: int = 40, **changes: object) -> Path:
    pixels = np.random.RandomState(count).randint(0, 256, (count, 12, 10, 3), dtype=np.uint8)
    content = {"x": pixels, "y": np.arange(count) % 4, "classes": np.array(NAMES), **changes}
    np.savez(path, **{key: value for key, value in content.items() if value is not None})  # type: ignore[arg-type]
    return path


def by_name(source: DatasetSource, split: Split) -> list[tuple[str, bytes]]:
    """Every image with its class, in an order that does not depend on that of the split."""
    batch = split.batch(np.arange(len(split)))
    named = zip(batch.y.tolist(), batch.x, strict=True)
    return sorted((source.info().classes[label], x.numpy().tobytes()) for label, x in named)


# --- some classes ----------------------------------------------------------------------------------


def test_kept_classes_are_numbered_as_they_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    test = save(tmp_path / "b.npz", 20)
    whole, some = make(f"npz:train={path},test={test}"), make(f"npz:train={path},test={test},classes=dog:bee")
    assert some.info().classes == ("dog", "bee")
    assert some.fingerprint() != whole.fingerprint()
    assert some.fingerprint() != make(f"npz:train={path},test={test},classes=bee:dog").fingerprint()
    for part in ("train", "test"):
        kept, every = getattr(some.load(), part), getattr(whole.load(), part)
        assert sorted(set(kept.labels.tolist())) == [0, 1]
        wanted = [pair for pair in by_name(whole, every) if pair[0] in ("bee", "dog")]
        assert by_name(some, kept) == wanted
        # Positions are those of the file, so that an image keeps its own in every subset.
        place = {int(i): row for row, i in enumerate(every.index)}
        rows = np.array([place[int(i)] for i in kept.index])
        assert torch.equal(every.batch(rows).x, kept.batch(np.arange(len(kept))).x)


def test_kept_classes_of_one_file_keep_its_split(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", 200)
    whole, some = make(f"npz:{path}").load(), make(f"npz:{path},classes=cow:ant,train=0.5,n=10")
    data = some.load()
    assert set(data.test.index.tolist()) <= set(whole.test.index.tolist())
    assert (len(data.train), len(data.test)) == (40, 10)
    assert np.bincount(data.test.labels).tolist() == [5, 5]
    rejects(f"npz:{path},classes=cow:ant,n=21", "20 test images")


def test_classes_without_names_go_by_number(tmp_path: Path) -> None:
    source = make(f"npz:{save(tmp_path / 'a.npz', classes=None)},classes=3:0")
    assert source.info().classes == ("3", "0")
    assert sorted(source.load().test.index % 4) == [0, 0, 3, 3]


def test_classes_that_cannot_be_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    rejects(f"npz:{path},classes=ant:be", "no class 'be'", "did you mean 'bee'?")
    rejects(f"npz:{path},classes=ant:whale", "no class 'whale'", "ant, bee, cow, dog")
    rejects(f"npz:{path},classes=ant", "two class names or more")
    rejects(f"npz:{path},classes=ant::bee", "two class names or more")
    rejects(f"npz:{path},classes=ant:bee:ant", "'ant' twice")
    five = save(tmp_path / "five.npz", classes=np.array([*NAMES, "eel"]))
    rejects(f"npz:{five},classes=ant:eel", "no image of class 'eel'")
    rejects("cifar10:classes=frog:hosre", "did you mean 'horse'?")
    rejects("cifar100:classes=rose:x", "...")


def test_what_is_known_of_kept_classes_of_downloads() -> None:
    assert make("cifar10:classes=frog:cat").info().classes == ("frog", "cat")
    assert make("cifar10:classes=frog:cat").info().evaluate == 1000
    assert make("cifar100:classes=rose:tulip").info().evaluate is None  # 200 test images
    assert make("cifar10").fingerprint() != make("cifar10:classes=frog:cat").fingerprint()
    rejects("cifar100:classes=rose:tulip,train=1001", "1000 training images")
    rejects("mnist:classes=0:1,n=2116", "2115 test images")
    assert [sum(counts) for counts in MNIST_COUNTS] == [60_000, 10_000]


def test_kept_classes_of_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.RandomState(0).randint(0, 256, (30, 3, 32, 32), dtype=np.uint8), np.arange(30) % 10
    arrays = dataset_downloads.Arrays(x, y, x[::-1], y[::-1])
    monkeypatch.setattr(dataset_downloads, "load_cifar", lambda *_: arrays)
    data = make("cifar10:classes=truck:bird").load()
    assert data.train.labels.tolist() == [1, 0] * 3
    assert data.train.index.tolist() == [2, 9, 12, 19, 22, 29]
    assert data.test.labels.tolist() == [0, 1] * 3


def test_results_without_kept_classes_are_those_of_before_there_was_a_choice(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    whole, some = (
        bind(registry(), "dataset", parse_reference(f"npz:{path}{more}")).recipe["params"]
        for more in ("", ",classes=bee:ant")
    )
    assert "classes" not in whole
    assert some["classes"] == "bee:ant"


def test_all_classes_are_kept_as_they_are() -> None:
    labels = np.array([3, 1])
    assert Kept().renumbered(labels, (0, 1, 2, 3)) is labels
    assert Kept().rows(labels, ()).tolist() == [0, 1]
    assert Kept().recipe() == {}


@pytest.mark.skipif("ADVPLUG_DATA" not in os.environ, reason="ADVPLUG_DATA is not set: the real data are not at hand")
def test_animals_of_cifar10() -> None:
    animals = "bird:cat:deer:dog:frog:horse"
    source = make(f"npz:test=$ADVPLUG_DATA/cifar10_test.npz,classes={animals}")
    assert np.bincount(source.load().test.labels).tolist() == [1000] * 6


# --- image files -----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets" / "folders"


def folders(cache: Path) -> list[Path]:
    return [entry for entry in cache.iterdir() if entry.is_dir()]


def test_files_hold_the_same_pixels(tmp_path: Path, cache: Path) -> None:
    source = save(tmp_path / "a.npz", x=np.random.RandomState(1).randint(0, 256, (40, 12, 12, 3), dtype=np.uint8))
    inner, outer = make(f"npz:{source},classes=dog:ant,flip=true"), make(f"as-folder:(npz:{source},classes=dog:ant)")
    assert outer.info().classes == ("dog", "ant")
    assert outer.info().size == (12, 12)
    assert outer.info().budgets == inner.info().budgets
    assert inner.info().flip
    assert not outer.info().flip
    assert not cache.exists()  # facts and fingerprints write nothing
    for part in ("train", "test"):
        written, given = getattr(outer.load(), part), getattr(inner.load(), part)
        assert by_name(outer, written) == by_name(inner, given)
    (root,) = folders(cache)
    assert sorted(p.name for p in (root / "train").iterdir()) == ["0-dog", "1-ant"]
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (12, 12))


def test_it_is_written_once_and_read_at_any_size(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "a.npz")
    first = make(f"as-folder:source=(npz:{path}),size=8").load()
    (root,) = folders(cache)
    before = root.stat().st_mtime_ns
    again = make(f"as-folder:source=(npz:{path}),size=10,train=16,n=4").load()
    assert [len(part) for part in (first.train, first.test, again.train, again.test)] == [32, 8, 16, 4]
    assert again.test.batch(np.arange(2)).x.shape == (2, 3, 10, 10)
    assert folders(cache) == [root]
    assert root.stat().st_mtime_ns == before
    # 12 x 10 images: the shorter side is what they are read at.
    assert make(f"as-folder:(npz:{path})").info().size == (10, 10)
    keys = {make(f"as-folder:(npz:{path}){more}").fingerprint() for more in ("", ",size=8", ",resize=12", ",n=3")}
    assert len(keys) == 4


def test_grey_images_come_back_in_three_channels(cache: Path) -> None:
    data = make("as-folder:(digits:size=16,train=40,n=10)").load()
    x = data.test.batch(np.arange(10)).x
    assert x.shape == (10, 3, 16, 16)
    assert torch.equal(x[:, 0], x[:, 2])
    assert data.info.budgets == make("digits").info().budgets


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupt_leaves_nothing_half(
    error: type[BaseException] | BaseException, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import advplug.image_folders as writing

    path, real, left = save(tmp_path / "a.npz"), writing.png, [7]

    def broken(pixels: np.ndarray) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(pixels)

    monkeypatch.setattr(writing, "png", broken)
    reference = f"as-folder:(npz:{path})"
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            make(reference).load()
    else:
        rejects(reference, "No space left on device", "set ADVPLUG_CACHE")
    assert folders(cache) == []
    monkeypatch.setattr(writing, "png", real)
    assert len(make(reference).load().train) == 32


def test_what_a_killed_process_left_and_what_was_changed_is_made_anew(tmp_path: Path, cache: Path) -> None:
    reference = f"as-folder:(npz:{save(tmp_path / 'a.npz')})"
    images = make(reference).load().test.batch(np.arange(8)).x
    (root,) = folders(cache)
    part = root.with_name(f"{root.name}.part.00000000")
    (part / "train" / "ant").mkdir(parents=True)
    victim = next((root / "test").rglob("*.png"))
    Image.new("RGB", (10, 12)).save(victim)
    assert torch.equal(make(reference).load().test.batch(np.arange(8)).x, images)
    assert folders(cache) == [root]
    (root / "test" / "extra").mkdir()
    assert torch.equal(make(reference).load().test.batch(np.arange(8)).x, images)
    (root / dataset_folders.RECORD).write_text(json.dumps([]))
    assert torch.equal(make(reference).load().test.batch(np.arange(8)).x, images)


def test_data_that_cannot_be_files(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "a.npz")
    rejects(f"as-folder:(npz:test={path})", "no training images")
    rejects("as-folder:(fake:channels=2)", "2 channels")
    rejects("as-folder:(digits+fake)", "takes one dataset")
    rejects("as-folder:(digitz)", "did you mean 'digits'?")
    rejects("as-folder:(digits),size=16,resize=8", "resize=8 is below size=16")
    rejects("as-folder:(digits:size=8),train=2000", "1437 training images")
    five = save(tmp_path / "five.npz", classes=np.array([*NAMES, "eel"]))
    rejects(f"as-folder:(npz:{five})", "no training image of class 'eel'")
    assert len(folders(cache)) == 1  # that of the digits, which can be written and are too few


@pytest.mark.skipif(find_spec("advplug_clip") is None, reason="advplug-clip is not installed")
def test_captions_are_left_out(cache: Path) -> None:
    made = make("as-folder:(digit-scenes:train=20,n=10),size=32")
    assert not made.info().captions
    assert made.load().train.captions is None


def test_it_keeps_the_contract(cache: Path) -> None:
    check_dataset("as-folder", source="digits:size=8,train=60,n=20", size=8)
    check_dataset("as-folder", source="fake:size=9,train=40,n=20")
