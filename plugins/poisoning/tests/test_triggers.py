"""Triggers against closed forms: which pixels, by how much, the same for every batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from advplug.errors import UsageError
from advplug.rng import Stream
from advplug_poisoning.settings import TAKES, TriggerSettings
from advplug_poisoning.triggers import Apply, build, warping_grid

ALL = [
    TriggerSettings("patch", size=3),
    TriggerSettings("checker", size=4, place="corners"),
    TriggerSettings("random", size=5, place="random"),
    TriggerSettings("random", size=5, fresh=True, opacity=0.5),
    TriggerSettings("blended", opacity=0.2),
    TriggerSettings("blended", opacity=0.2, fresh=True),
    TriggerSettings("sig"),
    TriggerSettings("wanet"),
]


def made(settings: TriggerSettings, shape: tuple[int, int, int] = (3, 20, 24), seed: int = 0) -> Apply:
    return build(settings, shape[0], shape[1:], Stream(seed, "trigger"))


def images(n: int = 4, shape: tuple[int, int, int] = (3, 20, 24)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def changed(settings: TriggerSettings, x: Tensor) -> tuple[Tensor, Tensor]:
    """The images with the trigger, and where they changed (B, H, W)."""
    y = made(settings, tuple(x.shape[1:]))(x, torch.arange(len(x)))  # type: ignore[arg-type]
    return y, (y != x).any(1)


def box(row: int, column: int, side: int, size: tuple[int, int] = (20, 24)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[row : row + side, column : column + side] = True
    return mask


def test_there_is_a_case_of_every_trigger() -> None:
    assert {s.kind for s in ALL} == set(TAKES)


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_images_and_the_input_as_it_was(settings: TriggerSettings, channels: int) -> None:
    x = images(5, (channels, 20, 24))
    before = x.clone()
    y, _ = changed(settings, x)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert 0 <= y.min() <= y.max() <= 1
    assert (y - x).abs().flatten(1).amax(1).min() > 0.05, "each image changed"


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_nothing_depends_on_the_batch_and_all_on_the_seed(settings: TriggerSettings) -> None:
    x, index = images(6), torch.tensor([5, 90, 3, 17, 4, 8])
    whole = made(settings)(x, index)
    again = made(settings)  # as another process would make it
    alone = torch.cat([again(x[i : i + 1], index[i : i + 1]) for i in (4, 0, 2)])
    torch.testing.assert_close(alone, whole[[4, 0, 2]], rtol=0, atol=1e-6)
    other = made(settings, seed=1)(x, index)
    drawn = settings.kind in ("random", "blended", "wanet")
    assert torch.equal(other, whole) != drawn


@pytest.mark.parametrize(
    ("place", "margin", "corner"),
    [
        ("bottom-right", 1, (16, 20)),
        ("bottom-left", 0, (17, 0)),
        ("top-right", 2, (2, 19)),
        ("top-left", 1, (1, 1)),
        ("centre", 1, (8, 10)),
        ("21:0", 1, (0, 21)),
    ],
)
def test_a_white_patch_is_where_it_should_be_and_nowhere_else(place: str, margin: int, corner: tuple[int, int]) -> None:
    y, where = changed(TriggerSettings("patch", size=3, place=place, margin=margin), images())
    assert torch.equal(where, box(*corner, 3).expand(4, -1, -1))
    assert (y[:, :, where[0]] == 1).all()


def test_four_corners_at_once() -> None:
    _, where = changed(TriggerSettings("patch", size=2, place="corners"), images(1))
    assert torch.equal(where[0], box(1, 1, 2) | box(1, 21, 2) | box(17, 1, 2) | box(17, 21, 2))


def test_checkers_alternate_from_white() -> None:
    y, _ = changed(TriggerSettings("checker", size=4, place="2:3"), images(1))
    expected = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
    assert torch.equal(y[0, :, 3:7, 2:6], expected.expand(3, -1, -1))


def test_opacity_mixes() -> None:
    x = images(1)
    y, _ = changed(TriggerSettings("patch", size=3, place="0:0", opacity=0.25), x)
    torch.testing.assert_close(y[:, :, :3, :3], 0.75 * x[:, :, :3, :3] + 0.25)


def test_random_places_differ_follow_the_image_and_reach_every_place() -> None:
    settings = TriggerSettings("patch", size=4, place="random", margin=1)
    x = torch.zeros(500, 1, 8, 9)
    _, where = changed(settings, x)
    assert (where.sum((1, 2)) == 16).all()
    corners = where.flatten(1).int().argmax(1)
    assert set(corners.tolist()) == {9 * row + column for row in (1, 2, 3) for column in (1, 2, 3, 4)}


def test_a_random_patch_is_one_pattern_and_a_fresh_one_is_not() -> None:
    x = 0.5 + images(300) / 10
    one, _ = changed(TriggerSettings("random", size=6, place="0:0"), x)
    assert torch.equal(one[:, :, :6, :6], one[:1, :, :6, :6].expand(300, -1, -1, -1))
    fresh, where = changed(TriggerSettings("random", size=6, place="0:0", fresh=True), x)
    assert not where[:, 6:].any()
    seen = fresh[:, :, :6, :6]
    assert seen.std(0).min() > 0.3
    # A normal of standard deviation 1 about m falls below 0 with probability Phi(-m), where it is cut.
    cut = 0.5 * (1 + math.erf(-0.55 / math.sqrt(2)))
    assert abs((seen == 0).float().mean().item() - cut) < 0.01


def test_blended_noise_is_the_mix_of_one_pattern() -> None:
    x = images(50)
    y, _ = changed(TriggerSettings("blended", opacity=0.2), x)
    pattern = (y - 0.8 * x) / 0.2
    torch.testing.assert_close(pattern, pattern[:1].expand_as(pattern), rtol=0, atol=1e-5)
    assert abs(pattern[0].mean().item() - 0.5) < 0.03
    fresh, _ = changed(TriggerSettings("blended", opacity=0.2, fresh=True), x)
    noise = (fresh - 0.8 * x) / 0.2
    assert noise.std(0).mean() > 0.25


def test_sine_waves_have_their_amplitude_and_frequency() -> None:
    x = torch.full((2, 1, 16, 64), 0.5)
    y, _ = changed(TriggerSettings("sig", amplitude=0.1, frequency=6), x)
    wave = (y - x)[0, 0]
    assert torch.equal(wave, wave[:1].expand_as(wave)), "columns only"
    spectrum = torch.fft.rfft(wave[0].double()).abs() * 2 / 64
    torch.testing.assert_close(spectrum[6].item(), 0.1, rtol=0, atol=1e-6)
    assert spectrum[torch.arange(33) != 6].max() < 1e-6
    bright, _ = changed(TriggerSettings("sig", amplitude=0.1), torch.ones(1, 1, 8, 64))
    assert bright.max() == 1


def displacement(size: int, points: int, strength: float, seed: int = 0) -> Tensor:
    """In pixels, (H, W, 2)."""
    grid = warping_grid((size, size), points, strength, torch.Generator().manual_seed(seed))
    at = torch.linspace(-1, 1, size)
    identity = torch.stack([at.expand(size, -1), at[:, None].expand(-1, size)], dim=-1)
    return (grid - identity) * (size - 1) / 2


def test_warps_move_pixels_as_far_as_the_papers_do() -> None:
    # One displacement a pixel: mean size s (H - 1) / 2 H but for what leaves the image.
    assert abs(displacement(224, 224, 1).abs().mean().item() - 223 / 448) < 0.01
    means = [displacement(32, 4, 0.5, seed).abs().mean().item() for seed in range(20)]
    assert 0.16 < np.mean(means) < 0.2
    assert 0.15 < min(means) < max(means) < 0.23


def test_a_warp_is_smooth_and_twice_as_strong_moves_twice_as_far() -> None:
    weak, strong = displacement(32, 4, 0.5), displacement(32, 4, 1.0)
    inside = slice(3, -3)  # nothing is cut at the edges there
    torch.testing.assert_close(strong[inside, inside], 2 * weak[inside, inside], rtol=1e-3, atol=1e-5)
    assert weak[inside, inside].diff(dim=0).abs().max() < 0.2


def test_a_warp_without_strength_would_be_the_image() -> None:
    grid = warping_grid((20, 24), 4, 0.0, torch.Generator())
    x = images()
    y = torch.nn.functional.grid_sample(x, grid.expand(4, -1, -1, -1), align_corners=True)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TriggerSettings("patch", size=20), "20 x 20 pixels at place=bottom-right with margin=1"),
        (TriggerSettings("patch", size=21, margin=0), "does not fit in images of 20 x 24"),
        (TriggerSettings("checker", size=19, place="random"), "place=random"),
        (TriggerSettings("patch", size=3, place="22:0"), "place=22:0 does not fit"),
        (TriggerSettings("patch", size=21, place="centre"), "place=centre does not fit"),
    ],
)
def test_patches_that_do_not_fit(settings: TriggerSettings, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(settings)


def test_patches_that_just_fit() -> None:
    x = images(1)
    for settings in (
        TriggerSettings("patch", size=19),
        TriggerSettings("patch", size=18, place="random"),
        TriggerSettings("patch", size=20, place="centre"),
        TriggerSettings("patch", size=20, place="corners", margin=0),
    ):
        assert changed(settings, x)[1].any()


@pytest.mark.parametrize(("side", "expected"), [(8, 3), (32, 3), (224, 16)])
def test_the_size_of_a_patch_follows_the_images(side: int, expected: int) -> None:
    _, where = changed(TriggerSettings("patch"), torch.zeros(1, 1, side, side))
    assert where.sum() == expected**2
