"""Leakage: planted copies are found, other images are not; what the command says, and how it exits."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advplug import leakage
from advplug.builtin.dataset_files import decode_image
from advplug.data import ArrayImages, FileImages, Split
from advplug.errors import UsageError
from advplug.leakage import find_among, find_leaks, normalised, refuse_leaks
from cli_tools import run


def smooth(count: int, side: int = 96, seed: int = 0) -> np.ndarray:
    """Images of random blobs, (N, side, side, 3) uint8."""
    coarse = np.random.RandomState(seed).randint(0, 256, (count, 9, 9, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC)) for c in coarse])


def in_memory(images: np.ndarray, **more) -> Split:
    x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Split(ArrayImages(x), np.zeros(len(x), np.int64), np.arange(len(x)), **more)


def in_files(paths: list[Path], size: int = 64) -> Split:
    images = FileImages(paths, lambda path: decode_image(path, size, size))
    return Split(images, np.zeros(len(paths), np.int64), np.arange(len(paths)))


def save(folder: Path, images: np.ndarray, suffix: str = "png", **how) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.{suffix}" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path, **how)
    return paths


def plant(sources: list[Path], folder: Path) -> dict[Path, tuple[Path, str]]:
    """Copies of each kind, of different images: copy to (source, kind)."""
    folder.mkdir(parents=True)
    planted = {}
    for k, source in enumerate(sources):
        kind = ("exact", "jpeg", "up", "down", "png")[k % 5]
        copy = folder / f"copy{k}.{'png' if kind == 'png' else source.suffix[1:] if kind == 'exact' else 'jpg'}"
        with Image.open(source) as opened:
            image = opened.convert("RGB")
        scale = {"up": 1.02, "down": 0.98}.get(kind, 1.0)
        width, height = (round(side * scale) for side in image.size)
        if kind == "exact":
            copy.write_bytes(source.read_bytes())
        elif kind == "png":
            image.save(copy)
        else:
            scaled = image if kind == "jpeg" else image.resize((width, height), Image.Resampling.BICUBIC)
            scaled.save(copy, quality=90)
        planted[copy] = (source, kind)
    return planted


def check_planted(training: list[Path], evaluation: list[Path], folder: Path) -> None:
    """Copies of the first 50 evaluation images among the training images: all are found, and nothing else."""
    planted = plant(evaluation[:50], folder)
    leaks = find_leaks(in_files([*training, *planted]), in_files(evaluation))
    found = {Path(p.train_name): (Path(p.evaluation_name), p.how) for p in leaks.pairs}
    assert len(found) == len(leaks.pairs)
    assert {c: s for c, (s, _) in found.items()} == {c: s for c, (s, _) in planted.items()}
    for copy, (_, kind) in planted.items():
        expected = {"exact": "same file", "png": "same pixels"}.get(kind, "near copy")
        assert found[copy][1] == expected, (copy, found[copy])
    assert leaks.leaked == 50
    assert all((p.error is None) == (p.how != "near copy") for p in leaks.pairs)


def test_planted_copies_of_random_images(tmp_path):
    paths = save(tmp_path / "images", smooth(200), "jpg", quality=95)
    check_planted(paths[100:], paths[:100], tmp_path / "copies")


def test_planted_copies_of_photographs(tmp_path, data_folder):
    paths = sorted((data_folder / "flickr8k" / "Images").glob("*.jpg"))
    chosen = [paths[i] for i in np.random.RandomState(0).permutation(len(paths))[:200]]
    check_planted(chosen[100:], chosen[:100], tmp_path / "copies")


def test_no_false_alarm_among_photographs(data_folder):
    paths = sorted(data_folder.glob("*/Images/*.jpg")) + sorted(data_folder.glob("coco_mini/*/*.jpg"))
    half = len(paths) // 2
    assert not find_leaks(in_files(paths[::2]), in_files(paths[1::2]))
    assert half > 300


def test_digits_that_look_alike_are_no_copies():
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    assert not find_leaks(in_memory(images[:1400]), in_memory(images[1400:]))


def test_images_in_memory():
    train, test = smooth(40), smooth(30, seed=1)
    train[7] = test[3]
    buffer = io.BytesIO()
    Image.fromarray(test[5]).save(buffer, "JPEG", quality=90)
    train[9] = np.asarray(Image.open(buffer))
    train[11] = test[8][:, ::-1]  # mirrored: out of scope
    leaks = find_leaks(in_memory(train), in_memory(test))
    assert [(p.train, p.evaluation, p.how) for p in leaks.pairs] == [(7, 3, "same pixels"), (9, 5, "near copy")]
    assert leaks.unchecked[0].startswith("file bytes")
    # Of another size, as after other preprocessing; and grey against colour.
    small = np.stack([np.asarray(Image.fromarray(i).resize((64, 64), Image.Resampling.BICUBIC)) for i in test[:5]])
    assert {(p.train, p.evaluation) for p in find_leaks(in_memory(small), in_memory(test)).pairs} == {
        (i, i) for i in range(5)
    }
    grey = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in test[:5]])[..., None]
    assert find_leaks(in_memory(grey), in_memory(test)).leaked == 5


def test_flat_images_and_dots_share_hashes_but_are_told_apart():
    flat = np.full((3, 64, 64, 3), 100, np.uint8)
    flat[1:] += np.uint8([[[[20]]], [[[60]]]])
    dotted = np.zeros((4, 64, 64, 3), np.uint8)
    for i, (y, x) in enumerate([(5, 5), (5, 50), (50, 5), (50, 50)]):
        dotted[i, y : y + 3, x : x + 3] = 255
    assert not find_leaks(in_memory(flat[:2]), in_memory(flat[2:]))
    assert not find_leaks(in_memory(dotted[:2]), in_memory(dotted[2:]))
    assert find_leaks(in_memory(flat), in_memory(flat[1:2])).leaked == 1


def test_sources_and_captions_are_told_apart():
    x = smooth(4)
    train = in_memory(x[:2], captions=(("A dog, running!",), ("a cat",)), names=("coco:1", "coco:2"))
    test = in_memory(x[2:], captions=(("a  DOG running", "two dogs"), ("a bird",)), names=("coco:3", "coco:2"))
    leaks = find_leaks(train, test)
    assert [(p.train_name, p.evaluation_name, p.how) for p in leaks.pairs] == [("coco:2", "coco:2", "same source")]
    (shared,) = leaks.captions
    assert (shared.text, shared.train, shared.evaluation) == ("a dog running", (0,), (0,))
    assert leaks.unchecked == ("file bytes (some images are not files)",)
    apart = in_memory(x[2:], captions=test.captions, names=("coco:3", "coco:4"))
    only = find_leaks(train, apart)
    assert not only
    assert only.captions
    assert "share a caption" in leakage.render(only)
    assert normalised("  Ünder—the “Bridge”…") == "ünder the bridge"


def test_training_is_refused(tmp_path):
    x = smooth(12)
    train = in_memory(x[:8], names=tuple(f"t{i}" for i in range(8)))
    refuse_leaks(train, in_memory(x[8:]))
    with pytest.raises(UsageError) as caught:
        refuse_leaks(train, in_memory(x[3:]))
    text = str(caught.value)
    assert text.startswith("5 of 9 evaluation images are in the training data: t3 and image 0 (same pixels)")
    assert "2 more pairs" in text


def test_empty_sides_and_several_splits():
    x = smooth(6)
    assert not find_leaks(in_memory(x[:0]), in_memory(x))
    assert not find_leaks(in_memory(x), in_memory(x[:0]))
    leaks = find_among((in_memory(x[:2]), in_memory(x[2:])), (in_memory(x[4:5]), in_memory(x[1:2])))
    assert [(p.train, p.evaluation) for p in leaks.pairs] == [(4, 0), (1, 1)]


def test_subsets_keep_their_files(tmp_path):
    paths = save(tmp_path, smooth(5))
    split = in_files(paths).subset(np.array([3, 1])).subset(np.array([1]))
    (pair,) = find_leaks(split, in_files(paths)).pairs
    assert (pair.train_name, pair.evaluation, pair.how) == (str(paths[1]), 1, "same file")


def test_it_is_fast():
    draw = np.random.RandomState(0).randint(0, 256, (5000, 32, 32, 3)).astype(np.uint8)
    find_leaks(in_memory(draw[:8]), in_memory(draw[8:16]))  # imports
    start = time.perf_counter()
    assert not find_leaks(in_memory(draw[:4000]), in_memory(draw[4000:]))
    assert time.perf_counter() - start < 5


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    images = smooth(8)
    return save(tmp_path / "a" / "deep", images[:5])[0].parents[1], save(tmp_path / "b", images[5:])[0].parent


def test_folders(folders):
    a, b = folders
    clean = run("leakage", a, b)
    assert (clean.code, clean.err) == (0, "")
    assert "none of 3 evaluation images found among 5 training images" in clean.out
    assert "mirrored" in clean.out
    Image.open(b / "001.png").save(a / "deep" / "again.jpg", quality=90)
    leaky = run("leakage", a, b)
    assert leaky.code == 1
    assert leaky.err == "Error: 1 of 3 evaluation images are in the training data\n"
    assert "again.jpg" in leaky.out
    assert "near copy" in leaky.out
    told = run("leakage", a, b, "--json")
    assert told.code == 1
    (pair,) = told.json["pairs"]
    assert Path(pair["train_name"]).name == "again.jpg"
    assert (told.json["train"], told.json["evaluation"], told.json["leaked"]) == (6, 3, 1)
    assert json.loads(told.out)["out_of_scope"].startswith("mirrored")


def test_bad_images_are_named_or_skipped(folders):
    a, b = folders
    (b / "bad.png").write_bytes(b"<html>")
    named = run("leakage", a, b)
    assert named.code == 2
    assert str(b / "bad.png") in named.err
    assert named.err.endswith("repair or remove it, or leave it out with --skip-bad\n")
    skipped = run("leakage", a, b, "--skip-bad")
    assert skipped.code == 0
    assert "left out" in skipped.err
    assert "bad.png" in skipped.err
    assert "of 3 evaluation images" in skipped.out


def test_datasets_by_name():
    own = run("leakage", "digits", "digits")
    assert own.code == 0
    assert "none of 360 evaluation images found among 1437 training images" in own.out
    fake = run("leakage", "fake:n=20,size=16", "fake:n=20,size=16,seed=1")
    assert fake.code == 0
    same = run("leakage", "fake:n=20,train=30,size=16", "digits:n=20")
    assert same.code == 0


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("digitz", ["did you mean 'digits'"]),
        ("/no/such/folder", ["no such folder"]),
        ("digits:n=0", ["n must be >= 1"]),
    ],
)
def test_what_cannot_be_compared(train, words):
    ended = run("leakage", train, "digits")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


def test_files_that_are_no_captions(tmp_path):
    archive = tmp_path / "x.npz"
    np.savez(archive, x=np.zeros((2, 4, 4)), y=np.arange(2))
    ended = run("leakage", archive, "digits")
    assert ended.code == 2
    assert f"npz:{archive}" in ended.err
    (tmp_path / "empty").mkdir()
    assert "holds no image" in run("leakage", tmp_path / "empty", "digits").err


def test_help_needs_no_torch():
    from conftest import python

    code = "import sys; from advplug.cli import cli; cli(['leakage', '--help'], standalone_mode=False); "
    done = python("-c", code + "sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
