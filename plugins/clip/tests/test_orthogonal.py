"""Orthogonal fine-tuning: what rotations keep, that they reach every weight, and that nothing is left of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from advplug.errors import CellFailure
from advplug_clip import orthogonal, tiny
from advplug_clip.orthogonal import Oft, Rotation, attach, merge, places
from advplug_clip.scorer import ClipScorer

GROUPS = (("a red cat", "the cat"), ("a dog",))
TOWERS = ["convolutional", "transformer"]
BLOCK_WEIGHTS = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]


def scorer(kind: str) -> ClipScorer:
    torch.manual_seed(0)
    return tiny.scorer(kind, GROUPS, 20, 64).eval()  # type: ignore[arg-type]


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def names(tower: nn.Module) -> dict[str, str]:
    """Layouts of the weights that are rotated, by their names."""
    modules = {id(m): name for name, m in tower.named_modules()}
    return {f"{modules[id(p.module)]}.{p.name}".lstrip("."): p.layout for p in places(tower)}


def matrix(weight: Tensor, layout: str) -> list[Tensor]:
    """The (out, in) matrices that a weight's numbers are."""
    if layout == "qkv":
        return list(weight.detach().double().chunk(3))
    return [(weight.T if layout == "columns" else weight.flatten(1)).detach().double()]


def turn(model: ClipScorer, trained: list[nn.Parameter], steps: int = 3) -> None:
    """A few steps up, so that every rotation is far from none."""
    optimizer = torch.optim.Adam(trained, 0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.encode_image(images()).square().sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", TOWERS)
def test_rotations_keep_the_model_then_geometry_and_leave_nothing_behind(kind: str) -> None:
    model = scorer(kind)
    tower = model.clip.visual
    layouts = names(tower)
    parameters = dict(tower.named_parameters())
    first = {name: parameters[name].detach().clone() for name in layouts}
    rest = {name: v.clone() for name, v in model.state_dict().items() if name.removeprefix("clip.visual.") not in first}
    keys, size = set(model.state_dict()), sum(p.numel() for p in tower.parameters())
    with torch.no_grad():
        before = model(images())
    trained = attach(tower, Oft())
    assert torch.equal(model(images()), before), "identity at the start, exactly"
    assert sum(p.numel() for p in trained) < size / 10
    assert {id(p) for p in tower.parameters() if p.requires_grad} == {id(p) for p in trained}

    turn(model, trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained), "every rotation counts"
    with torch.no_grad():
        turned = model(images())
    assert (turned - before).abs().max() > 0.1
    merge(tower)
    with torch.no_grad():
        assert torch.equal(model(images()), turned), "merged weights give the same outputs"
    assert set(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter and p.requires_grad for p in tower.parameters())
    assert type(tower).__name__ in ("ConvolutionalTower", "VisionTransformer")
    for name, value in rest.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} is no weight matrix and stays"
    parameters = dict(tower.named_parameters())
    for name, layout in layouts.items():
        _same_geometry(name, matrix(first[name], layout), matrix(parameters[name], layout))


