"""Packs: what the manifest says, that a fresh process answers alike, and what is refused, tampered with or missing."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from advplug.artifacts import Artifacts
from advplug.build import Builder, Built
from advplug.builtin.dataset_files import square
from advplug.defenses.filters import median
from advplug.defenses.squeezing import PRESETS, score
from advplug.errors import UsageError
from advplug.packs.manifest import opened
from advplug.packs.run import Answers, as_pixels, unlike
from advplug.parse import parse_reference, parse_stack
from advplug.plans import VictimPlan, bind, bind_stack
from advplug.progress import Silent
from advplug.registry import registry
from cli_tools import CNN, QUICK, TINY, run
from conftest import ROOT, advplug, python


def built(defense: str, dataset: str = TINY) -> Built:
    """The same victim, by the way that evaluations take."""
    known = registry()
    plan = VictimPlan(bind(known, "dataset", parse_reference(dataset)), bind(known, "model", parse_reference(CNN)),
                      bind_stack(known, parse_stack(defense)), 0)  # fmt: skip
    return Builder(Artifacts(), "cpu", True, Silent()).build(plan, None)


def pixels(victim: Built) -> torch.Tensor:
    return torch.cat([b.x for b in victim.split.batches(64, torch.device("cpu"))])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that judged the model behind bit-depth, and what it printed."""
    folder = tmp_path_factory.mktemp("results") / "run"
    ran = run("eval", "-m", CNN, "-d", "bit-depth", "-a", "fgsm", "--dataset", TINY, *QUICK, "-o", folder, "--json")
    assert ran.code == 0, ran.err
    return folder, ran.json


@pytest.fixture(scope="module")
def pack(results: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "pack"
    ran = run("pack", CNN, "bit-depth", "-o", folder, "--dataset", TINY, "--from", results[0])
    assert ran.code == 0, ran.err
    assert [p.name for p in folder.parent.iterdir()] == ["pack"]
    return folder


@pytest.fixture
def copied(pack: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pack, tmp_path / "copy")


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def rewritten(folder: Path, **change: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest(folder) | change))


def rehashed(folder: Path) -> None:
    """The manifest of whoever changed the files knew that it has to be changed, too."""
    names = manifest(folder)["files"]
    files = {n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(), "bytes": (folder / n).stat().st_size}
             for n in names}  # fmt: skip
    rewritten(folder, files=files)


# --- what is in it -----------------------------------------------------------------------------------


