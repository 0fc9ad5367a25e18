"""The built-in datasets: factories only; pixels, NumPy, torch and scikit-learn are loaded on use."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from advplug.builtin.dataset_classes import Kept
from advplug.builtin.dataset_sources import Digits, Download, Fake, Folder, Npz
from advplug.contracts import DatasetCaps, Param, Spec
from advplug.errors import UsageError, did_you_mean
from advplug.params import path as filled_path

if TYPE_CHECKING:
    from advplug.splits import Amounts

_TEN_DIGITS = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
ANIMALS = {
    "cane": "dog", "cavallo": "horse", "elefante": "elephant", "farfalla": "butterfly", "gallina": "chicken",
    "gatto": "cat", "mucca": "cow", "pecora": "sheep", "ragno": "spider", "scoiattolo": "squirrel",
}  # fmt: skip

TrainAmount = Annotated[float, Param("training images to use: a fraction up to 1, or a count", gt=0)]
TestAmount = Annotated[int | None, Param("test images to use, a stratified sample (none: all)", ge=1)]
Classes = Annotated[
    str | None, Param("classes to keep, numbered in this order, like bird:cat:deer (none: all)", later=True)
]
Root = Annotated[
    Path | None, Param("folder with the files (default: the cache folder, filled on first use)", positional=True)
]
Size = Annotated[int, Param("height and width in pixels", ge=8, le=1024)]
Resize = Annotated[int | None, Param("length the shorter side is scaled to before the centre is cut", ge=8, le=4096)]


def _amounts(train: float, n: int | None) -> Amounts:
    from advplug.splits import Amounts

    return Amounts(float(train), n)


def digits(size: Size = 32, train: TrainAmount = 1.0, n: TestAmount = None) -> Digits:
    """Greyscale digits, scaled up bilinearly from 8 x 8."""
    return Digits(size, _amounts(train, n))


def fake(
    classes: Annotated[int, Param("number of classes", ge=2)] = 10,
    channels: Annotated[int, Param("channels", ge=1)] = 3,
    size: Annotated[int, Param("height and width in pixels", ge=1)] = 32,
    train: Annotated[float, Param("training images to make: a count, or a fraction of 400", gt=0)] = 1.0,
    n: Annotated[int, Param("test images to make", ge=1)] = 100,
    seed: Annotated[int, Param("which random images", ge=0, lt=2**32)] = 0,
) -> Fake:
    """Images for trying things out; labels go round in turn, so any first images are balanced."""
    amounts = _amounts(train, n)
    count = int(amounts.train) if amounts.train > 1 else max(1, round(400 * amounts.train))
    return Fake(classes, channels, size, count, n, seed)


def mnist(root: Root = None, train: TrainAmount = 1.0, n: TestAmount = None, classes: Classes = None) -> Download:
    """60,000 and 10,000 handwritten digits, 28 x 28."""
    return _download("mnist", _TEN_DIGITS, root, _amounts(train, n), classes)


def cifar10(root: Root = None, train: TrainAmount = 1.0, n: TestAmount = None, classes: Classes = None) -> Download:
    """50,000 and 10,000 colour images of 10 classes, 32 x 32."""
    return _download("cifar10", tuple(_CIFAR10.split()), root, _amounts(train, n), classes)


def cifar100(root: Root = None, train: TrainAmount = 1.0, n: TestAmount = None, classes: Classes = None) -> Download:
    """50,000 and 10,000 colour images of 100 classes, 32 x 32."""
    return _download("cifar100", tuple(_CIFAR100.split()), root, _amounts(train, n), classes)


def _download(name: str, known: tuple[str, ...], root: Path | None, amounts: Amounts, classes: str | None) -> Download:
    kept = Kept.parsed(classes)
    kept.numbers(known, name)
    return Download(name, known, root, amounts, kept)


ImagePath = Annotated[Path, Param("folder of class folders, or of train and test folders", positional=True)]


def folder(
    path: ImagePath, size: Size = 224, resize: Resize = None, train: TrainAmount = 1.0, n: TestAmount = None
) -> Folder:
    """RGB images; without train and test|val folders, a hash of each file's name splits them 80/20."""
    return Folder("folder", path, size, resize or size, _amounts(train, n))


def animals10(
    path: ImagePath, size: Size = 224, resize: Resize = None, train: TrainAmount = 1.0, n: TestAmount = None
) -> Folder:
    """Animals-10 as it is distributed: Italian folder names, in `raw-img`."""
    return Folder("animals10", path, size, resize or size, _amounts(train, n), _translate, inside="raw-img")


