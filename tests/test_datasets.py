"""The built-in datasets: splits, pixels, fingerprints, and one clear line for everything that can be wrong."""

import os
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advplug.builtin import dataset_files, datasets, imagenet
from advplug.errors import UsageError
from advplug.splits import Amounts, allocate, mixed, ranks, split, subset
from dataset_tools import make, rejects

DATA = os.environ.get("ADVPLUG_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ADVPLUG_DATA is not set: the real datasets are not at hand")


# --- splits ----------------------------------------------------------------------------------------


def test_hashes_do_not_change_between_versions():
    assert ranks(["a", 0], seed=3).tolist() == [4076288644463141637, 2300374844862972966]  # as b2sum -l 64 gives


def test_shares_follow_the_largest_remainder():
    assert allocate(np.array([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert allocate(np.array([3, 3, 1]), 5).tolist() == [2, 2, 1]  # 2.14, 2.14, 0.71
    for total in range(13):
        shares = allocate(np.array([1, 2, 9]), total)
        assert shares.sum() == total
        assert (shares <= [1, 2, 9]).all()


def test_split_keeps_proportions_and_a_training_image_a_class():
    labels = np.repeat([0, 1, 2], [100, 50, 1])
    train, test = split(labels, range(151))
    assert sorted([*train, *test]) == list(range(151))
    assert np.bincount(labels[test], minlength=3).tolist() == [21, 10, 0]  # 31 in all, 20.5 10.3 0.2
    assert not np.array_equal(test, np.sort(test))
    assert np.bincount(labels[test[:15]]).tolist() == [10, 5]


def test_split_goes_by_key_not_by_position():
    names, labels = [f"c/{i}.png" for i in range(40)], np.arange(40) % 2
    back = np.arange(40)[::-1]
    _, test = split(labels, names)
    _, other = split(labels[back], [names[i] for i in back])
    assert [names[i] for i in test] == [names[back[i]] for i in other]


def test_subset_is_stratified_and_nothing_more():
    labels = np.repeat([0, 1], [30, 10])
    rows = subset(labels, 8)
    assert np.bincount(labels[rows]).tolist() == [6, 2]
    assert np.array_equal(rows, np.sort(rows))
    assert subset(labels, 40).tolist() == list(range(40))


def test_only_files_in_class_order_are_mixed():
    assert mixed(np.array([1, 0, 1]), range(3)).tolist() == [0, 1, 2]
    rows = mixed(np.repeat(np.arange(10), 10), range(100))
    assert sorted(rows) == list(range(100))
    for n in range(10, 101, 10):
        assert np.bincount(rows[:n] // 10).tolist() == [n // 10] * 10
    assert mixed(np.zeros(0, int), []).tolist() == []


@pytest.mark.parametrize("train", [0, -1, 1.5, float("nan"), float("inf")])
def test_impossible_amounts(train):
    with pytest.raises(UsageError, match="fraction above 0"):
        Amounts(train)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("digits:train=0", ["train must be > 0"]),
        ("digits:train=1.5", ["fraction", "1.5"]),
        ("digits:train=1438", ["1437 training images", "1438"]),
        ("digits:n=0", ["n must be >= 1"]),
        ("digits:n=361", ["360 test images", "361"]),
        ("digits:size=4", ["size must be >= 8"]),
        ("mnist:n=10001", ["10000 test images"]),
        ("cifar10:train=50001", ["50000 training images"]),
        ("fake:train=2.5", ["fraction"]),
        ("imagenet:x,train=0.5", ["no parameter 'train'"]),
        ("folder", ["folder:PATH"]),
    ],
)
def test_parameters_that_cannot_be(text, words):
    rejects(text, *words)


# --- digits and fake -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return make("digits").load(offline=True)


def test_digits(digits):
    info = digits.info
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (info.channels, info.size, info.classes, info.evaluate) == (1, (32, 32), tuple("0123456789"), None)
    assert info.budgets == {"linf": Fraction(1, 10), "l2": 2, "l1": 20}
    assert not info.flip
    everything = np.concatenate([digits.train.index, digits.test.index])
    assert sorted(everything) == list(range(1797))
    assert np.bincount(digits.test.labels).max() - np.bincount(digits.test.labels).min() <= 2
    assert np.bincount(digits.test.labels[:100]).tolist() == [10] * 10
    assert digits.test.index[:5].tolist() == [267, 1130, 525, 1082, 238]  # published numbers rest on this split


def test_digits_are_the_originals_on_the_8_bit_grid(digits):
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    batch = digits.test.batch(np.arange(8))
    assert batch.x.shape == (8, 1, 32, 32)
    assert batch.y.tolist() == labels[batch.index.numpy()].tolist()
    bytes_ = batch.x.double().numpy() * 255
    assert np.abs(bytes_ - bytes_.round()).max() < 1e-4
    small = make("digits:size=8").load().test.batch(np.arange(8))
    assert np.array_equal(small.index, batch.index)
    originals = grey[batch.index.numpy()].reshape(8, 1, 8, 8) / 16
    assert np.abs(small.x.numpy() - originals).max() <= 0.5 / 255 + 1e-6
    scaled = torch.nn.functional.interpolate(small.x, (32, 32), mode="bilinear")
    assert (scaled - batch.x).abs().max() <= 1 / 255 + 1e-6


def test_subsets_of_digits():
    part = make("digits:train=0.5,n=100").load()
    assert (len(part.train), len(part.test)) == (718, 100)
    assert np.bincount(part.test.labels).tolist() == [10] * 10
    assert len(make("digits:train=200").load().train) == 200
    again = make("digits:train=0.5,n=100").load()
    assert np.array_equal(part.train.index, again.train.index)
    assert np.array_equal(part.test.index, again.test.index)


def test_fingerprints_tell_datasets_apart():
    texts = ["digits", "digits:n=100", "digits:train=0.5", "digits:size=28", "mnist", "cifar10", "cifar100",
             "fake", "fake:seed=1", "fake:size=8"]  # fmt: skip
    prints = [make(t).fingerprint() for t in texts]
    assert len(set(prints)) == len(texts)
    assert make("digits:train=1").fingerprint() == prints[0]


def test_fake_images_can_be_learnt():
    data = make("fake:classes=4,channels=2,size=11,train=80,n=40,seed=5").load()
    assert data.info.size == (11, 11)
    train, test = (part.batch(np.arange(len(part))) for part in (data.train, data.test))
    assert train.x.shape == (80, 2, 11, 11)
    assert test.y.tolist() == [0, 1, 2, 3] * 10
    means = np.stack([train.x[train.y == c].mean(0).numpy().ravel() for c in range(4)])
    distance = ((test.x.numpy().reshape(40, 1, -1) - means) ** 2).sum(2)
    assert (distance.argmin(1) == test.y.numpy()).all()
    more = make("fake:classes=4,channels=2,size=11,train=80,n=80,seed=5").load()
    assert np.array_equal(more.test.batch(np.arange(40)).x, test.x)
    assert len(make("fake:train=0.5,size=4").load().train) == 200


# --- folders ---------------------------------------------------------------------------------------


def fill(root: Path, classes: dict[str, int], size: tuple[int, int] = (20, 14), seed: int = 0) -> Path:
    """Class folders of random PNG images."""
    draw = np.random.RandomState(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pets"), {"cat": 20, "dog": 10})


def test_folder_is_split_by_name(pets, tmp_path):
    source = make(f"folder:{pets},size=12")
    data = source.load()
    assert (len(data.train), len(data.test)) == (24, 6)
    assert np.bincount(data.test.labels).tolist() == [4, 2]
    info = source.info()
    assert (info.classes, info.channels, info.size, info.flip) == (("cat", "dog"), 3, (12, 12), True)
    other = tmp_path / "copy"
    for path in sorted(pets.rglob("*.png"), reverse=True):
        target = other / path.relative_to(pets)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (other / "cat" / ".hidden.png").write_bytes(b"no image")
    (other / "cat" / "notes.txt").write_text("no image")
    copy = make(f"folder:{other},size=12")
    assert copy.fingerprint() == source.fingerprint()
    assert np.array_equal(copy.load().test.index, data.test.index)
    file = other / "dog" / "001.png"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert make(f"folder:{other},size=12").fingerprint() != source.fingerprint(), "an edit that keeps the size"
    file.write_bytes(kept)
    (other / "dog" / "extra.png").write_bytes((pets / "dog" / "001.png").read_bytes())
    assert make(f"folder:{other},size=12").fingerprint() != source.fingerprint()


def test_folder_defaults(pets):
    info = make(f"folder:{pets}").info()
    assert info.size == (224, 224)
    assert info.budgets["linf"] == Fraction(4, 255)
    assert info.trainable
    subsets = make(f"folder:{pets},size=12,train=0.5,n=3").load()
    assert (len(subsets.train), len(subsets.test)) == (12, 3)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 33), (9, 50)])
