"""Pruning: the right filters go, everything that depends on them goes with them, and the rest is untouched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.artifacts import Artifact, Artifacts
from advplug.builtin import models, nets
from advplug.builtin.prune import prune
from advplug.contracts import DatasetInfo, Schedule, Tuned
from advplug.data import ArrayImages, Split
from advplug.defenses.pruning import Graph, rebuild, shrink
from advplug.errors import UsageError
from advplug.parse import parse_reference, parse_stack
from advplug.registry import registry
from advplug.rng import Stream
from advplug.train import Training
from advplug.vision import import_torchvision

INFO = DatasetInfo(tuple("0123456789"), 3, (32, 32), {})


def lively(model: nn.Module, channels: int = 3) -> nn.Module:
    """Batch norm with statistics and weights unlike their start, so that a wrong channel shows."""
    draws = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert isinstance(tensor, Tensor)
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draws))
    return model.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return lively(import_torchvision().models.resnet18(num_classes=10))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def training(epochs: int = 5) -> Training:
    draws = np.random.default_rng(0)
    pixels = draws.random((24, 3, 32, 32), dtype=np.float32)
    data = Split(ArrayImages(pixels), np.arange(24) % 10, np.arange(24))
    return Training(data, INFO, Schedule(epochs=epochs, batch_size=8), torch.device("cpu"), Stream(0, "test"))


def small(width: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)]
    model = lively(nn.Sequential(*layers))
    assert isinstance(model, nn.Sequential)
    return model


def apply(model: nn.Module, train: Training | None = None, **params: Any) -> Tuned:
    if "layers" in params:
        params["layers"] = parse_stack(params["layers"])
    [tune] = prune(**params)
    return tune.apply(copy.deepcopy(model), train or training())  # type: ignore[union-attr,call-arg,return-value]


# --- which filters, and what goes with them --------------------------------------------------------


def test_the_filters_of_smallest_l1_norm_go_with_their_batch_norm_and_readers() -> None:
    model = small()
    tuned = apply(model, ratio=0.3, layers="0", epochs=0).model
    norms = [sum(abs(v) for v in filter_.flatten().tolist()) for filter_ in model[0].weight]
    kept = sorted(sorted(range(10), key=norms.__getitem__)[3:])
    for got, wanted in (
        (tuned[0].weight, model[0].weight[kept]),  # type: ignore[index]
        (tuned[0].bias, model[0].bias[kept]),  # type: ignore[index]
        (tuned[1].weight, model[1].weight[kept]),  # type: ignore[index]
        (tuned[1].running_var, model[1].running_var[kept]),  # type: ignore[index]
        (tuned[4].weight, model[4].weight[:, kept]),  # type: ignore[index]
        (tuned[8].weight, model[8].weight),  # type: ignore[index]
    ):
        assert torch.equal(got, wanted)


def test_a_flattened_map_loses_all_its_columns() -> None:
    model = small()
    tuned = apply(model, ratio=0.5, layers="4", epochs=0)
    kept = tuned.structure["4:out"].tolist()
    columns = [4 * channel + i for channel in kept for i in range(4)]
    assert tuned.structure["8:in"].tolist() == columns
    assert torch.equal(tuned.model[8].weight, model[8].weight[:, columns])  # type: ignore[index]


@pytest.mark.parametrize(("ratio", "kept"), [(0.2, 409), (0.4, 307)])
def test_layer4_of_resnet18(resnet: nn.Module, images: Tensor, ratio: float, kept: int) -> None:
    tuned = apply(resnet, ratio=ratio, epochs=0)
    layer4 = tuned.model.layer4
    assert tuned.facts["parameters_before"] == 11_181_642
    assert tuned.facts["parameters_after"] == sum(p.numel() for p in tuned.model.parameters())
    for block in layer4:
        assert (block.conv1.out_channels, block.conv2.out_channels, block.conv2.in_channels) == (kept,) * 3
    assert (layer4[0].downsample[0].out_channels, tuned.model.fc.in_features) == (kept, kept)
    assert tuned.facts["filters_before"] == 5 * 512
    assert tuned.facts["filters_after"] == 5 * kept
    assert tuned.facts["widths"]["layer4.0.conv1"] == [512, kept]
    assert tuned.facts["layers"] == "layer4"
    shared = tuned.structure["layer4.0.conv2:out"]
    for name in ("layer4.1.conv2:out", "layer4.0.downsample.0:out", "layer4.1.bn2:out", "layer4.1.conv1:in", "fc:in"):
        assert torch.equal(tuned.structure[name], shared)
    before = resnet.state_dict()
    for name, value in tuned.model.state_dict().items():
        assert name.startswith(("layer4.", "fc.weight")) or torch.equal(value, before[name])


def test_coupled_filters_are_scored_by_the_sum_of_their_norms(resnet: nn.Module) -> None:
    layer4 = resnet.layer4
    writers = (layer4[0].conv2, layer4[0].downsample[0], layer4[1].conv2)
    scores = sum(conv.weight.detach().abs().sum((1, 2, 3)) for conv in writers)
    assert isinstance(scores, Tensor)
    kept = apply(resnet, epochs=0).structure["fc:in"]
    assert torch.equal(kept, scores.argsort()[103:].sort().values)


def test_removal_equals_zeroed_channels(resnet: nn.Module, images: Tensor) -> None:
    tuned = apply(resnet, ratio=0.4, layers="(layer1+layer4)", epochs=0)
    masked = copy.deepcopy(resnet)

    def silence(kept: Tensor) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return output * torch.zeros(output.shape[1]).index_fill(0, kept, 1)[:, None, None]

        return hook

    for name, module in masked.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}:out" in tuned.structure:
            module.register_forward_hook(silence(tuned.structure[f"{name}:out"]))
    with torch.no_grad():
        wanted = masked(images)
        torch.testing.assert_close(tuned.model(images), wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - resnet(images)).abs().max() > 0.01


def test_grouped_convolutions_lose_the_same_positions_in_every_group() -> None:
    torch.manual_seed(0)
    grouped, depthwise = nn.Conv2d(16, 24, 3, groups=4), nn.Conv2d(24, 24, 3, groups=24)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), grouped, nn.ReLU(), depthwise]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)).eval()
    tuned = apply(model, ratio=0.5, layers="(0+2)", epochs=0)
    assert (tuned.model[2].in_channels, tuned.model[2].out_channels, tuned.model[2].groups) == (8, 12, 4)  # type: ignore[index]
    assert (tuned.model[4].groups, tuned.model[7].in_features) == (12, 12)  # type: ignore[index]
    for key, block in (("0:out", 4), ("2:out", 6)):
        positions = tuned.structure[key].view(4, -1) % block
        assert (positions == positions[0]).all()


def test_at_least_one_filter_stays_and_ties_go_in_order() -> None:
    model = small()
    nn.init.ones_(model[0].weight)
    assert apply(model, ratio=0.99, layers="0", epochs=0).structure["0:out"].tolist() == [9]


def test_decimal_ratios_are_exact(images: Tensor) -> None:
    for tenths in range(1, 10):
        assert len(apply(small(), ratio=tenths / 10, layers="0", epochs=0).structure["0:out"]) == 10 - tenths


# --- names and refusals ----------------------------------------------------------------------------


def wrapped(net: nn.Module) -> nn.Module:
    return nets.classifier(net, (0.5,), (0.25,))


@pytest.mark.parametrize("name", ["layer4", "net.layer4", "layer4.1.conv1", "layer4.1"])
def test_layers_are_found_inside_the_wrapper(resnet: nn.Module, name: str) -> None:
    widths = apply(wrapped(resnet), layers=name, epochs=0).facts["widths"]
    assert widths
    assert all(layer.startswith("layer4.") for layer in widths)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer5", "the model has no layer 'layer5'; did you mean 'layer4'?"),
        ("blocks", "the model has no layer 'blocks'; its layers are conv1, bn1, relu, maxpool, layer1"),
        ("fc", "'fc' holds no convolution; these do: conv1, layer1, layer2, layer3, layer4"),
        ("conv2", "'conv2' could be any of layer1.0.conv2, layer1.1.conv2, layer2.0.conv2, ...; write more"),
        ("layer4:ratio=0.3", "is no layer name; write layers=layer4"),
    ],
)
def test_names_that_cannot_be_used(resnet: nn.Module, layers: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        apply(wrapped(resnet), layers=layers)
    assert message in str(error.value)


@pytest.mark.parametrize("written", ["ratio=1", "ratio=-0.1", "ratio=nan", "epochs=-1", "lr=0", "amount=0.2"])
def test_parameters_out_of_bounds(written: str) -> None:
    entry = registry().get("defense", "prune")
    with pytest.raises(UsageError):
        entry.bind(parse_reference(f"prune:{written}"))


def test_several_layers_by_name(resnet: nn.Module) -> None:
    entry = registry().get("defense", "prune")
    [tune] = entry.make(entry.bind(parse_reference("prune:ratio=0.1,layers=(layer3+layer4.0.conv1),epochs=0")))
    tuned = tune.apply(copy.deepcopy(resnet), training())
    assert {n.partition(".")[0] for n in tuned.facts["widths"]} == {"layer3", "layer4"}
    assert [n for n in tuned.facts["widths"] if n.startswith("layer4")] == ["layer4.0.conv1"]


def test_without_layer4_the_last_stage_is_pruned() -> None:
    built = models.by_name.mobilenet_v2().build(INFO)
    with torch.no_grad():
        widths = shrink(lively(built), torch.rand(2, 3, 64, 64), 0.2)[1]["widths"]
    # 64 pixels shrink to 2 x 2 in block 14, whose first convolution still sees 4 x 4.
    assert min(int(name.split(".")[1]) for name in widths) == 14
    assert "features.14.conv.0.0" in widths  # its channels are those of the depthwise convolution that shrinks
    assert widths["features.18.0"] == [1280, 1024]


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(UsageError, match="this architecture has none"):
        apply(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))


def test_class_scores_are_never_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError) as error:
        apply(model, layers="2")
    assert "(2: its channels are shared with the class scores); layers that may be pruned: 0" in str(error.value)
    tuned = apply(model, layers="(0+2)", ratio=0.5, epochs=0)
    assert tuned.facts["widths"] == {"0": [8, 4]}
    assert "2" in tuned.facts["kept_whole"]


class Reversed(nn.Module):
    """Reorders channels in a way that the tracer takes for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().flip(1)
        logits: Tensor = self.fc(self.second(x).relu().mean((2, 3)))
        return logits


