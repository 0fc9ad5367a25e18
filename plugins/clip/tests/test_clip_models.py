"""CLIP models as victims: pixels in, cosines out; open_clip's by name, and what is said where that cannot be."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import urllib.error
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.registry import registry
from advplug.testing import check_model
from advplug.vision import import_torchvision
from advplug_clip import models, names, pretrained, tiny
from advplug_clip.scorer import ClipScorer, Memory, Pixels
from advplug_clip.tokens import bundled

GROUPS = (("a red cat", "the cat"), ("a dog",), ("one small blue bird",))
DIGITS = DatasetInfo(("zero", "one"), 1, (28, 28), {})
CAPTIONED = DatasetInfo((), 3, (32, 32), {}, captions=True)


@pytest.fixture(scope="module")
def small() -> ClipScorer:
    torch.manual_seed(0)
    return tiny.scorer("transformer", GROUPS, 20, 64).eval()


def images(n: int = 5, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def with_memory(scorer: ClipScorer, memory: Memory) -> ClipScorer:
    return ClipScorer(scorer.clip, scorer.tokens, scorer.groups, scorer.pixels, memory).eval()


def gradients(scorer: ClipScorer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pixels and of one of the tower's weights."""
    leaf = x.clone().requires_grad_()
    loss = functional.cross_entropy(scorer(leaf), torch.arange(len(x)) % len(scorer.groups))
    weight = next(scorer.clip.visual.parameters())
    made = torch.autograd.grad(loss, [leaf, weight])
    return made[0], made[1]


# --- the scorer ------------------------------------------------------------------------------------


def test_logits_are_those_of_open_clip(small: ClipScorer) -> None:
    x = images()
    with torch.no_grad():
        image, text, scale = small.clip((x - 0.5) / 0.25, small.tokens(["a dog", "one small blue bird"]))
        expected = scale * image @ text.T
        torch.testing.assert_close(small(x)[:, 1:], expected)
        torch.testing.assert_close(small.with_gallery(["a dog", "one small blue bird"])(x), expected)
    assert small.scale == pytest.approx(1 / 0.07)


