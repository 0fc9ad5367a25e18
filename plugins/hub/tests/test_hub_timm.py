"""timm's models and repositories in its format: from a hub of the tests' own, from files put by hand, and offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_tools import COMMIT, HTML, lock_of, safetensors, serving, sha256
from torch import Tensor, nn

from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.testing import check_model
from advplug.vision import import_torchvision
from advplug_hub import models, timm_models
from cli_tools import QUICK, TINY, run

NET = "test_resnet"
"""timm's network for tests: half a million weights."""
GREY = DatasetInfo(("a", "b", "c", "d"), 1, (8, 8), {})
SNAKES = DatasetInfo(("goldfish", "tench", "hen"), 3, (32, 32), {}, trainable=False)
"""Three of ImageNet's classes, not in its order, and nothing to train on."""


def made(**arguments: Any) -> nn.Module:
    import_torchvision()
    import timm

    torch.manual_seed(0)
    net: nn.Module = timm.create_model(NET, **arguments).eval()
    return net


def images(info: DatasetInfo) -> Tensor:
    return torch.rand(3, info.channels, *info.size, generator=torch.Generator().manual_seed(1))


def logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = net(x)
    return answers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cache of the user's: neither advplug's nor the hub's."""
    from huggingface_hub import constants

    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVPLUG_LOCK", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache" / "hub"


def put(folder: Path, **files: bytes) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


def repository(**changes: Any) -> dict[str, bytes]:
    """What timm pushes to the hub: its description and the weights."""
    config = {
        "architecture": NET, "num_classes": 4, "num_features": 160,
        "pretrained_cfg": {"num_classes": 4, "input_size": [1, 8, 8], "mean": [0.5], "std": [0.25],
                           "first_conv": "conv1.0", "classifier": "fc"},
    } | changes  # fmt: skip
    net = made(num_classes=4, in_chans=1)
    return {"config__json": json.dumps(config).encode(), "model__safetensors": safetensors(net.state_dict())}


# --- timm:NAME -------------------------------------------------------------------------------------


def test_names_are_those_that_timm_registers() -> None:
    import_torchvision()
    import timm

    assert set(timm_models.architectures()) == set(timm.list_models())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("timm:resnet81", "timm has no model called 'resnet81'; did you mean 'resnet18'?"),
        ("timm:???", "timm has no model called '???'; write one such as resnet18@a1_in1k"),
        ("timm:resnet18@", "'resnet18@' names no tag; write resnet18@ and one, or leave out the @"),
        ("timm:resnet18@a1_in1k,weights=w.pt", "weights come from a tag or from a file"),
        ("timm:resnet18,key=model", "key= and strip= are for weights from a file"),
        ("timm:resnet18,weights=none.pt", "there is no weights file none.pt"),
        ("hf:resnet18@main", "'resnet18@main' is no repository of the hub; write hf:ORG/REPO@REVISION"),
        ("hf:timm/resnet18.a1_in1k", "does not say which revision; write hf:timm/resnet18.a1_in1k@ and a commit"),
        ("hf:timm/resnet18.a1_in1k@../..", "does not say which revision"),
    ],
)
def test_bad_references_end_in_one_line(reference: str, words: str, tmp_path: Path) -> None:
    ran = run("eval", "-m", reference, "--dataset", TINY, "-a", "fgsm", "-o", tmp_path / "out")
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_a_network_without_weights_is_trained_and_attacked(tmp_path: Path) -> None:
    ran = run("eval", "-m", f"timm:{NET},epochs=1", "--dataset", TINY, "-a", "fgsm", *QUICK, "-o", tmp_path, "--json")
    assert ran.code == 0, ran.err
    (cell,) = ran.json["cells"]
    assert cell["status"] == "ok"
    assert cell["metrics"]["clean_accuracy"]["n"] == 20


def test_conforms() -> None:
    results = check_model("timm", model=NET, on="fake")
    assert [r.name for r in results if not r.ok] == []


def test_a_checkpoint_is_used_as_it_is(tmp_path: Path) -> None:
    net = made(num_classes=4, in_chans=1)
    torch.save({"model": {f"module.{n}": v for n, v in net.state_dict().items()}}, tmp_path / "w.pt")
    source = models.timm(NET, tmp_path / "w.pt", key="model", strip="module.")
    assert source.schedule(GREY) is None
    assert source.misfit(GREY) is None
    x = images(GREY)
    up = nn.functional.interpolate((x - 0.5) / 0.5, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits(source.build(GREY).eval(), x), logits(net, up), rtol=1e-4, atol=1e-5)
    other = DatasetInfo(tuple("abcde"), 1, (8, 8), {})
    assert source.misfit(other) == "w.pt has no layer of 5 outputs, one a class; use a dataset that fits"
    bare = models.timm(NET, tmp_path / "w.pt", key="model")
    with pytest.raises(UsageError, match=r"does not fit the model: .*write strip=module\."):
        bare.build(GREY)