def test_images_are_those_of_torchvision(tmp_path, shape):
    from advplug.vision import import_torchvision

    import_torchvision()
    from torchvision.transforms import CenterCrop, Compose, Resize

    fill(tmp_path, {"a": 1}, shape)
    path = tmp_path / "a" / "000.png"
    pixels = dataset_files.decode_image(path, size=24, resize=27)
    expected = Compose([Resize(27), CenterCrop(24)])(Image.open(path).convert("RGB"))
    assert np.array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))


def test_every_mode_becomes_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    palette = Image.fromarray(grey).convert("P")
    palette.info["transparency"] = bytes(range(256))
    modes = {"grey": Image.fromarray(grey), "palette": palette, "alpha": Image.fromarray(grey).convert("RGBA"),
             "deep": Image.fromarray(grey.astype(np.uint16) * 256)}  # fmt: skip
    for name, image in modes.items():
        image.save(tmp_path / f"{name}.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = dataset_files.decode_image(tmp_path / f"{name}.png", 8, 8)
        assert pixels.shape == (3, 8, 8)
        assert all(np.array_equal(channel, grey) for channel in pixels), name


def test_train_and_val_folders(tmp_path):
    fill(tmp_path / "train", {"a": 6, "b": 4})
    fill(tmp_path / "val", {"b": 5}, seed=1)
    data = make(f"folder:{tmp_path},size=8").load()
    assert (len(data.train), len(data.test)) == (10, 5)
    assert data.test.labels.tolist() == [1] * 5
    fill(tmp_path / "val", {"c": 1})
    rejects(f"folder:{tmp_path},size=8", "'c'", "training folder lacks")


def test_animals10_translates(tmp_path):
    fill(tmp_path / "raw-img", dict.fromkeys(datasets.ANIMALS, 2) | {"scoiattolo": 5})
    fill(tmp_path / "translations", {"x": 1})
    source = make(f"animals10:{tmp_path},size=8")
    expected = ("dog", "horse", "elephant", "butterfly", "chicken", "cat", "cow", "sheep", "spider", "squirrel")
    assert source.info().classes == expected
    assert make(f"animals10:{tmp_path / 'raw-img'},size=8").fingerprint() == source.fingerprint()
    fill(tmp_path / "raw-img", {"gato": 1})
    rejects(f"animals10:{tmp_path},size=8", "'gato'", "'gatto'")


def test_animals10_under_two_languages(tmp_path):
    fill(tmp_path, {"gatto": 3, "dog": 3})
    assert make(f"animals10:{tmp_path},size=8").info().classes == ("dog", "cat")
    fill(tmp_path, {"cat": 3})
    rejects(f"animals10:{tmp_path},size=8", "two folders for one class")


def test_imagenet_is_for_testing(tmp_path):
    fill(tmp_path, {"n01440764": 3, "n02099601": 2})
    source = make(f"imagenet:{tmp_path},size=14")
    info = source.info()
    data = source.load()
    assert not info.trainable
    assert source.resize == 16
    assert make(f"imagenet:{tmp_path}").resize == 256
    assert imagenet.columns(info.classes) == (0, 207)
    assert (len(data.train), len(data.test)) == (0, 5)
    assert data.test.batch(np.arange(5)).x.shape == (5, 3, 14, 14)
    fill(tmp_path, {"tench": 1})
    rejects(f"imagenet:{tmp_path}", "same ImageNet class")
    fill(tmp_path, {"my cat": 1})
    rejects(f"imagenet:{tmp_path}", "'my cat'", "folder:PATH")


def test_imagenet_classes():
    from advplug.vision import import_torchvision

    categories = import_torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"]
    table = imagenet.class_table()
    assert [name for _, name in table] == categories
    assert [wnid for wnid, _ in table] == sorted({wnid for wnid, _ in table})
    assert imagenet.columns(categories) == tuple(range(1000))
    assert imagenet.columns([wnid for wnid, _ in table]) == tuple(range(1000))
    assert imagenet.columns(["Cardigan", "cardigan", "CARDIGAN"]) is None
    assert imagenet.columns(["Cardigan", "cardigan"]) == (264, 474)
    assert imagenet.columns(["Golden_Retriever", "n01440764 tench"]) == (207, 0)
    assert imagenet.columns(["tench", "n01440764"]) is None
    assert imagenet.columns(["cat", "tench"]) is None
    assert imagenet.columns([]) is None


def test_folders_that_cannot_be_used(tmp_path):
    rejects(f"folder:{tmp_path / 'none'}", "no folder", "none")
    rejects(f"folder:{tmp_path}", "no subfolders")
    (tmp_path / "file").touch()
    rejects(f"folder:{tmp_path / 'file'}", "is a file")
    fill(tmp_path / "one", {"a": 3})
    rejects(f"folder:{tmp_path / 'one'}", "single class 'a'")
    fill(tmp_path / "empty", {"a": 3, "b": 0})
    rejects(f"folder:{tmp_path / 'empty'}", "holds no image", "/b")
    fill(tmp_path / "few", {"a": 1, "b": 1})
    rejects(f"folder:{tmp_path / 'few'}", "too few to split")
    fill(tmp_path / "small", {"a": 5, "b": 5})
    rejects(f"folder:{tmp_path / 'small'},n=3", "2 test images")
    rejects(f"folder:{tmp_path / 'small'},size=64,resize=32", "resize=32 is below size=64")


@pytest.mark.parametrize("content", ["html", "truncated", "empty"])
def test_an_unreadable_image_is_named(tmp_path, content):
    fill(tmp_path, {"a": 5, "b": 5}, (64, 64))
    path = tmp_path / "b" / "003.png"
    whole = path.read_bytes()
    path.write_bytes({"html": b"<html>no</html>", "truncated": whole[: len(whole) // 2], "empty": b""}[content])
    rejects(f"folder:{tmp_path},size=8", str(path), "cannot be read")


# --- npz -------------------------------------------------------------------------------------------


def arrays(count: int = 20, **changes):
    pixels = np.random.RandomState(count).randint(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    return {"x": pixels, "y": np.arange(count) % 4, **changes}


def save(path: Path, **content) -> Path:
    np.savez_compressed(path, **{k: v for k, v in content.items() if v is not None})
    return path


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "float32", "float64"])
def test_npz_layouts_agree(tmp_path, layout):
    content = arrays()
    x = content["x"]
    given = {"NHWC": x, "NCHW": x.transpose(0, 3, 1, 2), "float32": np.float32(x) / 255, "float64": x / 255}[layout]
    source = make(f"npz:{save(tmp_path / 'a.npz', x=given, y=content['y'].astype('u1'))}")
    data = source.load()
    assert (len(data.train), len(data.test)) == (16, 4)
    assert sorted([*data.train.index, *data.test.index]) == list(range(20))
    assert data.test.labels.dtype == np.int64
    info = source.info()
    assert (info.channels, info.size, info.classes) == (3, (6, 5), tuple("0123"))
    batch = data.test.batch(np.arange(4))
    expected = np.float32(x[batch.index].transpose(0, 3, 1, 2)) / np.float32(255)
    np.testing.assert_allclose(batch.x, expected, atol=1e-7)
    assert batch.y.tolist() == content["y"][batch.index].tolist()


def test_npz_train_and_test_files(tmp_path):
    names = np.array(["a", "b", "c", "d", "e"])
    first = save(tmp_path / "first.npz", **arrays(20, classes=names))
    test = save(tmp_path / "test.npz", **arrays(12, x=arrays(12)["x"][..., :1]))
    rejects(f"npz:train={first},test={test}", "different shape", "3x6x5")
    save(test, **arrays(12, y=np.arange(12)))
    rejects(f"npz:train={first},test={test}", "label 11", "names 5 classes")
    save(test, **arrays(12, classes=names[::-1]))
    rejects(f"npz:train={first},test={test}", "different classes")
    save(test, **arrays(12))
    source = make(f"npz:train={first},test={test},flip=true")
    assert source.info().classes == tuple("abcde")
    assert source.info().flip
    assert [len(part) for part in (source.load().train, source.load().test)] == [20, 12]
    assert source.load().test.index.tolist() == list(range(12))
    half = make(f"npz:{first},test={test},train=0.5,n=4").load()
    assert (len(half.train), len(half.test)) == (10, 4)
    save(test, **arrays(12, y=np.arange(12) % 2))
    rejects(f"npz:train={first},test={test},classes=c:d", "holds no image of c, d")
    save(test, **arrays(12))
    alone = make(f"npz:test={test}")
    assert not alone.info().trainable
    assert (len(alone.load().train), len(alone.load().test)) == (0, 12)


def test_npz_greyscale_and_byte_names(tmp_path):
    path = save(tmp_path / "g.npz", **arrays(x=arrays()["x"][..., 0], classes=np.array([b"a", b"b", b"c", b"d"])))
    source = make(f"npz:{path}")
    assert (source.info().channels, source.info().classes) == (1, tuple("abcd"))
    assert source.load().test.batch(np.arange(2)).x.shape == (2, 1, 6, 5)


def test_npz_fingerprint_follows_the_content(tmp_path):
    path = save(tmp_path / "a.npz", **arrays())
    before = make(f"npz:{path}").fingerprint()
    assert make(f"npz:{save(tmp_path / 'b.npz', **arrays())}").fingerprint() == before
    save(path, **arrays(y=np.arange(20) % 3))
    assert make(f"npz:{path}").fingerprint() != before


NAN = np.full((20, 6, 5, 3), np.nan)
BAD_ARRAYS = {
    "no x": (arrays(x=None), ["no array 'x'"]),
    "no y": (arrays(y=None), ["no array 'y'"]),
    "flat": (arrays(x=np.zeros((20, 90), "u1")), ["shape (20, 90)"]),
    "no channels": (arrays(x=np.zeros((20, 6, 5, 4), "u1")), ["no axis holds 1 or 3 channels"]),
    "two channels": (arrays(x=np.zeros((20, 3, 5, 3), "u1")), ["either axis"]),
    "no images": (arrays(x=np.zeros((0, 6, 5, 3), "u1"), y=np.zeros(0, int)), ["shape (0, 6, 5, 3)"]),
    "int64 pixels": (arrays(x=np.ones((20, 6, 5, 3), int)), ["int64", "store uint8"]),
    "nan": (arrays(x=NAN), ["nan", "[0, 1]"]),
    "above 1": (arrays(x=np.full((20, 6, 5, 3), 200.0)), ["200", "[0, 1]"]),
    "below 0": (arrays(x=np.full((20, 6, 5, 3), -0.5, "f4")), ["-0.5"]),
    "too few labels": (arrays(y=np.arange(19) % 4), ["20 images", "19 labels"]),
    "float labels": (arrays(y=np.arange(20) / 4), ["y is float64"]),
    "text labels": (arrays(y=np.array(["cat", "dog"] * 10)), ["whole numbers"]),
    "one-hot": (arrays(y=np.eye(4, dtype=int).repeat(5, 0)), ["shape (20, 4)"]),
    "negative": (arrays(y=np.arange(20) % 4 - 1), ["label -1"]),
    "single class": (arrays(y=np.ones(20, int)), ["one class only"]),
    "few names": (arrays(classes=np.array(["a", "b"])), ["labels go up to 3"]),
    "same names": (arrays(classes=np.array(list("aabc"))), ["a name twice"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_npz_contents_that_cannot_be_used(tmp_path, case):
    content, words = BAD_ARRAYS[case]
    path = save(tmp_path / "bad.npz", **content)
    rejects(f"npz:{path}", str(path), *words)


def test_npz_pickles_are_never_loaded(tmp_path):
    for key, value in (
        ("x", np.full((20, 6, 5, 3), None)),
        ("y", np.array([{}] * 20)),
        ("classes", np.array([{}] * 4)),
    ):
        path = save(tmp_path / "p.npz", **arrays(**{key: value}))
        rejects(f"npz:{path}", "object" if key == "x" else "pickled objects")


def test_npz_files_that_are_none(tmp_path):
    path = tmp_path / "a.npz"
    rejects(f"npz:{path}", str(path), "check the path")
    rejects(f"npz:{tmp_path}", "is a folder")
    for content, word in ((b"\n<!DOCTYPE html>", "HTML page"), (b"junk", "no .npz archive"), (b"", "no .npz archive")):
        path.write_bytes(content)
        rejects(f"npz:{path}", str(path), word)
    np.save(tmp_path / "single.npy", np.zeros(3))
    rejects(f"npz:{tmp_path / 'single.npy'}", "single array")
    whole = save(path, **arrays(200)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rejects(f"npz:{path}", "truncated")
    path.write_bytes(whole[:2000] + bytes(50) + whole[2050:])
    rejects(f"npz:{path}", "damaged")


def test_npz_parameters(tmp_path):
    path = save(tmp_path / "a.npz", **arrays())
    rejects("npz", "npz:FILE")
    rejects(f"npz:{path},train={path}", "two training files")
    rejects(f"npz:train={path}", "needs a test file")
    rejects(f"npz:test={path},train=0.5", "no training file")
    rejects(f"npz:{path},train=0", "fraction")
    rejects(f"npz:{path},train=17", "16 training images")
    rejects(f"npz:{path},n=5", "4 test images")


# --- without torch ---------------------------------------------------------------------------------


def test_facts_need_no_torch(pets, tmp_path):
    """Listing needs no NumPy either; facts and fingerprints need neither torch nor scikit-learn."""
    path = save(tmp_path / "a.npz", **arrays())
    code = f"""
import sys
from advplug.builtin import datasets
from advplug.params import params_of
from advplug.registry import load_target
for spec in datasets.DATASETS:
    params_of(load_target(spec.target, spec.name))
assert not {{"torch", "torchvision", "sklearn", "PIL", "numpy"}} & set(sys.modules), "listing"
from pathlib import Path
for source in (datasets.digits(), datasets.mnist(), datasets.cifar100(), datasets.fake(),
               datasets.folder(Path({str(pets)!r})), datasets.npz(Path({str(path)!r}))):
    source.info(), source.fingerprint()
assert not {{"torch", "torchvision", "sklearn"}} & set(sys.modules), "facts"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- real data -------------------------------------------------------------------------------------


@needs_data
def test_real_mnist_from_a_read_only_folder():
    source = make(f"mnist:root={DATA}/mnist")
    info = source.info()
    assert (info.size, info.channels, info.evaluate, info.budgets["linf"]) == ((28, 28), 1, 1000, Fraction(3, 10))
    data = source.load(offline=True)
    assert (len(data.train), len(data.test)) == (60000, 10000)
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(data.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    mean = data.train.batch(np.arange(60000)).x.double().mean()
    assert float(mean) == pytest.approx(0.1307, abs=1e-4)  # the mean everybody normalises with
    part = make(f"mnist:root={DATA}/mnist,n=100,train=0.1").load(offline=True)
    assert (len(part.train), len(part.test)) == (6000, 100)
    assert source.fingerprint() == make("mnist").fingerprint()


@needs_data
def test_real_cifar10():
    source = make(f"npz:train={DATA}/cifar10_train20k.npz,test={DATA}/cifar10_test.npz,flip=true,n=1000")
    assert source.info().classes == make("cifar10").info().classes
    data = source.load(offline=True)
    assert (len(data.train), len(data.test)) == (20000, 1000)
    assert np.bincount(data.test.labels).tolist() == [100] * 10
    assert data.test.batch(np.arange(4)).x.shape == (4, 3, 32, 32)
    whole = data.train.batch(np.arange(20000)).x.mean((0, 2, 3))
    assert np.allclose(whole, (0.4914, 0.4822, 0.4465), atol=0.003)


@needs_data
def test_real_cifar100_in_class_order_is_mixed():
    source = make(f"npz:test={DATA}/cifar100_test3k.npz")
    assert source.info().classes == make("cifar100").info().classes
    data = source.load(offline=True)
    assert np.bincount(data.test.labels).tolist() == [30] * 100
    assert np.bincount(data.test.labels[:500]).tolist() == [5] * 100
    pool = make(f"npz:{DATA}/cifar100_test3k.npz").load()
    assert np.bincount(pool.test.labels).tolist() == [6] * 100