def test_it_is_exported_with_its_texts_as_the_system_that_answers(small: ClipScorer) -> None:
    """Classes of several texts, behind a defense, as `advplug pack` exports them."""
    from advplug.defenses.inputs import bit_depth, input_wrap
    from advplug.packs.export import Deployed
    from advplug.victim import Columns, Victim

    columns = Columns(torch.tensor([0, 0, 1]), small.scale, 2)
    texts = small.with_gallery(["a red cat", "the cat", "a dog"])
    victim = Victim(texts, 2, (input_wrap(lambda x: bit_depth(x, 4)),), columns=columns)
    x = images()
    said = victim.decide(x)
    assert said.scores is not None
    with victim.frozen(), torch.no_grad():
        graph = torch.export.export(
            Deployed(victim), (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        ).module()
        label, probabilities, accepted = graph(x)
    assert torch.equal(label, said.label)
    torch.testing.assert_close(probabilities, said.scores.softmax(1))
    assert accepted.all()


def test_it_is_compiled_as_one_graph(small: ClipScorer) -> None:
    x = images()
    with torch.no_grad():
        expected = small(x)
        made = torch.compile(small, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(made, expected)


def test_grey_images_and_other_sizes_are_taken(small: ClipScorer) -> None:
    with torch.no_grad():
        grey = images(channels=1)
        torch.testing.assert_close(small(grey), small(grey.expand(-1, 3, -1, -1)))
        flat = torch.full((1, 3, 50, 41), 0.3)
        torch.testing.assert_close(small(flat), small(flat[..., :32, :32]))
        large = images(side=64)
        scaled = functional.interpolate(large, (32, 32), mode="bicubic", align_corners=False, antialias=True)
        torch.testing.assert_close(small(large), small(scaled))
    pixels, _ = gradients(small, large)
    assert (pixels.flatten(1) != 0).float().mean() > 0.9


def test_texts_are_encoded_once_and_galleries_share_weights_and_texts(
    small: ClipScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.refresh()
    asked: list[int] = []
    encode = small.clip.encode_text
    monkeypatch.setattr(small.clip, "encode_text", lambda rows: asked.append(len(rows)) or encode(rows))
    texts = ["a dog", "a cat", "a dog"]
    features = small.encode_text(texts)
    assert asked == [2]
    assert not features.requires_grad
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(features[0], features[2])
    gallery = small.with_gallery([*texts, "a bird"])
    assert gallery.columns.shape == (4, 128)
    assert asked == [2, 1]
    assert gallery.clip is small.clip
    assert small.columns.shape == (3, 128)
    assert small.with_gallery([]).columns.shape == (0, 128)


def test_only_the_image_tower_has_gradients(small: ClipScorer) -> None:
    assert all(p.requires_grad == n.startswith("clip.visual.") for n, p in small.named_parameters())


def test_columns_follow_the_weights_but_are_no_part_of_them(small: ClipScorer) -> None:
    torch.manual_seed(1)
    other = tiny.scorer("transformer", GROUPS, 20, 64).eval()
    assert not torch.allclose(other.columns, small.columns)
    other.load_state_dict(small.state_dict())
    torch.testing.assert_close(other.columns, small.columns)
    assert not any("columns" in n for n in small.state_dict())
    twin = copy.deepcopy(small)
    with torch.no_grad():
        twin.clip.text_projection.mul_(-1)
    twin.refresh()
    torch.testing.assert_close(twin.columns, -small.columns)


def test_columns_are_computed_in_full_precision_whoever_asks_first(small: ClipScorer) -> None:
    small.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        first = small.columns
    small.refresh()
    assert torch.equal(first, small.columns)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("kind", ["micro-batches", "checkpointing", "both"])
def test_saving_memory_changes_no_gradient(small: ClipScorer, kind: str) -> None:
    x = images(7)
    expected = gradients(small, x)
    scorer = with_memory(copy.deepcopy(small), Memory(0 if kind == "checkpointing" else 3))
    if kind != "micro-batches":
        pretrained._checkpoint(scorer.clip, "clip-tiny-vit")
        assert scorer.clip.visual.transformer.grad_checkpointing
    for made, wanted in zip(gradients(scorer, x), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-7)


def test_micro_batches_keep_the_activations_of_one_at_a_time(small: ClipScorer) -> None:
    def kept(scorer: ClipScorer) -> int:
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
        with hooks:
            scorer(images(16).requires_grad_())
        return sum(sizes)

    assert kept(with_memory(small, Memory(4))) < kept(small) / 10


def test_batch_statistics_are_not_taken_from_micro_batches() -> None:
    torch.manual_seed(0)
    scorer = with_memory(tiny.scorer("convolutional", GROUPS, 20, 64), Memory(2)).train()
    whole = copy.deepcopy(scorer)
    whole.memory = Memory()
    torch.testing.assert_close(scorer(images(6)), whole(images(6)))


def test_bf16_is_for_gradients_only(small: ClipScorer) -> None:
    x = images()
    half = with_memory(small, Memory(bf16=True))
    with torch.no_grad():
        assert torch.equal(half(x), small(x))
    made, wanted = half(x), small(x)
    assert made.dtype == torch.float32
    assert not torch.equal(made, wanted)
    torch.testing.assert_close(made, wanted, rtol=0.1, atol=0.3)
    cosine = functional.cosine_similarity(gradients(half, x)[0].flatten(), gradients(small, x)[0].flatten(), dim=0)
    assert cosine > 0.99


def test_long_texts_lose_their_end_and_that_is_noted(small: ClipScorer) -> None:
    long = "a cat " * 30
    assert small.notes == ()
    gallery = small.with_gallery([long, "a dog"])
    assert gallery.notes == ("1 of 2 texts are longer than the 20 tokens that the model reads and were cut",)
    rows = bundled(20)([long, "a cat"])
    assert rows.shape == (2, 20)
    assert rows[0, -1] == rows[1].max() == 49407
    torch.testing.assert_close(gallery.columns[0], small.encode_text([long + "and a dog"])[0])


# --- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "info", "says"),
    [
        (
            models.clip_tiny(),
            CAPTIONED,
            "names classes in prompts and the dataset has none; write task=retrieval",
        ),
        (
            models.clip_tiny(task="retrieval"),
            DIGITS,
            "task=retrieval of clip-tiny needs captions and the dataset has",
        ),
        (models.open_clip("RN50@random", task="retrieval"), DIGITS, "needs captions"),
        (models.open_clip("RN50@random"), DatasetInfo(("a", "b"), 4, (8, 8), {}), "sees grey and RGB images"),
        (
            models.clip_tiny(task="retrieval"),
            DatasetInfo((), 3, (8, 8), {}, captions=True, trainable=False),
            "there are no training images",
        ),
    ],
)
def test_misfits(source: models.Tiny | models.OpenClip, info: DatasetInfo, says: str) -> None:
    assert says in (source.misfit(info) or "")


def test_fits() -> None:
    assert models.open_clip("RN50@random").misfit(DIGITS) is None
    assert models.open_clip("RN50@random", task="retrieval").misfit(CAPTIONED) is None
    assert models.clip_tiny(task="retrieval").misfit(CAPTIONED) is None
    assert models.clip_tiny().misfit(DIGITS) is None


@pytest.mark.parametrize(("params", "task"), [({}, "classification"), ({"task": "retrieval"}, "retrieval")])
def test_the_task_is_among_the_capabilities(params: dict[str, str], task: str) -> None:
    entry = registry().get("model", "clip-tiny")
    caps = entry.spec.caps_of({"task": "zero-shot"} | params)
    assert (caps.task, caps.modality) == (task, "image-text")


# --- names of open_clip ----------------------------------------------------------------------------


def test_names_are_those_of_the_installed_open_clip() -> None:
    import_torchvision()
    import open_clip

    known = defaultdict(list)
    for architecture, tag in open_clip.list_pretrained():
        known[architecture].append(tag)
    assert set(names.architectures()) == set(open_clip.list_models())
    assert {a: list(names.tags(a)) for a in names.architectures() if names.tags(a)} == dict(known)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B32@openai", "open_clip has no architecture called 'ViT-B32'; did you mean 'ViT-B-32'?"),
        ("ViT-B-32@opnai", "no weights of ViT-B-32 tagged 'opnai'; did you mean 'openai'?"),
        ("RN50x64@mine", "it has openai, or write RN50x64@random or RN50x64@FILE"),
        ("RN50x64", "'RN50x64' does not say which weights; write RN50x64@ and one of openai, random, or a file"),
        ("RN50@missing.safetensors", "there is no weights file missing.safetensors"),
    ],
)
def test_wrong_names(name: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        models.open_clip(name)
    assert says in str(error.value)


def test_options_of_files_are_for_files() -> None:
    with pytest.raises(UsageError, match="key=, strip= and like= are for weights from a file"):
        models.open_clip("RN50@random", key="state_dict")


def test_tags_may_be_written_with_hyphens() -> None:
    assert models.open_clip("ViT-B-32@laion2b-s34b-b79k").tag == "laion2b_s34b_b79k"


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from advplug_clip import models; models.open_clip('ViT-B-32@openai', templates='openai');"
        "models.clip_tiny().identity(); print([m for m in ('torch', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- weights ---------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that is out of reach, and empty caches; the addresses that were asked for."""
    asked: list[str] = []

    def unreachable(address: str) -> None:
        asked.append(address)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(pretrained, "_reachable", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return asked


@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_are_out_of_reach(no_hub: list[str], tmp_path: Path, offline: bool) -> None:
    with pytest.raises(UsageError) as error:
        models.open_clip("ViT-B-32@openai").build(DIGITS, offline=offline)
    place = tmp_path / "torch" / "hub" / "checkpoints" / "open_clip" / "ViT-B-32@openai"
    address = "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors"
    assert f"curl -L --create-dirs -o {place} {address}'" in str(error.value)
    assert "\n" not in str(error.value)
    why = "--offline forbids the download" if offline else "cannot be fetched from the hub (<urlopen error Name or"
    assert why in str(error.value)
    assert no_hub == ([] if offline else [address])


def test_a_file_put_in_its_place_by_hand_is_used(no_hub: list[str], tmp_path: Path) -> None:
    place = tmp_path / "torch" / "hub" / "checkpoints" / "open_clip" / "ViT-B-32@openai"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    settings = pretrained._settings("ViT-B-32", "openai")
    assert pretrained.fetch("ViT-B-32", "openai", settings, offline=True) == place


def test_other_files_are_tried_only_where_the_hub_lacks_the_first(
    no_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(address: str) -> None:
        no_hub.append(address)
        raise urllib.error.HTTPError(address, 404, "Not Found", {}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrained, "_reachable", missing)
    with pytest.raises(UsageError, match="404"):
        pretrained.fetch("ViT-B-32", "openai", pretrained._settings("ViT-B-32", "openai"), offline=False)
    assert [a.rpartition("/")[2] for a in no_hub] == list(pretrained.FILES)


def test_weights_of_a_file_and_what_does_not_fit(small: ClipScorer, tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = tiny.scorer("transformer", GROUPS, 20, 64)
    path = tmp_path / "weights.safetensors"
    save_file({n: v.clone() for n, v in small.clip.state_dict().items()}, path)
    pretrained._fill(other.clip, path, None, "")
    other.refresh()
    torch.testing.assert_close(other.eval()(images()), small(images()))
    torch.save({"state_dict": {f"module.{n}": v for n, v in small.clip.state_dict().items()}}, tmp_path / "epoch.pt")
    pretrained._fill(other.clip, tmp_path / "epoch.pt", "state_dict", "module.")
    with pytest.raises(UsageError, match="write strip=module"):
        pretrained._fill(other.clip, tmp_path / "epoch.pt", "state_dict", "")
    with pytest.raises(UsageError, match=r"tensors have another shape, token_embedding\S* is 63 in the file and 31"):
        pretrained._fill(tiny.scorer("transformer", GROUPS, 20, 32).clip, path, None, "")
    with pytest.raises(UsageError, match=r"\d+ missing \(such as visual\.layers"):
        pretrained._fill(tiny.scorer("convolutional", GROUPS, 20, 64).clip, path, None, "")


@pytest.mark.parametrize(
    ("architecture", "like", "quick", "mean"),
    [
        ("ViT-L-14", "openai", True, 0.481),
        ("ViT-L-14", "laion2b_s32b_b82k", False, 0.5),
        ("ViT-L-14", None, False, 0.481),
        ("ViT-L-14-quickgelu", None, False, 0.481),
    ],
)
def test_a_files_weights_are_used_as_those_that_they_are_like(
    architecture: str, like: str | None, quick: bool, mean: float, small: ClipScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state dict fits GELU as QuickGELU, and says nothing of its pixels."""
    built: list[tuple[str, bool]] = []
    monkeypatch.setattr(pretrained, "_built", lambda name, quick_gelu: built.append((name, quick_gelu)) or small.clip)
    monkeypatch.setattr(pretrained, "_fill", lambda *a: None)
    made = pretrained.scorer(pretrained.Asked(architecture, file=Path("any.pt"), like=like), GROUPS, Memory())
    assert built == [(architecture, quick)], "of its own name an architecture has its own activation"
    assert made.pixels.mean[0] == pytest.approx(mean, abs=1e-3)
    (note,) = made.notes or ("",)
    assert ("are assumed; like=TAG names published weights" in note) is (like is None)
    if like is None:
        assert ("QuickGELU" in note) is architecture.endswith("quickgelu")


def test_a_tag_to_be_like_has_to_exist(small: ClipScorer, tmp_path: Path) -> None:
    save_file({n: v.clone() for n, v in small.clip.state_dict().items()}, tmp_path / "any.safetensors")
    with pytest.raises(UsageError, match="no weights of RN50 tagged 'opnai'; did you mean 'openai'"):
        models.open_clip(f"RN50@{tmp_path / 'any.safetensors'}", like="opnai")
    assert models.open_clip(f"RN50@{tmp_path / 'any.safetensors'}", like="openai").like == "openai"


def test_a_scale_may_be_a_number_or_a_list_of_one(small: ClipScorer, tmp_path: Path) -> None:
    state = {n: v.clone() for n, v in small.clip.state_dict().items()}
    save_file(state | {"logit_scale": torch.tensor([2.0])}, tmp_path / "list.safetensors")
    other = copy.deepcopy(small)
    pretrained._fill(other.clip, tmp_path / "list.safetensors", None, "")
    assert other.clip.logit_scale.tolist() == 2


def test_towers_that_cannot_be_checkpointed() -> None:
    import_torchvision()
    from open_clip.modified_resnet import ModifiedResNet

    class Holder:
        visual = ModifiedResNet((1, 1, 1, 1), 8, 1, image_size=32, width=8)

    with pytest.raises(UsageError, match="RN50's image tower has no blocks to checkpoint; leave checkpointing out"):
        pretrained._checkpoint(Holder, "RN50")


def test_architectures_with_tokenizers_of_the_hub(no_hub: list[str]) -> None:
    with pytest.raises(UsageError, match="roberta-base's tokenizer, which comes from the hub; leave --offline out"):
        pretrained._tokens("roberta-ViT-B-32", offline=True)


def test_building_leaves_logging_as_it_was() -> None:
    handlers = list(logging.getLogger().handlers)
    with pretrained._without_root_handler():
        logging.info("open_clip does so")
    assert logging.getLogger().handlers == handlers


def test_pixels_are_prepared_as_for_the_published_weights() -> None:
    clip = pretrained._settings("ViT-B-32", None)
    assert clip["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert pretrained._settings("ViT-B-16-SigLIP", None)["std"] == (0.5, 0.5, 0.5)
    assert Pixels((224, 224), clip["mean"], clip["std"]).mode == clip["interpolation"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_conformance_of_a_model_of_open_clip() -> None:
    results = check_model("open_clip", model="ViT-S-32-alt@random")
    assert all(r.ok for r in results)
    assert len(results) == 10


# --- large models ----------------------------------------------------------------------------------

STEP = """
import resource, time
import torch
from advplug.contracts import DatasetInfo
from advplug_clip.models import open_clip

torch.manual_seed(0)
model = open_clip({name!r}, **{options}).build(DatasetInfo(("cat", "dog"), 3, (224, 224), {{}})).eval()
x = torch.rand({images}, 3, 224, 224, requires_grad=True)
with torch.no_grad():
    text = model.encode_text(["a photo of a cat"])
built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
clock = time.perf_counter()
features = model.encode_image(x)
loss = torch.nn.functional.cosine_similarity(features, text).sum()
(gradient,) = torch.autograd.grad(loss, x)
spent = time.perf_counter() - clock
assert gradient.isfinite().all() and (gradient.flatten(1) != 0).any(1).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{{built:.0f}} MiB after building, {{peak:.0f}} MiB at most, {{spent:.1f}} s a step")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "images", "options"),
    [
        ("ViT-B-32@random", 8, {}),
        ("ViT-L-14@random", 1, {}),
        ("ViT-L-14@random", 4, {"micro_batch": 1, "checkpointing": True}),
    ],
)
def test_a_gradient_step_of_a_large_model(name: str, images: int, options: dict[str, object]) -> None:
    """A step of caption-aware PGD, in a process of its own, whose peak memory is printed."""
    code = STEP.format(name=name, images=images, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"\n{name}, {images} images, {options or 'no options'}: {done.stdout.strip()}")
    assert float(done.stdout.split(" MiB at most")[0].split()[-1]) < 12 * 1024