# --- timm:NAME@TAG ---------------------------------------------------------------------------------


def test_published_weights_keep_the_columns_of_known_classes(cache: Path) -> None:
    net = made()
    put(cache / f"timm--{NET}.r160_in1k@main", model__safetensors=safetensors(net.state_dict()))
    source = models.timm(f"{NET}@r160_in1k")
    assert source.schedule(SNAKES) is None
    assert source.misfit(SNAKES) is None
    x = images(SNAKES)
    mean, std = (torch.tensor(net.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))  # type: ignore[index]
    made_here = logits(source.build(SNAKES, offline=True).eval(), x)
    expected = logits(net, (x - mean) / std)[:, [1, 0, 8]]  # ImageNet's numbers of goldfish, tench and hen
    torch.testing.assert_close(made_here, expected, rtol=1e-4, atol=1e-5)
    (address,) = lock_of(cache / "lock.json")["files"]
    assert address.endswith(f"/timm/{NET}.r160_in1k/resolve/main/model.safetensors")


def test_other_classes_get_a_new_head_on_the_published_weights(cache: Path) -> None:
    net = made()
    put(cache / f"timm--{NET}.r160_in1k@main", model__safetensors=safetensors(net.state_dict()))
    source = models.timm(f"{NET}@r160_in1k")
    info = DatasetInfo(("left", "right"), 3, (32, 32), {})
    schedule = source.schedule(info)
    assert schedule is not None
    assert schedule.lr == 3e-4
    state = source.build(info, offline=True).state_dict()
    assert state["net.fc.weight"].shape[0] == 2
    assert torch.equal(state["net.conv1.0.weight"], net.state_dict()["conv1.0.weight"])
    assert "has to be trained and there are no training images" in str(
        source.misfit(DatasetInfo(("left", "right"), 3, (32, 32), {}, trainable=False))
    )


def test_an_unknown_tag_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=rf"no weights of {NET} tagged 'a1'; write {NET}@r160_in1k"):
        models.timm(f"{NET}@a1").build(GREY)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HTML, "is an HTML or XML page, not weights"),
        (safetensors({"a": torch.zeros(9)})[:-3], "is truncated"),
        (safetensors({"a": torch.zeros(9)}), f"does not fit timm:{NET}"),
    ],
)
def test_spoiled_weights_are_told_in_a_line(content: bytes, words: str, cache: Path) -> None:
    put(cache / f"timm--{NET}.r160_in1k@main", model__safetensors=content)
    with pytest.raises(UsageError, match=words) as caught:
        models.timm(f"{NET}@r160_in1k").build(SNAKES, offline=True)
    assert len(str(caught.value)) < 700


# --- hf:ORG/REPO@REVISION --------------------------------------------------------------------------