def test_channels_that_are_lost_track_of_stay() -> None:
    torch.manual_seed(0)
    model = Reversed().eval()
    with pytest.raises(UsageError, match="first: its channels are reordered on the way"):
        apply(model, layers="first")
    tuned = apply(model, layers="(first+second)", epochs=0)
    assert tuned.facts["kept_whole"] == {"first": "its channels are reordered on the way"}
    assert list(tuned.facts["widths"]) == ["second"]


def test_unused_convolutions_are_named() -> None:
    model = Reversed()
    model.spare = nn.Conv2d(3, 8, 3)
    with pytest.raises(UsageError, match="spare: it is not on the way to the class scores"):
        apply(model, layers="spare")


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    model = models.by_name.shufflenet_v2_x0_5().build(INFO)
    with pytest.raises(UsageError, match="cannot be traced") as error:
        apply(model)
    assert "\n" not in str(error.value)


# --- fine-tuning, storing, stacking ----------------------------------------------------------------


def test_fine_tuning_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Schedule] = []
    fit = Training.fit

    def spy(self: Training, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        plans.append(kwargs["schedule"])
        return fit(self, model, *args, **kwargs)

    monkeypatch.setattr(Training, "fit", spy)
    base = training().schedule
    bare = apply(small(), epochs=0)
    assert not plans
    tuned = apply(small(), epochs=2)
    assert not torch.equal(tuned.model[0].weight, bare.model[0].weight)  # type: ignore[index]
    apply(small(), epochs=1, lr=0.5e-3)
    assert plans == [replace(base, epochs=2, lr=0.1 * base.lr), replace(base, epochs=1, lr=0.5e-3)]


def test_ratio_zero_changes_nothing(resnet: nn.Module) -> None:
    tuned = apply(resnet, ratio=0)
    before = resnet.state_dict()
    assert all(torch.equal(v, before[n]) for n, v in tuned.model.state_dict().items())
    assert not tuned.structure
    assert tuned.facts["parameters_after"] == tuned.facts["parameters_before"]


def test_modes_flags_and_the_original_stay() -> None:
    model = small()
    model[4].weight.requires_grad_(False)
    model[1].train()
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        tuned = apply(model, layers="0", epochs=0).model
    assert [p.requires_grad for p in tuned.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in tuned.modules()] == [m.training for m in model.modules()]
    assert all(torch.equal(v, kept[n]) for n, v in model.state_dict().items())


def test_stored_and_reloaded_with_equal_outputs(resnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    tuned = apply(wrapped(resnet), ratio=0.3, layers="(layer2+layer4)", epochs=0)
    Artifacts(tmp_path).get_or_make("pruned", lambda: Artifact.of(tuned))
    stored = Artifacts(tmp_path).get_or_make("pruned", lambda: pytest.fail("it is not stored"))
    other = wrapped(import_torchvision().models.resnet18(num_classes=10))
    again = rebuild(other, stored.structure)
    again.load_state_dict(stored.tensors)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), tuned.model.eval()(images))
    assert dict(stored.facts) == dict(tuned.facts)
    with pytest.raises(UsageError, match=r"has a layer 'net\..*', this one has none"):
        rebuild(small(), stored.structure)


