"""What is registered of the datasets: factories only; pixels, NumPy and torch are loaded on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from advplug.contracts import DatasetCaps, Param, Spec

if TYPE_CHECKING:
    from advplug_clip.scenes import DigitScenes


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


DATASETS: list[Spec] = [
    Spec("digit-scenes", f"{__name__}:digit_scenes", DatasetCaps(embedded=True),
         "handwritten digits in coloured scenes, with captions, drawn on the spot",
         "digits: Alpaydin and Kaynak 1998, UCI repository"),
]  # fmt: skip
