"""Input defenses: the filters against independent computations, and what an attacker differentiates."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from advplug.attacks.engine import GradientAttack
from advplug.builtin import preprocessing
from advplug.builtin.preprocessing import TV_STEPS, USUAL, settled
from advplug.contracts import Batch, Gradient, Wrap
from advplug.defenses import filters, jpeg
from advplug.defenses.inputs import bit_depth, carried, input_wrap, through
from advplug.errors import CellFailure, UsageError
from advplug.registry import registry
from advplug.testing import check_defense
from advplug.testing.defenses import digits as handwritten
from advplug.testing.defenses import ridge
from advplug.victim import Victim
from cli_tools import CNN, QUICK, TINY, evaluate, run
from linear import stream, threat

Array = np.ndarray[Any, Any]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def soft_images(*shape: int) -> Tensor:
    """Images with edges and gentle slopes, as photographs have them."""
    coarse = images(shape[0], shape[1], 4, 4, seed=3)
    smooth = nn.functional.interpolate(coarse, size=shape[2:], mode="bicubic").clamp(0, 1)
    smooth[:, :, shape[2] // 3 :, shape[3] // 2 :] *= 0.4
    return smooth


# --- what the defenses are made of -----------------------------------------------------------------


CASES: list[tuple[str, dict[str, Any]]] = [
    ("jpeg", {}),
    ("jpeg", {"quality": 20, "subsampling": "4:4:4"}),
    ("bit-depth", {}),
    ("bit-depth", {"bits": 1}),
    *(("denoise", {"method": method}) for method in USUAL),
]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_it_conforms(name: str, params: dict[str, Any]) -> None:
    assert {r.ok for r in check_defense(name, **params)} <= {True, None}


def wrap_of(name: str, **params: Any) -> Wrap:
    entry = registry().get("defense", name)
    bound = {p.name: p.default for p in entry.params()} | params
    [wrap] = entry.make(bound)
    return wrap


@pytest.mark.parametrize(
    ("name", "params", "views"),
    [
        ("jpeg", {}, 2),
        ("bit-depth", {}, 1),
        ("denoise", {"method": "bilateral"}, 2),
        ("denoise", {"method": "gaussian"}, 0),
        ("denoise", {"method": "median"}, 3),
        ("denoise", {"method": "nlm"}, 2),
        ("denoise", {"method": "tv"}, 2),
    ],
)
def test_every_view_shows_the_deployed_image(name: str, params: dict[str, Any], views: int) -> None:
    """Where an attacker evaluates the model is where it is deployed, whatever stands in for the gradient."""
    wrap, x = wrap_of(name, **params), images(2, 3, 9, 11, dtype=torch.float32)
    assert len(wrap.surrogates) == views
    assert wrap.gradient is (Gradient.BPDA if views else Gradient.EXACT)
    seen: list[Tensor] = []

    def inner(changed: Tensor) -> Tensor:
        seen.append(changed.detach())
        return changed.flatten(1)

    for forward in (wrap.forward, *wrap.surrogates):
        forward(inner, x.clone().requires_grad_(), torch.Generator())
    assert all(torch.equal(s, seen[0]) for s in seen)
    assert seen[0].shape == x.shape
    assert not torch.equal(seen[0], x)


def test_the_identity_passes_the_gradient_at_the_changed_image() -> None:
    def quadratic(x: Tensor) -> Tensor:
        return (x**3).flatten(1).sum(1, keepdim=True)

    x = images(3, 1, 5, 5).requires_grad_()
    [wrap] = preprocessing.bit_depth(2)
    assert isinstance(wrap, Wrap)
    (gradient,) = torch.autograd.grad(wrap.surrogates[0](quadratic, x, None).sum(), x)
    assert torch.allclose(gradient, 3 * bit_depth(x.detach(), 2) ** 2)
    (gradient,) = torch.autograd.grad(quadratic(through(torch.round, lambda v: v**2)(x)).sum(), x)
    assert torch.allclose(gradient, 3 * x.detach().round() ** 2 * 2 * x.detach())


def test_what_is_carried_is_exact() -> None:
    path = images(100, dtype=torch.float32).requires_grad_()
    value = images(100, seed=1, dtype=torch.float32) * 1e6
    assert torch.equal(carried(value, path), value)


def test_bit_depth_has_two_to_the_bits_levels() -> None:
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for bits in (1, 2, 5, 8):
        top = 2**bits - 1
        wanted = np.rint(x.numpy() * top) / top
        assert np.array_equal(bit_depth(x, bits).numpy(), wanted)
        assert len(bit_depth(x, bits).unique()) == top + 1
    eight = torch.arange(256, dtype=torch.float32) / 255
    assert torch.allclose(bit_depth(eight, 8), eight, atol=1e-7)


def test_other_peoples_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="method=median takes window, not sigma"):
        preprocessing.denoise("median", sigma=1.0)
    with pytest.raises(UsageError, match="window of method=bilateral must be odd, got 4"):
        preprocessing.denoise(window=4)
    assert settled("nlm", patch=5) == {"window": 7, "patch": 5, "strength": 0.1}


def test_the_bilateral_window_follows_sigma() -> None:
    wide = [settled("bilateral", sigma=sigma)["window"] for sigma in (0.5, 1.0, 3.0, 20.0)]
    assert wide == [3, 5, 13, 63]
    assert settled("bilateral", sigma=3.0, window=5)["window"] == 5
    x = torch.rand(1, 1, 4, 4)
    assert filters.bilateral(x, 20.0, 0.1, 63).shape == x.shape


def exact(v: Tensor) -> Tensor:
    return v


# --- JPEG ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 2, 10, 49, 50, 51, 75, 90, 99, 100])
def test_tables_are_those_that_pillow_writes(quality: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        written = image.quantization  # type: ignore[attr-defined]
    assert [t.flatten().tolist() for t in jpeg.tables(quality)] == [list(written[0]), list(written[1])]


def test_the_printed_tables_are_those_of_quality_50() -> None:
    luminance, chrominance = jpeg.tables(50)
    assert luminance[0].tolist() == [16, 11, 10, 16, 24, 40, 51, 61]
    assert luminance[7].tolist() == [72, 92, 95, 98, 112, 100, 103, 99]
    assert chrominance[1].tolist() == [18, 21, 26, 66, 99, 99, 99, 99]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_compression_is_pillows(subsampling: str) -> None:
    x = soft_images(2, 3, 21, 18).float()
    made = jpeg.compress(x, 60, subsampling)
    for image, compressed in zip(x, made, strict=True):
        buffer = io.BytesIO()
        pixels = np.rint(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=60, subsampling=subsampling)
        with Image.open(buffer) as opened:
            assert np.array_equal(np.rint(compressed.numpy().transpose(1, 2, 0) * 255), np.array(opened))


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """A photograph (1, 3, 427, 640) of bytes."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image("china.jpg").copy()).movedim(2, 0)[None].double() / 255