def test_a_repository_put_by_hand_is_used_without_network(cache: Path, tmp_path: Path) -> None:
    put(cache / f"me--net@{COMMIT}", **repository())
    source = models.hf(f"me/net@{COMMIT}")
    assert source.misfit(GREY) is None
    assert source.schedule(GREY) is None
    x = images(GREY)
    up = nn.functional.interpolate((x - 0.5) / 0.25, (32, 32), mode="bilinear", align_corners=False)
    expected = logits(made(num_classes=4, in_chans=1), up)
    torch.testing.assert_close(logits(source.build(GREY, offline=True).eval(), x), expected, rtol=1e-4, atol=1e-5)
    ran = run("eval", "-m", f"hf:me/net@{COMMIT}", "--dataset", TINY, "-a", "fgsm", "--offline", *QUICK, "--json",
              "-o", tmp_path / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["cells"][0]["status"] == "ok"


def test_conforms_as_a_repository(cache: Path) -> None:
    files = repository(num_classes=10, pretrained_cfg={"num_classes": 10, "input_size": [3, 32, 32]})
    files["model__safetensors"] = safetensors(made(num_classes=10).state_dict())
    put(cache / "me--net@main", **files)
    results = check_model("hf", model="me/net@main", on="fake")
    assert [r.name for r in results if not r.ok] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 7, "pretrained_cfg": {"num_classes": 7, "input_size": [1, 8, 8]}},
         "tells 7 classes apart, the dataset has 4 others"),
        ({"pretrained_cfg": {"num_classes": 4, "input_size": [3, 8, 8]}}, "takes images of 3 channels"),
        ({"architecture": "bert"}, "timm has no model called 'bert'"),
        ({"architecture": None}, "does not describe a classifier of timm"),
        ({"num_classes": "many", "pretrained_cfg": {}}, "does not describe a classifier of timm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_built(
    changes: Mapping[str, Any], words: str, cache: Path, tmp_path: Path
) -> None:
    put(cache / "me--net@main", **repository(**changes))
    ran = run("eval", "-m", "hf:me/net@main", "--dataset", TINY, "-a", "fgsm", "-o", tmp_path / "out")
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_a_pickle_with_code_is_refused_and_not_run(cache: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": torch.zeros(1), "more": Attack()}, tmp_path / "w.bin")
    files = repository()
    put(
        cache / "me--net@main", config__json=files["config__json"], pytorch_model__bin=(tmp_path / "w.bin").read_bytes()
    )
    with pytest.raises(UsageError, match="holds Python objects that only run code can restore"):
        models.hf("me/net@main").build(GREY, offline=True)
    assert not (tmp_path / "ran").exists()


# --- a hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a site the hub that its own client asks."""
    from huggingface_hub import constants

    def choose(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

    return choose


def test_a_hub_is_asked_once_then_not_needed_and_never_trusted_blindly(
    hub: Callable[[str], None], cache: Path, tmp_path: Path
) -> None:
    files, source = repository(), models.hf("me/net@main")
    with serving() as site:
        hub(site.address)
        for name, content in files.items():
            site.files[f"/me/net/resolve/main/{name.replace('__', '.')}"] = content
        first = source.build(GREY).state_dict()
        asked = [a for a in site.asked if a.startswith("GET /me/")]
        assert asked == [f"GET /me/net/resolve/main/{name}" for name in ("config.json", "model.safetensors")]
        address, site.asked[:] = site.address, []
        source.build(GREY)
        assert site.asked == []
    held = lock_of(cache / "lock.json")["files"][f"{address}/me/net/resolve/main/model.safetensors"]
    content = files["model__safetensors"]
    assert (held["bytes"], held["sha256"]) == (len(content), sha256(content))
    again = source.build(GREY, offline=True).state_dict()  # the site is closed by now
    assert all(torch.equal(first[n], again[n]) for n in first)
    (cached,) = {found.resolve() for found in (tmp_path / "hf").rglob("*.safetensors")}
    cached.write_bytes(content[:-1] + b"\1")
    with pytest.raises(UsageError, match=r"is not the file that .*lock\.json recorded"):
        source.build(GREY, offline=True)


def test_the_second_kind_of_weights_file_is_asked_for_where_the_first_is_missing(
    hub: Callable[[str], None], cache: Path, tmp_path: Path
) -> None:
    torch.save(made(num_classes=4, in_chans=1).state_dict(), tmp_path / "w.bin")
    with serving() as site:
        hub(site.address)
        site.files["/me/net/resolve/main/config.json"] = repository()["config__json"]
        site.files["/me/net/resolve/main/pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
        assert models.hf("me/net@main").build(GREY).state_dict()["net.fc.weight"].shape == (4, 96)
        with pytest.raises(UsageError, match=r"config\.json of hf:me/none@main is not at hand.*HTTP Error 404"):
            models.hf("me/none@main").build(GREY)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ((), "it cannot be fetched from the hub (<urlopen error [Errno 111] Connection refused>)"),
        (("--offline",), "being offline forbids the download"),
    ],
)
def test_out_of_reach_and_offline_are_one_line_that_names_the_place(
    more: tuple[str, ...], why: str, hub: Callable[[str], None], cache: Path, tmp_path: Path
) -> None:
    nowhere = "http://127.0.0.1:9"  # the port of discard, which nothing listens on
    hub(nowhere)
    ran = run("eval", "-q", "-m", "hf:me/net@main", "--dataset", TINY, "-a", "fgsm", "-o", tmp_path / "out", *more)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert f"neither in {cache}/me--net@main nor in {tmp_path}/hf" in ran.err
    assert why in ran.err
    place = cache / "me--net@main" / "config.json"
    assert f"curl -L --create-dirs -o {place} {nowhere}/me/net/resolve/main/config.json" in ran.err