def test_the_manifest_says_what_it_is_and_what_was_measured(pack: Path, results: tuple[Path, Any]) -> None:
    told, (_, run_json) = manifest(pack), results
    assert (told["model"], told["defense"], told["dataset"], told["seed"]) == (CNN, "bit-depth", TINY, 0)
    assert told["input"] == {"name": "pixels", "shape": ["batch", 1, 8, 8], "type": "float32", "range": [0, 1],
                             "colours": "grey"}  # fmt: skip
    assert len(told["classes"]) == 4
    assert told["versions"]["torch"] == torch.__version__
    (judged,) = [t for t in run_json["threats"] if t["defense"] == "bit-depth"]
    (threat,) = told["robustness"]["threats"]
    for name in ("norm", "eps", "goal", "attacks", "clean_accuracy", "worst_case_accuracy", "verdict", "unchecked"):
        assert threat[name] == judged[name]
    assert threat["verdict"] == "not trustworthy"  # the data are noise
    assert [f["name"] for f in threat["flags"]] == [f["name"] for f in judged["flags"]]
    (cell,) = [c for c in run_json["cells"] if c["defense"] == "bit-depth"]
    assert told["weights_sha256"] == cell["provenance"]["weights_sha256"]
    assert sorted(told["files"]) == ["model.onnx", "model.pt2", "recorded.safetensors"]
    for name, file in told["files"].items():
        data = (pack / name).read_bytes()
        assert (file["sha256"], file["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))


def test_what_was_recorded_is_what_the_evaluated_system_answers(pack: Path) -> None:
    victim, found = built("bit-depth"), load_file(pack / "recorded.safetensors")
    assert torch.equal(found["pixels"], pixels(victim))
    said = victim.victim.decide(found["pixels"])
    assert said.scores is not None
    assert torch.equal(found["label"], said.label)
    torch.testing.assert_close(found["probabilities"], said.scores.softmax(1), atol=1e-6, rtol=0)
    # The defense is in the graph: 4 bits a pixel make 16 levels, so what rounds to the same is answered alike.
    bare = built("none").victim.decide(found["pixels"])
    assert bare.scores is not None
    assert not torch.allclose(found["probabilities"], bare.scores.softmax(1), atol=1e-4)


def test_a_fresh_process_answers_the_same(pack: Path) -> None:
    done = advplug("pack", "--check", str(pack))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("model.pt2: 20 images are answered as recorded; probabilities differ by ")
    assert lines[1].startswith("model.onnx: 2 images are answered as recorded; probabilities differ by ")


@pytest.mark.slow
def test_the_graph_needs_neither_advplug_nor_a_fixed_number_of_images(pack: Path) -> None:
    code = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "graph = torch.export.load(sys.argv[1] + '/model.pt2').module()\n"
        "kept = load_file(sys.argv[1] + '/recorded.safetensors')\n"
        "for n in (1, 3, 20):\n"
        "    label, probabilities, accepted = graph(kept['pixels'][:n])\n"
        "    assert torch.equal(label, kept['label'][:n]) and accepted.all()\n"
        "assert not [m for m in sys.modules if m.startswith('advplug')]\n"
    )
    done = python("-c", code, str(pack))
    assert done.returncode == 0, done.stderr


def test_the_onnx_file_takes_any_number_of_images_too(pack: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx, of the extra 'onnx', is not installed")
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(pack / "model.onnx")
    kept = load_file(pack / "recorded.safetensors")
    runs = ReferenceEvaluator(onnx.load(pack / "model.onnx"))
    for n in (1, 5):
        label, probabilities, accepted = runs.run(None, {"pixels": kept["pixels"][:n].numpy()})
        assert np.array_equal(label, kept["label"][:n])
        assert accepted.all()
        np.testing.assert_allclose(probabilities, kept["probabilities"][:n], atol=1e-5)


# --- predicting --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    bytes_ = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    for n, one in enumerate(bytes_):
        Image.fromarray(one).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


def test_images_get_a_class_and_its_probability(pack: Path, images: list[Path]) -> None:
    x = torch.stack([torch.from_numpy(np.asarray(Image.open(p), dtype=np.float32))[None] / 255 for p in images])
    said = built("bit-depth").victim.decide(x)
    assert said.scores is not None
    chances = said.scores.softmax(1).amax(1).tolist()
    made = run("predict", pack, *images, "--json").json["predictions"]
    assert [p["image"] for p in made] == list(map(str, images))
    assert [p["label"] for p in made] == said.label.tolist()
    assert [p["name"] for p in made] == [f"class {n}" for n in said.label.tolist()]
    assert [p["probability"] for p in made] == pytest.approx(chances, abs=1e-6)
    assert {p["accepted"] for p in made} == {True}
    table = run("predict", pack, *images).out
    for path, chance in zip(images, chances, strict=True):
        (line,) = [text for text in table.splitlines() if path.name in text]
        assert f"{100 * chance:.1f}" in line
        assert "answered" in line


def test_images_of_other_sizes_and_colours_are_brought_to_the_packs(pack: Path, tmp_path: Path) -> None:
    # Of one colour, an image is the same at any size; its grey is 0.299 R + 0.587 G + 0.114 B.
    Image.new("RGB", (37, 20), (100, 200, 50)).save(tmp_path / "wide.png")
    grey = round(0.299 * 100 + 0.587 * 200 + 0.114 * 50)
    told = opened(pack)
    np.testing.assert_array_equal(as_pixels(tmp_path / "wide.png", told), np.full((1, 8, 8), np.float32(grey / 255)))
    Image.new("RGB", (5, 9), (255, 0, 0)).save(tmp_path / "tall.png")
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))).convert("RGB")
    ramp.save(tmp_path / "ramp.png")
    judged = as_pixels(tmp_path / "ramp.png", replace(told, resize=12))
    np.testing.assert_array_equal(judged[0], square(ramp, 8, 12)[0] / np.float32(255))
    assert np.ptp(judged) < 0.75 * np.ptp(as_pixels(tmp_path / "ramp.png", told)), "its middle alone is looked at"
    red = as_pixels(tmp_path / "tall.png", replace(told, channels=3, size=(4, 6)))
    assert red.shape == (3, 4, 6)
    assert [plane.mean() for plane in red] == [1, 0, 0]
    with pytest.raises(UsageError, match="takes 4 channels, which image files have not"):
        as_pixels(tmp_path / "wide.png", replace(told, channels=4))