def _same_geometry(name: str, before: list[Tensor], after: list[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        assert (old - new).norm() > 1e-3 * old.norm(), f"{name} is rotated"
        scale = float(torch.linalg.matrix_norm(old, 2)) ** 2
        assert (new @ new.T - old @ old.T).abs().max() < 2e-6 * scale, f"Gram matrix of {name}"
        values = torch.linalg.svdvals(new) - torch.linalg.svdvals(old)
        assert values.abs().max() < 2e-6 * scale**0.5, f"singular values of {name}"


def test_every_weight_matrix_of_a_vision_transformer_is_rotated() -> None:
    blocks = {f"transformer.resblocks.{i}.{w}" for i in range(3) for w in BLOCK_WEIGHTS}
    found = names(scorer("transformer").clip.visual)
    assert set(found) == {"conv1.weight", "proj"} | blocks
    assert found["proj"] == "columns"
    assert {name for name, layout in found.items() if layout == "qkv"} == {n for n in blocks if "in_proj" in n}


def test_open_clips_residual_networks_are_covered() -> None:
    from open_clip.modified_resnet import ModifiedResNet

    torch.manual_seed(0)
    tower = ModifiedResNet([1, 1, 1, 1], 32, 2, image_size=32, width=8).eval()
    x = images(2)
    with torch.no_grad():
        before = tower(x)
    trained = attach(tower, Oft())
    assert torch.equal(tower(x), before)
    tower(x).square().sum().backward()
    assert all(p.grad is not None for p in trained)
    merge(tower)
    assert {n for n in names(tower) if "attnpool" in n} == {f"attnpool.{p}_proj.weight" for p in "qkvc"}


def test_rotations_are_those_of_cayley() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator)
    rotation = Rotation(weight, "rows", Oft(3))
    assert [tuple(p.shape) for p in rotation.parameters()] == [(1, 2, 3)], "one input is left and stays"
    with torch.no_grad():
        rotation.generators.copy_(torch.randn(1, 2, 3, generator=generator))
    expected = torch.eye(7, dtype=torch.float64)
    for i, (a, b, c) in enumerate(rotation.generators[0].detach().double()):
        skew = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]], dtype=torch.float64)
        part = slice(3 * i, 3 * i + 3)
        expected[part, part] = (torch.eye(3) + skew) @ torch.linalg.inv(torch.eye(3) - skew)
    torch.testing.assert_close(rotation(weight).double(), weight.double() @ expected.T, rtol=1e-5, atol=1e-5)


def test_inputs_that_fill_no_block_are_rotated_among_themselves() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(weight, "rows", Oft(16))
    assert [tuple(p.shape) for p in rotation.parameters()] == [(1, 1, 120), (1, 1, 55)]
    with torch.no_grad():
        rotation.rest.fill_(0.1)  # type: ignore[union-attr]
    change = (rotation(weight) - weight).detach().flatten(1).abs().amax(0)
    assert change[:16].max() == 0
    assert change[16:].min() > 0


def test_queries_keys_and_values_have_rotations_of_their_own() -> None:
    weight = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(weight, "qkv", Oft(4))
    with torch.no_grad():
        rotation.generators[1].fill_(0.2)
    change = (rotation(weight) - weight).detach().view(3, -1).abs().amax(1)
    assert change[0] == change[2] == 0
    assert change[1] > 0.1


@pytest.mark.parametrize("size", [0.01, 0.5])
def test_coft_bounds_the_generators_of_a_weight(size: float) -> None:
    weight = torch.eye(16)
    rotation = Rotation(weight, "rows", Oft(4, coft=size))
    assert torch.equal(rotation(weight), weight)
    rotation(weight).sum().backward()
    assert rotation.generators.grad is not None
    assert rotation.generators.grad.isfinite().all()
    with torch.no_grad():
        rotation.generators.normal_(generator=torch.Generator().manual_seed(0))
    turned = rotation(weight).detach().double().T  # R, since W is the identity
    skew = torch.linalg.solve(turned + torch.eye(16), turned - torch.eye(16))
    assert float(skew.norm()) == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8, dtype=dtype)
    made = Rotation(weight, "rows", Oft(4))(weight)
    assert made.dtype == dtype
    assert torch.equal(made, weight)


def test_a_tower_without_weight_matrices_is_refused() -> None:
    with pytest.raises(CellFailure, match="no weight matrices that could be rotated; use adapter=none"):
        attach(nn.Sequential(nn.LayerNorm(4)), Oft())


def test_parametrisations_are_of_the_modules_own_weights() -> None:
    """open_clip's attention never calls its out_proj: a wrapper around that would be without effect."""
    model = scorer("transformer")
    attention = model.clip.visual.transformer.resblocks[0].attn
    called: list[Callable[..., Tensor]] = []
    attention.out_proj.register_forward_hook(lambda *_: called.append(attention.out_proj))
    attach(model.clip.visual, Oft())
    with torch.no_grad():
        before = model(images())
        attention.out_proj.parametrizations.weight[0].generators.fill_(0.1)
        assert not torch.equal(model(images()), before)
    assert not called
    assert orthogonal.QKV in attention.parametrizations