def test_prune_twice(resnet: nn.Module, images: Tensor) -> None:
    once = apply(resnet, epochs=0)
    twice = apply(once.model, epochs=0)
    assert twice.facts["widths"]["layer4.1.conv2"] == [409, 327]
    fresh = rebuild(rebuild(copy.deepcopy(resnet), once.structure), twice.structure)
    fresh.load_state_dict(twice.model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images), twice.model(images))


def test_agrees_with_the_pruner_of_torch_pruning(resnet: nn.Module, images: Tensor) -> None:
    import torch_pruning as tp

    other = copy.deepcopy(resnet)
    rest = [m for n, m in other.named_children() if n != "layer4"]
    first = tp.importance.GroupMagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    pruner = tp.pruner.BasePruner(
        other, images, first, pruning_ratio=0, pruning_ratio_dict={other.layer4: 0.2}, ignored_layers=rest,
        in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip
    pruner.step()
    mine = apply(resnet, epochs=0).model
    assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    for i in range(2):  # not coupled, so both score by the filter alone
        assert torch.equal(mine.layer4[i].bn1.weight, other.layer4[i].bn1.weight)


def test_the_model_is_not_held(resnet: nn.Module, images: Tensor) -> None:
    graph = Graph(resnet, images)
    assert len(graph.groups) == 12
    assert not any(g.root in set(resnet.modules()) for g in graph.groups)