def test_a_file_that_is_no_image_ends_in_one_line(pack: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for path, told in (
        (tmp_path / "text.png", "); give an image such as a PNG or JPEG file\n"),
        (tmp_path / "gone.png", "there is no image"),
        (tmp_path, "is a folder; name the images in it"),
    ):
        ran = run("predict", pack, images[0], path)
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
        assert told in ran.err
        assert path.name in ran.err


# --- tampered, cut off, missing ----------------------------------------------------------------------


def refused(folder: Path, *more: str) -> str:
    """The one line with which both commands refuse a pack."""
    lines = set()
    for command in (("pack", "--check", folder), ("predict", folder, folder / "x.png")):
        ran = run(*command, *more)
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1), ran.err
        lines.add(ran.err)
    (line,) = lines
    return line


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "recorded.safetensors"])
def test_files_that_are_not_as_they_were(copied: Path, name: str) -> None:
    Image.new("L", (8, 8)).save(copied / "x.png")
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert f"{name} was changed: its sha256 is not the manifest's" in refused(copied)
    (copied / name).write_bytes(data[:-10])
    assert f"{name} is cut off: {len(data) - 10:,} bytes, the manifest says {len(data):,}" in refused(copied)
    (copied / name).unlink()
    assert f"{name} is missing" in refused(copied)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read (Expecting property name"),
        ("[]", "is no manifest"),
        ('{"schema": 7}', "has schema 7, this advplug reads 1"),
        ('{"schema": 1}', "validation errors for Manifest"),
    ],
)
def test_manifests_that_are_none(copied: Path, text: str, told: str) -> None:
    (copied / "manifest.json").write_text(text)
    assert told in refused(copied)


def test_a_manifest_names_its_own_files_and_no_others(copied: Path) -> None:
    files = manifest(copied)["files"]
    rewritten(copied, files={**files, "../secret": files["model.pt2"]})
    assert "names the file '../secret', which is no part of a pack" in refused(copied)
    rewritten(copied, files={"recorded.safetensors": files["recorded.safetensors"]})
    assert "names no model.pt2" in refused(copied)
    (copied / "manifest.json").unlink()
    assert "is no pack: it has no manifest.json" in refused(copied)
    gone = copied.with_name("gone")
    assert f"there is no pack {gone}; advplug pack MODEL DEFENSE -o {gone} makes one" in refused(gone)


def test_the_manifests_own_hash_can_be_asked_for(copied: Path) -> None:
    Image.new("L", (8, 8)).save(copied / "x.png")
    known = hashlib.sha256((copied / "manifest.json").read_bytes()).hexdigest()
    assert run("predict", copied, copied / "x.png", "--sha256", known).code == 0
    rewritten(copied, robustness=None)
    assert "is not the manifest that was asked for" in refused(copied, "--sha256", known)