@pytest.mark.parametrize(("channels", "subsampling"), [(1, "4:2:0"), (3, "4:4:4"), (3, "4:2:2"), (3, "4:2:0")])
@pytest.mark.parametrize("size", [(128, 128), (99, 117)])
@pytest.mark.parametrize("quality", [20, 50, 75, 95])
def test_with_true_rounding_it_is_close_to_pillow(
    photograph: Tensor, channels: int, subsampling: str, size: tuple[int, int], quality: int
) -> None:
    """The DCT in integers is a little off, and now and then a coefficient is rounded to its other side."""
    x = photograph[:, :channels, 100 : 100 + size[0], 200 : 200 + size[1]]
    made = jpeg.compress(x, quality, subsampling)
    off = 255 * (jpeg.differentiable(x, quality, subsampling, torch.round) - made).abs()
    assert off.mean() < 0.7
    assert (off > 2).double().mean() < 0.08
    assert off.max() < 40
    soft = 255 * (jpeg.differentiable(x, quality, subsampling) - made).abs()
    assert off.mean() < soft.mean() < 255 * (made - x).abs().mean()


@pytest.mark.parametrize("channels", [1, 3])
def test_without_rounding_nothing_but_chroma_is_lost(channels: int) -> None:
    x = images(2, channels, 19, 13)
    assert torch.allclose(jpeg.differentiable(x, 10, "4:4:4", exact, exact), x, atol=1e-12)


def test_grey_images_of_three_channels_stay_grey_and_match_those_of_one() -> None:
    x = soft_images(2, 1, 16, 16)
    wide = jpeg.differentiable(x.expand(-1, 3, -1, -1), 50, "4:2:0", torch.round)
    assert torch.allclose(wide, jpeg.differentiable(x, 50, "4:2:0", torch.round).expand_as(wide), atol=1e-9)


def test_rounding_has_the_slope_of_its_stand_in() -> None:
    v = torch.linspace(-3, 3, 241, dtype=torch.float64).requires_grad_()
    soft = jpeg.soft_round(v)
    (slope,) = torch.autograd.grad(soft.sum(), v)
    r = v.detach() - v.detach().round()
    assert torch.allclose(slope, 3 * r**2)
    assert float((soft.detach() - v.detach().round()).abs().max()) == pytest.approx(1 / 8)
    assert float(slope.max()) == pytest.approx(3 / 4)
    assert torch.autograd.gradcheck(
        jpeg.soft_round, (torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True),)
    )