def _translate(folders: tuple[str, ...]) -> tuple[str, ...]:
    for name in folders:
        if name not in ANIMALS and name not in ANIMALS.values():
            hint = did_you_mean(name, ANIMALS) or f"; its folders are {', '.join(ANIMALS)} (others: folder:PATH)"
            raise UsageError(f"animals10 has no class folder '{name}'{hint}")
    return tuple(ANIMALS.get(name, name) for name in folders)


def imagenet(
    path: Annotated[Path, Param("validation folder, its subfolders named by WordNet id or class", positional=True)],
    size: Size = 224,
    resize: Resize = None,
    n: TestAmount = None,
) -> Folder:
    """Any of the 1000 ImageNet classes, for pretrained models; resize defaults to 8/7 of size (256 for 224)."""
    return Folder("imagenet", path, size, resize or size * 8 // 7, _amounts(1, n), _imagenet_classes, test_only=True)


def _imagenet_classes(folders: tuple[str, ...]) -> tuple[str, ...]:
    from advplug.builtin.imagenet import column, columns

    unknown = [name for name in folders if column(name) is None]
    if unknown:
        some = f"'{unknown[0]}'" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
        raise UsageError(
            f"{some}: no WordNet id or class name of ImageNet-1k; rename the class folders, or use folder:PATH with a "
            "model that is trained on it"
        )
    if columns(folders) is None:
        raise UsageError("two of the class folders are the same ImageNet class; merge them")
    return folders


def npz(
    path: Annotated[
        Path | None, Param("file with x, y and optionally classes, split 80/20 without test=", positional=True)
    ] = None,
    train: Annotated[str, Param("training file, or how much of it to use: a fraction up to 1 or a count")] = "1",
    test: Annotated[Path | None, Param("file with the test images; alone, nothing can be trained")] = None,
    n: TestAmount = None,
    flip: Annotated[bool, Param("mirrored images keep their class; used in training")] = False,
    classes: Classes = None,
) -> Npz:
    """x is uint8, or float in [0, 1]: (N, H, W, C), (N, C, H, W) or (N, H, W); y whole numbers from 0."""
    try:
        amount, file = float(Fraction(train)), None
    except (ValueError, ZeroDivisionError, OverflowError):
        amount, file = 1.0, filled_path(train)
    if path is not None and file is not None:
        raise UsageError(f"npz: '{path}' and train={file} are two training files; give one of them")
    if file is not None and test is None:
        raise UsageError(f"npz: train={file} needs a test file; add test=FILE, or write npz:{file} to split it 80/20")
    if path is None and file is None and test is not None and amount != 1:
        raise UsageError(f"npz: there is no training file for train={train} to take from; leave it out or add FILE")
    if path is None and file is None and test is None:
        raise UsageError("npz needs a file: npz:FILE, or npz:train=FILE,test=FILE")
    return Npz(path or file, test, flip, _amounts(amount, n), Kept.parsed(classes))


def _spec(name: str, summary: str, paper: str = "", embedded: bool = False) -> Spec:
    return Spec(name, f"{__name__}:{name}", DatasetCaps(embedded=embedded), summary, paper)


DATASETS: list[Spec] = [
    _spec("digits", "1,797 handwritten digits, embedded", "Alpaydin and Kaynak 1998, UCI repository", embedded=True),
    _spec("mnist", "70,000 handwritten digits, downloaded once", "LeCun et al. 1998, Proc. IEEE 86(11)"),
    _spec("cifar10", "60,000 small photographs in 10 classes, downloaded once", "Krizhevsky 2009"),
    _spec("cifar100", "60,000 small photographs in 100 classes, downloaded once", "Krizhevsky 2009"),
    _spec("folder", "your image folder, one subfolder a class"),
    _spec("animals10", "the Animals-10 folder, Italian names translated"),
    _spec("imagenet", "an ImageNet validation folder, or part of one", "Russakovsky et al. 2015, arXiv:1409.0575"),
    _spec("npz", "your arrays in .npz files"),
    Spec(
        "as-folder",
        "advplug.builtin.dataset_folders:as_folder",
        DatasetCaps(),
        "another dataset written to image files once, and read from them",
    ),
    _spec("fake", "random images with learnable classes, for trying things out", embedded=True),
]