def test_answers_that_are_not_those_recorded_fail_the_check(copied: Path) -> None:
    kept = load_file(copied / "recorded.safetensors")
    kept["probabilities"][0] = torch.tensor([0.97, 0.01, 0.01, 0.01])
    kept["label"][0] = 0
    save_file(kept, copied / "recorded.safetensors")
    rehashed(copied)
    ran = run("pack", "--check", copied)
    assert ran.code == 1
    assert "model.pt2 answers otherwise than was recorded: " in ran.err


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_archive_is_not_run(copied: Path, tmp_path: Path) -> None:
    """What torch.export.load would do: where its safe reader fails, it takes the one that runs code."""
    Image.new("L", (8, 8)).save(copied / "x.png")
    mark = tmp_path / "it-ran"
    torch.save({"x": _Touch(mark)}, tmp_path / "evil.pt")
    clean = (copied / "model.pt2").read_bytes()
    for member, payload in (
        ("data/sample_inputs/model.pt", (tmp_path / "evil.pt").read_bytes()),
        ("data/constants/opaque_obj_0", pickle.dumps(_Touch(mark))),
    ):
        (copied / "model.pt2").write_bytes(clean)
        with zipfile.ZipFile(copied / "model.pt2") as archive:
            top = archive.namelist()[0].partition("/")[0]
            members = {n: archive.read(n) for n in archive.namelist()}
        assert member.startswith("data/constants") or f"{top}/{member}" in members
        members[f"{top}/{member}"] = payload
        with zipfile.ZipFile(copied / "model.pt2", "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        rehashed(copied)
        line = refused(copied)
        assert "cannot be loaded with torch" in line or "holds compiled code or a pickle" in line
        assert not mark.exists()


# --- what can be packed ------------------------------------------------------------------------------


def test_a_detector_says_what_it_accepts(tmp_path: Path) -> None:
    victim = built("feature-squeezing:threshold=1")
    x = pixels(victim)
    with torch.no_grad():
        scores = score(victim.victim.module, x, PRESETS["mnist"])
    middle = float(scores.median())
    defense = f"feature-squeezing:threshold={middle:.6f}"
    ran = run("pack", CNN, defense, "-o", tmp_path / "pack", "--dataset", TINY, "--no-onnx")
    assert ran.code == 0, ran.err
    assert manifest(tmp_path / "pack")["rejects"] is True
    accepted = load_file(tmp_path / "pack" / "recorded.safetensors")["accepted"]
    clear = (scores - middle).abs() > 1e-4
    assert torch.equal(accepted[clear], (scores <= middle)[clear])
    assert len(accepted.unique()) == 2
    assert run("pack", "--check", tmp_path / "pack").code == 0


@pytest.mark.parametrize(
    ("defense", "told"),
    [
        ("jpeg", "jpeg cannot be packed: it leaves PyTorch's graph ("),
        ("bit-depth+jpeg", "jpeg cannot be packed: it leaves PyTorch's graph ("),
        ("noise-vote", "noise-vote cannot be packed: each answer draws new random numbers"),
        ("smoothing:train=no", "smoothing:train=no cannot be packed: each answer draws new random numbers"),
        ("dropout", "dropout cannot be packed: each answer draws new random numbers"),
        ("score-noise", "score-noise cannot be packed: each answer draws new random numbers"),
        ("jpg", "no defense is called 'jpg'; did you mean 'jpeg'?"),
    ],
)
def test_what_no_graph_can_hold_is_refused_with_the_reason(defense: str, told: str, tmp_path: Path) -> None:
    ran = run("pack", CNN, defense, "-o", tmp_path / "pack", "--dataset", TINY)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran.err
    assert told in ran.err
    assert list(tmp_path.iterdir()) == []


def test_other_filters_are_in_the_graph_and_onnx_is_left_out_where_it_cannot_say_them(tmp_path: Path) -> None:
    ran = run("pack", CNN, "denoise:method=median+score-round", "-o", tmp_path / "pack", "--dataset", TINY)
    assert ran.code == 0, ran.err
    told = manifest(tmp_path / "pack")
    assert "model.onnx" not in told["files"]
    assert not (tmp_path / "pack" / "model.onnx").exists()
    assert told["onnx"]
    assert f"note: no ONNX file: {told['onnx']}" in ran.err
    assert told["robustness"] is None
    assert "note: the manifest holds no measured robustness; --from RUN takes it from a run" in ran.err
    # The filter, the model, and probabilities of one decimal, brought to a sum of 1 again.
    kept, victim = load_file(tmp_path / "pack" / "recorded.safetensors"), built("none").victim
    rounded = (10 * victim.logits(median(kept["pixels"], 3)).double().softmax(1)).round()
    torch.testing.assert_close(
        kept["probabilities"].double(), rounded / rounded.sum(1, keepdim=True), atol=1e-4, rtol=0
    )
    assert run("pack", "--check", tmp_path / "pack").out.count("\n") == 1


def test_a_run_that_judged_another_victim_vouches_for_nothing(results: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = results
    ran = run("pack", CNN, "none", "-o", tmp_path / "pack", "--dataset", TINY, "--from", folder, "--seed", "1")
    assert ran.code == 2
    assert f"holds no finished threat of {CNN} (none)" in ran.err
    assert f"it holds {CNN} (none) on {TINY}, seed 0; {CNN} (bit-depth) on {TINY}, seed 0" in ran.err
    other = shutil.copytree(folder, tmp_path / "other")
    import sqlite3

    with sqlite3.connect(other / "results.sqlite") as db:
        for key, cell in db.execute("SELECT key, cell FROM cell").fetchall():
            made = json.loads(cell)
            made["provenance"]["weights_sha256"] = "0" * 64
            db.execute("UPDATE cell SET cell = ? WHERE key = ?", (json.dumps(made), key))
    ran = run("pack", CNN, "bit-depth", "-o", tmp_path / "pack", "--dataset", TINY, "--from", other)
    assert ran.code == 2
    assert "judged other weights than these" in ran.err
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((CNN,), "give MODEL, DEFENSE (or none) and -o DIR, or --check PACK"),
        ((CNN, "none", "--check", "x"), "--check takes a pack and nothing to pack"),
        ((CNN, "none", "-o", "{tmp}", "--sha256", "0"), "--sha256 goes with --check"),
        ((CNN, "none", "-o", "{tmp}/full"), "is there already; name a new folder with -o"),
    ],
)
def test_what_does_not_go_together(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    ran = run("pack", *(a.format(tmp=tmp_path) for a in arguments))
    assert ran.code == 2
    assert told in ran.err


def test_the_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.png", "two.png"):
        Image.new("L", (8, 8), 90).save(name)
    page = (ROOT / "docs" / "deploy.md").read_text()
    lines = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("advplug ")]
    assert [line[0] for line in lines] == ["eval", "pack", "pack", "predict"]
    for line in lines:
        small = ["--dataset", TINY] if line[0] in ("eval", "pack") and "--check" not in line else []
        ran = run(*line, *small, *(["--no-onnx"] if "--from" in line else []))
        assert ran.code == 0, ran.err
    assert ran.out.count("answered") == 2
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    told: dict[str, Any] = {}
    assert "(5, 1, 32, 32)" in code, "the size of the usual digits"
    exec(code.replace("32, 32", "8, 8"), told)
    assert told["probabilities"].shape == (5, 4)


# --- comparing answers -------------------------------------------------------------------------------


def test_answers_are_alike_up_to_rounding() -> None:
    first = Answers(torch.tensor([0, 1]), torch.tensor([[0.7, 0.3], [0.49999, 0.50001]]), torch.tensor([True, True]))
    assert unlike(first, first) is None
    # The second image is a tie: either label will do.
    assert unlike(replace(first, label=torch.tensor([0, 0])), first) is None
    assert unlike(replace(first, label=torch.tensor([1, 1])), first) == "1 of 2 images get another label"
    turned = replace(first, accepted=torch.tensor([True, False]))
    assert unlike(turned, first) == "1 of 2 images are accepted by one and rejected by the other"
    off = replace(first, probabilities=first.probabilities + torch.tensor([[0.01, -0.01], [0.0, 0.0]]))
    assert unlike(off, first) == "a probability differs by 0.01"
    nothing = replace(first, label=torch.tensor([-1, 1]), probabilities=first.probabilities.clone())
    nothing.probabilities[0] = torch.nan
    assert unlike(nothing, nothing) is None
    assert unlike(nothing, first) == "1 of 2 images get another label"