def test_its_gradient_is_that_of_finite_differences() -> None:
    x = (0.2 + 0.6 * images(1, 3, 5, 7)).requires_grad_()
    smooth = partial(jpeg.differentiable, quality=80, subsampling="4:2:0", whole=exact)
    assert torch.autograd.gradcheck(smooth, (x,), fast_mode=True)
    # Rounding to bytes between the steps has the identity's gradient, and moves the coefficients a little.
    (gradient,) = torch.autograd.grad(jpeg.differentiable(x, 80, "4:2:0", exact).sum(), x)
    (unrounded,) = torch.autograd.grad(jpeg.differentiable(x, 80, "4:2:0", exact, exact).sum(), x)
    assert torch.allclose(gradient, unrounded)


def test_images_of_other_channels_are_refused_and_pixels_that_are_no_numbers_stay_so() -> None:
    with pytest.raises(CellFailure, match="1 or 3 channels, these have 4"):
        jpeg.compress(images(1, 4, 8, 8), 50, "4:2:0")
    x = soft_images(2, 3, 8, 8)
    x[1, 0, 0, 0] = torch.nan
    made = jpeg.compress(x, 50, "4:2:0")
    assert made[0].isfinite().all()
    assert made[1].isnan().all()


# --- filters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 12), (1, 5), (2, 2)])
def test_borders_are_mirrored_as_scipy_does(size: tuple[int, int]) -> None:
    x = images(1, 1, *size)
    wide = filters.mirrored(x, 7, 6)[0, 0].numpy()
    assert np.array_equal(wide, np.pad(x[0, 0].numpy(), (7, 6), mode="symmetric"))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_gaussian_is_scipys(sigma: float) -> None:
    x = images(2, 3, 9, 12)
    wanted = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=filters.TRUNCATE)
    assert np.allclose(filters.gaussian(x, sigma).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_median_and_mean_are_scipys(window: int) -> None:
    x = images(2, 3, 9, 12)
    wanted = ndimage.median_filter(x.numpy(), size=(1, 1, window, window), mode="reflect")
    assert np.array_equal(filters.median(x, window).numpy(), wanted)
    averages = ndimage.uniform_filter(x.numpy(), size=(1, 1, window, window), mode="reflect")
    assert np.allclose(filters.mean(x, window).numpy(), averages, atol=1e-12)


def test_a_medians_gradient_goes_to_the_pixel_that_was_picked() -> None:
    x = images(1, 1, 6, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(filters.median(x, 3)[0, 0, 3, 3], x)
    row, column = gradient[0, 0].nonzero()[0].tolist()
    assert gradient.sum() == 1
    assert x[0, 0, row, column] == x[0, 0, 2:5, 2:5].flatten().median()


def padded(image: Array, reach: int) -> Array:
    return np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")


def direct_bilateral(image: Array, sigma: float, spread: float, window: int) -> Array:
    """One image (C, H, W), pixel by pixel."""
    reach = window // 2
    wide, made = padded(image, reach), np.empty_like(image)
    near = [
        [math.exp(-(dy * dy + dx * dx) / (2 * sigma**2)) for dx in range(-reach, reach + 1)]
        for dy in range(-reach, reach + 1)
    ]
    for i, j in np.ndindex(image.shape[1:]):
        around = wide[:, i : i + window, j : j + window]
        distance = np.sqrt(((around - image[:, i, j, None, None]) ** 2).sum(0))
        weight = np.asarray(near) * np.exp(-0.5 * (distance / spread) ** 2)
        made[:, i, j] = (weight * around).sum((1, 2)) / weight.sum()
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_bilateral_is_what_its_definition_says(channels: int) -> None:
    x = soft_images(2, channels, 8, 7)
    made = filters.bilateral(x, 1.3, 0.15, 5).numpy()
    for image, smooth in zip(x.numpy(), made, strict=True):
        assert np.allclose(smooth, direct_bilateral(image, 1.3, 0.15, 5), atol=1e-12)
    # With any difference allowed, it is a Gaussian cut off at the window.
    wide = filters.bilateral(x, 1.0, 1e6, 9).numpy()
    assert np.allclose(wide, ndimage.gaussian_filter(x.numpy(), (0, 0, 1, 1), mode="reflect", truncate=4), atol=1e-9)


def test_bilateral_gradients_with_and_without_the_weights() -> None:
    x = images(1, 2, 4, 4).requires_grad_()
    smooth = partial(filters.bilateral, sigma=1.0, spread=0.3, window=3)
    assert torch.autograd.gradcheck(smooth, (x,), fast_mode=True)
    whole, fixed = smooth(x), smooth(x, detached=True)
    assert torch.equal(whole, fixed)
    # With the weights held, a smooth image is linear in its pixels: the gradients of each sum up to one.
    (gradient,) = torch.autograd.grad(fixed[0, 0, 1, 2], x, retain_graph=True)
    assert float(gradient[0, 0].sum()) == pytest.approx(1)
    assert float(gradient.min()) >= 0
    (exact,) = torch.autograd.grad(whole[0, 0, 1, 2], x)
    assert not torch.allclose(exact, gradient)


def direct_nlm(image: Array, patch: int, window: int, strength: float) -> Array:
    reach, margin = window // 2, patch // 2
    wide, made = padded(image, reach + margin), np.empty_like(image)

    def around(i: int, j: int) -> Array:
        """The patch whose middle is pixel (i, j)."""
        top, left = i + reach, j + reach
        return wide[:, top : top + patch, left : left + patch]

    for i, j in np.ndindex(image.shape[1:]):
        total, mass = np.zeros(len(image)), 0.0
        for k in range(i - reach, i + reach + 1):
            for m in range(j - reach, j + reach + 1):
                weight = math.exp(-((around(k, m) - around(i, j)) ** 2).mean() / strength**2)
                total += weight * around(k, m)[:, margin, margin]
                mass += weight
        made[:, i, j] = total / mass
    return made


@pytest.mark.parametrize(("channels", "patch", "window"), [(1, 3, 5), (3, 3, 7), (2, 1, 3), (1, 5, 5)])
def test_non_local_means_is_what_its_definition_says(channels: int, patch: int, window: int) -> None:
    x = soft_images(1, channels, 6, 7)
    made = filters.nlm(x, patch, window, 0.2).numpy()
    assert np.allclose(made[0], direct_nlm(x[0].numpy(), patch, window, 0.2), atol=1e-12)


def test_non_local_means_keeps_no_more_for_its_gradient_than_needed_and_gets_it_right() -> None:
    x = images(1, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(partial(filters.nlm, patch=3, window=3, strength=0.4), (x,), fast_mode=True)


def variation(u: Array) -> float:
    down, right = np.zeros_like(u), np.zeros_like(u)
    down[:-1], right[:, :-1] = np.diff(u, axis=0), np.diff(u, axis=1)
    return float(np.sqrt(down**2 + right**2).sum())


def test_total_variation_of_two_pixels_is_known() -> None:
    """min (u - a)^2 / 2 + (v - b)^2 / 2 + s |u - v|: both move by s toward each other, until they meet."""
    x = torch.tensor([0.2, 0.8], dtype=torch.float64).view(1, 1, 1, 2)
    assert torch.allclose(filters.tv(x, 0.1, 500).flatten(), torch.tensor([0.3, 0.7], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(filters.tv(x, 0.5, 500).flatten(), torch.tensor([0.5, 0.5], dtype=torch.float64), atol=1e-6)


def test_total_variation_cannot_be_improved() -> None:
    """The function is convex with curvature 1: no image is better, and those nearby are worse."""
    f = soft_images(1, 1, 8, 9)
    strength = 0.05
    u = filters.tv(f, strength, 3000)[0, 0].numpy()

    def cost(v: Array) -> float:
        return float(((v - f[0, 0].numpy()) ** 2).sum()) / 2 + strength * variation(v)

    best = cost(u)
    assert best < cost(f[0, 0].numpy())
    draws = np.random.default_rng(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            step = size * draws.standard_normal(u.shape)
            assert cost(u + step) >= best + 0.5 * float((step**2).sum()) - 1e-5
    assert u.mean() == pytest.approx(float(f.mean()))


def test_total_variation_is_nearly_done_after_the_usual_steps() -> None:
    x = soft_images(2, 3, 32, 32)
    strength = USUAL["tv"]["strength"]
    assert (filters.tv(x, strength, TV_STEPS) - filters.tv(x, strength, 2000)).abs().max() < 2e-3


def test_total_variation_has_a_gradient_where_nothing_varies() -> None:
    flat = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(filters.tv(flat, 0.1, 20).sum(), flat)
    assert torch.allclose(gradient, torch.ones_like(gradient))
    x = (0.2 + 0.6 * images(1, 1, 4, 4)).requires_grad_()
    assert torch.autograd.gradcheck(partial(filters.tv, strength=0.05, steps=5), (x,), fast_mode=True)


@pytest.mark.parametrize(
    "change",
    [
        partial(filters.gaussian, sigma=1.0),
        partial(filters.median, window=2),
        partial(filters.bilateral, sigma=1.0, spread=0.1, window=5),
        partial(filters.nlm, patch=3, window=5, strength=0.1),
        partial(filters.tv, strength=0.05, steps=10),
        partial(jpeg.compress, quality=50, subsampling="4:2:0"),
        partial(jpeg.differentiable, quality=50, subsampling="4:2:0"),
    ],
)
def test_images_are_changed_one_by_one_and_their_layout_does_not_matter(change: Callable[[Tensor], Tensor]) -> None:
    x = images(3, 3, 10, 7, dtype=torch.float32)
    together = change(x)
    assert together.dtype == x.dtype
    assert torch.allclose(together, torch.cat([change(x[i : i + 1]) for i in range(3)]), atol=1e-6)
    assert torch.allclose(together, change(x.to(memory_format=torch.channels_last)), atol=1e-6)
    assert torch.allclose(change(torch.zeros_like(x)), torch.zeros_like(x), atol=1e-6)


# --- as attacked -----------------------------------------------------------------------------------


def test_one_bit_has_no_gradient_of_its_own_and_breaks_through_its_stand_in() -> None:
    """Static, exact and through the declared stand-in, on a linear classifier of digits (algorithms of BPDA)."""
    module = copy.deepcopy(ridge()).double()
    some = handwritten().test.batch(np.arange(150))
    x, y = some.x.double(), some.y
    [wrap] = preprocessing.bit_depth(1)
    assert isinstance(wrap, Wrap)
    defended = Victim(module, 10, (wrap,))
    blind = Victim(module, 10, (Wrap(wrap.forward),))
    right = defended.decide(x).label == y
    batch = Batch(x[right], y[right], torch.arange(int(right.sum())))
    leaf = batch.x.clone().requires_grad_()
    assert not blind.attacked(leaf).requires_grad or not torch.autograd.grad(blind.attacked(leaf).sum(), leaf)[0].any()
    attack = GradientAttack(steps=20, start="clean")

    def broken(victim: Victim) -> float:
        made = attack(victim, batch, threat(0.2), stream()).x
        return float((defended.decide(made).label != batch.y).double().mean())

    assert broken(blind) == 0
    assert broken(defended) > broken(defended.bare) + 0.1


def test_static_bare_and_adaptive_stand_beside_each_other(tmp_path: Any) -> None:
    result = evaluate("-m", CNN, "-a", "pgd:steps=3", "-d", "bit-depth:bits=1", "-d", "jpeg+denoise:method=median",
                      *QUICK, output=tmp_path / "out")  # fmt: skip
    defended = [c for c in result["cells"] if c["defense"] != "none"]
    assert len(defended) == 2
    for cell in defended:
        for origin in ("static", "bare", "adaptive"):
            assert cell["metrics"][f"{origin}_robust_accuracy"] is not None
        assert any("stand-in (BPDA)" in note for note in cell["notes"])
    base = next(c for c in result["cells"] if c["defense"] == "none")
    # Two views of the stack at most: they combine index by index.
    assert defended[1]["passes"]["backward"] <= 3 * 3 * base["metrics"]["clean_accuracy"]["n"] + 3 * 20


def test_the_exact_filter_carries_no_note_of_a_stand_in(tmp_path: Any) -> None:
    result = evaluate("-m", CNN, "-a", "fgsm", "-d", "denoise:method=gaussian", *QUICK, output=tmp_path / "out")
    assert not any("BPDA" in note for cell in result["cells"] for note in cell["notes"])


def test_what_makes_no_sense_is_one_clear_line(tmp_path: Any) -> None:
    for defense, told in (
        ("denoise:method=tv,window=3", "method=tv takes strength, not window"),
        ("denoise:method=nlm,patch=2", "patch of method=nlm must be odd, got 2"),
        ("jpeg:quality=0", "quality must be >= 1, got 0"),
        ("denoise:method=mean", "method cannot be 'mean'"),
    ):
        ran = run("eval", "-m", CNN, "--dataset", TINY, "-a", "fgsm", "-d", defense, "-o", str(tmp_path / "out"))
        assert ran.code == 2
        assert told in ran.err
        assert "Traceback" not in ran.err


def test_a_wrap_without_stand_ins_is_differentiated_itself() -> None:
    wrap = input_wrap(lambda x: 2 * x)
    assert wrap.surrogates == ()
    assert wrap.gradient is Gradient.EXACT
    x = images(1, 1, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(Victim(nn.Flatten(), 4, (wrap,)).attacked(x).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))
