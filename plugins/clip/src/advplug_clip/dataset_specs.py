"""What is registered of the datasets: factories only; pixels, NumPy and torch are loaded on use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from advplug.contracts import DatasetCaps, Param, Spec
from advplug.errors import UsageError
from advplug.naming import word_of

if TYPE_CHECKING:
    from advplug.splits import Amounts
    from advplug_clip.caption_files import CaptionedFiles
    from advplug_clip.hub_captions import HubCaptions
    from advplug_clip.scenes import DigitScenes

TrainAmount = Annotated[float, Param("training images to use: a fraction up to 1, or a count", gt=0)]
TestAmount = Annotated[int | None, Param("test images to use (none: all)", ge=1)]
Size = Annotated[int, Param("height and width in pixels", ge=8, le=1024)]
Resize = Annotated[
    int | None, Param("length the shorter side is scaled to before the centre is cut (none: size)", ge=8, le=4096)
]
SkipBad = Annotated[bool, Param("leave out images and captions that cannot be used, and say which; reads every image")]
Classes = Annotated[
    str | None,
    Param("words that captions name, as dog:man:fire_truck; an image is of the class that most of its captions name"),
]
ImageColumn = Annotated[str | None, Param("column of the images (none: a usual name, such as image or file_name)")]
CaptionColumn = Annotated[str | None, Param("column of the captions (none: a usual name, such as caption or text)")]


def digit_scenes(
    train: Annotated[int, Param("training scenes to draw", ge=1)] = 4000,
    n: Annotated[int, Param("test scenes to draw", ge=1)] = 1000,
    size: Annotated[int, Param("height and width in pixels", ge=16, le=1024)] = 32,
    count: Annotated[int, Param("draw 1 to this many copies of the digit", ge=1, le=9)] = 1,
    captions: Annotated[int, Param("captions of a test scene, each in other words", ge=1, le=5)] = 3,
    seed: Annotated[int, Param("which scenes", ge=0, lt=2**32)] = 0,
) -> DigitScenes:
    """Handwritten digits in 8 colours, 2 sizes and 5 places on 6 dark grounds; classes are the digits."""
    from advplug_clip.scenes import DigitScenes

    return DigitScenes(train, n, size, count, captions, seed)


def flickr8k(
    path: Annotated[Path, Param("folder with captions.txt or Flickr8k.token.txt, and the images", positional=True)],
    size: Size = 224,
    resize: Resize = None,
    train: TrainAmount = 1.0,
    n: TestAmount = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
) -> CaptionedFiles:
    """Official splits where Flickr_8k.trainImages.txt and testImages.txt are there; otherwise 80/20 by a hash."""
    from advplug_clip.caption_files import CaptionedFiles
    from advplug_clip.caption_formats import read_flickr8k

    read = functools.partial(read_flickr8k, path)
    return CaptionedFiles("flickr8k", path, read, size, resize or size, skip_bad, _amounts(train, n),
                          _classes(classes))  # fmt: skip


def coco_captions(
    path: Annotated[Path, Param("folder with annotations/captions_*.json and the folders of images", positional=True)],
    year: Annotated[int | None, Param("which release (none: the newest that is there)", ge=2000, le=2999)] = None,
    size: Size = 224,
    resize: Resize = None,
    train: TrainAmount = 1.0,
    n: TestAmount = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
) -> CaptionedFiles:
    """Trains on train, evaluates on val; with val alone nothing can be trained."""
    from advplug_clip.caption_files import CaptionedFiles
    from advplug_clip.caption_formats import read_coco

    read = functools.partial(read_coco, path, year)
    return CaptionedFiles("coco-captions", path, read, size, resize or size, skip_bad, _amounts(train, n),
                          _classes(classes))  # fmt: skip


def captions(
    path: Annotated[Path, Param("CSV, TSV, JSON lines or JSON list of images and captions", positional=True)],
    test: Annotated[Path | None, Param("such a file with the test images (none: 80/20 by a hash)")] = None,
    image: ImageColumn = None,
    caption: CaptionColumn = None,
    root: Annotated[Path | None, Param("folder that paths start from (none: the file's own)")] = None,
    size: Size = 224,
    resize: Resize = None,
    train: TrainAmount = 1.0,
    n: TestAmount = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
) -> CaptionedFiles:
    """An image with several captions has several rows, or a list of them in a JSON row."""
    from advplug_clip.caption_files import CaptionedFiles
    from advplug_clip.caption_formats import Columns, read_captions

    read = functools.partial(read_captions, path, test, Columns(image, caption, root))
    return CaptionedFiles("captions", path, read, size, resize or size, skip_bad, _amounts(train, n),
                          _classes(classes))  # fmt: skip


def hf_captions(
    name: Annotated[str, Param("OWNER/NAME on the hub, or a local folder", positional=True)],
    config: Annotated[str | None, Param("configuration of the dataset (none: its default)")] = None,
    revision: Annotated[str | None, Param("commit or tag; pins what is evaluated (none: the newest)")] = None,
    train_split: Annotated[str | None, Param("split to train on (none: nothing to train on)")] = "train",
    test_split: Annotated[str, Param("split to evaluate on")] = "test",
    image: ImageColumn = None,
    caption: CaptionColumn = None,
    size: Size = 224,
    resize: Resize = None,
    train: TrainAmount = 1.0,
    n: TestAmount = None,
    skip_bad: SkipBad = False,
) -> HubCaptions:
    """Splits are written as the library takes them, such as validation or train[:1000]."""
    from advplug_clip.hub_captions import HubCaptions

    if train_split == test_split:
        raise UsageError(f"hf-captions: train_split and test_split are both '{test_split}'; nothing may be in both")
    amounts = _amounts(train, n)
    return HubCaptions(name, config, revision, train_split, test_split, image, caption, size, resize or size, skip_bad,
                       amounts)  # fmt: skip


def _classes(words: str | None) -> tuple[str, ...]:
    """Raises UsageError for fewer than two classes, or one that stands twice."""
    if words is None:
        return ()
    found = [word_of(word) for word in words.split(":")]
    if len(found) < 2 or not all(found) or len({w.casefold() for w in found}) < len(found):
        raise UsageError(f"classes={words} must be at least two different words with a colon between, such as dog:man")
    return tuple(found)


def _amounts(train: float, n: int | None) -> Amounts:
    from advplug.splits import Amounts

    return Amounts(float(train), n)


def _spec(name: str, summary: str, paper: str = "", embedded: bool = False) -> Spec:
    return Spec(name, f"{__name__}:{name.replace('-', '_')}", DatasetCaps(embedded=embedded), summary, paper)


DATASETS: list[Spec] = [
    _spec("digit-scenes", "handwritten digits in coloured scenes, with captions, drawn on the spot",
          "digits: Alpaydin and Kaynak 1998, UCI repository", embedded=True),
    _spec("flickr8k", "the Flickr8k folder: photographs with five captions each", "Hodosh et al. 2013, JAIR 47"),
    _spec("coco-captions", "a COCO folder: photographs with five captions each", "Chen et al. 2015, arXiv:1504.00325"),
    _spec("captions", "your table of image files and captions"),
    _spec("hf-captions", "images with captions from the Hugging Face hub (needs the library datasets)"),
]  # fmt: skip
