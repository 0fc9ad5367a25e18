"""Whatever goes wrong ends in one line that says what to do, with the right exit code, and loses nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from advplug.builtin import nets
from advplug.builtin.architectures import architecture
from advplug.store import Store
from cli_tools import CNN, QUICK, TINY, Ran, evaluate, nursery, run, stored, wait_for
from usernets import Linear

LINEAR = "py:usernets:{}#weights=linear.safetensors"


class Evil:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    cnn = nets.bare(architecture("cnn"), 1, (8, 8), 4).state_dict()
    save_file(cnn, folder / "gray4.safetensors")
    torch.save(cnn, folder / "gray4.pt")
    save_file(nets.bare(architecture("cnn"), 3, (8, 8), 4).state_dict(), folder / "rgb4.safetensors")
    save_file(Linear().state_dict(), folder / "linear.safetensors")
    for name in ("gray4.safetensors", "gray4.pt"):
        (folder / f"short-{name}").write_bytes((folder / name).read_bytes()[:-2000])
    for name in ("page.safetensors", "page.pt"):
        (folder / name).write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Linear().weight, "more": Evil()}, folder / "evil-zip.pt")
    (folder / "empty.pt").touch()
    (folder / "a-file").touch()
    (folder / "images").mkdir()
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder with the same checkpoints."""
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def says(ran: Ran, code: int, text: str) -> None:
    """One line on standard error, nothing on standard output, no traceback, that exit code."""
    lines = ran.err.splitlines()
    assert ran.code == code, ran.err
    assert len(lines) == 1, ran.err
    assert text in lines[0]
    assert lines[0].startswith(("Error: ", "interrupted"))
    assert ran.out == ""


E = ("eval", "-m", CNN, "-a", "fgsm", "--dataset", TINY, *QUICK)
"""A command that works; what is given after it spoils it."""


def ev(model: str = CNN, attack: str = "fgsm", *rest: str, dataset: str = TINY) -> tuple[str, ...]:
    return ("eval", "-m", model, "-a", attack, "--dataset", dataset, *QUICK, *rest)


def py(name: str) -> str:
    return LINEAR.format(name)


USAGE = [
    # the command line itself
    (("evl",), "No such command 'evl'. Did you mean 'eval'?"),
    (("eval",), "Missing option '-m'"),
    ((*E, "--modell", "cnn"), "No such option '--modell'. Did you mean '--model'? See 'advplug eval --help'."),
    ((*E, "-n", "many"), "'many' is not a valid integer"),
    ((*E, "--audit", "some"), "'some' is not one of 'none', 'quick', 'full'"),
    ((*E, "stray"), "unexpected extra argument (stray)"),
    (("info", "attack"), "Missing argument 'NAME'"),
    # names
    (ev("resnet81"), "no model is called 'resnet81'; did you mean 'resnet18'?"),
    (ev(CNN, "ifgms"), "no attack is called 'ifgms'; did you mean 'ifgsm'?"),
    (ev(CNN, "fgsm", "-d", "purne"), "no defense is called 'purne'; did you mean 'prune'?"),
    (ev(CNN, "fgsm", "-d", "prune+purne"), "no defense is called 'purne'; did you mean 'prune'?"),
    (ev(dataset="digit"), "no dataset is called 'digit'; did you mean 'digits'?"),
    (ev("gray4.safetensors"), "weights in a file are file:gray4.safetensors#arch=NAME, or py:MODULE:FACTORY,weights="),
    (ev("usernets.py"), "a network in your own code is py:usernets:FACTORY"),
    (ev(dataset="four.npz"), "no dataset is called 'four.npz'; arrays in a file are npz:four.npz"),
    (ev(dataset="images"), "no dataset is called 'images'; a folder of images is folder:images"),
    (ev("file:gray4.safetensors#arch=Zzzz"), "one in your own code is py:MODULE:FACTORY,weights=FILE"),
    (ev(CNN, "zzzz"), "no attack is called 'zzzz'; 'advplug list attacks' shows"),
    (("list", "atacks"), "'atacks' is no kind of plugin; did you mean 'attacks'?"),
    (("info", "atack", "pgd"), "'atack' is no kind of plugin; did you mean 'attacks'?"),
    (("info", "attack", "pdg"), "no attack is called 'pdg'; did you mean 'pgd'?"),
    (("info", "metric", "zzzz"), "no metric is called 'zzzz'; 'advplug list metrics' shows"),
    (("plugin", "check", "zzzz"), "zzzz"),
    (ev("torchvision:resnet81@DEFAULT"), "did you mean"),
    (ev("file:gray4.safetensors#arch=resnet81"), "no architecture is called 'resnet81'; did you mean 'resnet18'?"),
    # parameters
    (ev(CNN, "pgd:stps=3"), "attack 'pgd' has no parameter 'stps'; did you mean 'steps'?"),
    (ev(CNN, "fgsm:zzzz=3"), "attack 'fgsm' has no parameter 'zzzz'; it takes"),
    (ev(CNN, "pgd:steps=three"), "attack 'pgd': steps takes a whole number, got 'three'"),
    (ev(CNN, "pgd:steps=2.5"), "attack 'pgd': steps takes a whole number, got '2.5'"),
    (ev(CNN, "pgd:steps=0"), "attack 'pgd': steps must be >= 1, got 0"),
    (ev(CNN, "pgd:steps=3,steps=4"), "parameter 'steps' is given twice"),
    (ev(CNN, "pgd:steps="), "a value is missing after steps="),
    (ev(CNN, "pgd:40"), "attack 'pgd' takes no bare value, got '40'"),
    (ev(CNN, "pgd:loss=cee"), "loss cannot be 'cee'"),
    (ev(CNN, "pgd:target=nxt"), "a class number or the name of one, got 'nxt'; did you mean"),
    (ev(CNN, "pgd:target=4"), "target 4 is no class; the dataset has classes 0 to 3"),
    (ev(CNN, "pgd:norm=l3"), "no norm is called 'l3'"),
    (ev(CNN, "pgd(steps=3"), "after 'pgd' comes ':'"),
    (ev(CNN, "pgd:steps=(3"), "has an unclosed parenthesis"),
    (ev(CNN, "fgsm", "-d", "prune:ratio=1.5"), "defense 'prune': ratio must be <"),
    (ev("cnn:epochs=0"), "model 'cnn': epochs must be >= 1, got 0"),
    (ev(dataset="fake:n=0"), "dataset 'fake': n must be >= 1, got 0"),
    (ev(dataset="folder"), "dataset 'folder' needs its parameter 'path': write folder:PATH"),
    (ev(dataset="folder:nowhere"), "nowhere"),
    (ev(dataset="npz:nowhere.npz"), "nowhere.npz"),
    # budgets
    (ev(CNN, "fgsm", "-e", "8/0"), "eps '8/0' divides by zero; write it like 8/255"),
    (ev(CNN, "fgsm:eps=8/0"), "eps '8/0' divides by zero; write it like 8/255"),
    (ev(CNN, "fgsm", "-e", "-0.1"), "eps '-0.1' is negative"),
    (ev(CNN, "fgsm", "-e", "nan"), "eps 'nan' is not a number"),
    (ev(CNN, "fgsm", "-e", "inf"), "eps 'inf' is not a number"),
    (ev(CNN, "fgsm", "-e", "1e999999999"), "is not a number"),
    (ev(CNN, "fgsm", "-e", "8/255/2"), "is not a number"),
    (ev(CNN, "fgsm", "-e", ""), "is not a number"),
    (ev(CNN, "fgsm", "-e", "linf:2"), "an L-inf budget above 1 has no meaning; did you mean 2/255?"),
    (ev(CNN, "fgsm", "-e", "8"), "an L-inf budget above 1 has no meaning; did you mean 8/255?"),
    (ev(CNN, "fgsm", "-e", "l7:1"), "no norm is called 'l7'"),
    (ev(CNN, "pgd:norm=l2", "-e", "linf:0.1"), "no budget of the -e axis is in l2"),
    # numbers
    ((*E, "-n", "0"), "-n must be at least 1 image, got 0"),
    ((*E, "-n", "-5"), "-n must be at least 1 image, got -5"),
    ((*E, "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
    ((*E, "--seed", "-1"), "--seed must be a whole number of at least 0, got -1"),
    ((*E, "--seed", "9" * 30), "--seed must be a whole number"),
    # devices
    ((*E, "--device", "gpu"), "device 'gpu' is not available here"),
    ((*E, "--device", "cuda:77"), "device 'cuda:77' is not available here"),
    ((*E, "--device", "cpu:x"), "device 'cpu:x' is not available here"),
    ((*E, "--device", ""), "device '' is not available here"),
    # checkpoints
    (ev("file:gone.safetensors#arch=cnn"), "there is no weights file gone.safetensors"),
    (ev("file:gray5.pt#arch=cnn"), "there is no weights file gray5.pt; did you mean 'gray4.pt'?"),
    (ev("file:nowhere/gray4.pt#arch=cnn"), "there is no folder nowhere"),
    (ev("file:.#arch=cnn"), "is a folder; name the weights file in it"),
    (ev("file:empty.pt#arch=cnn"), "empty.pt is empty; fetch it again"),
    (ev("file:short-gray4.safetensors#arch=cnn"), "is truncated"),
    (ev("file:short-gray4.pt#arch=cnn"), "is truncated or damaged"),
    (ev("file:page.safetensors#arch=cnn"), "is an HTML or XML page, not weights"),
    (ev("file:page.pt#arch=cnn"), "is an HTML or XML page, not weights"),
    (ev("file:evil.pt#arch=cnn"), "holds Python objects that only run code can restore"),
    (ev("file:evil-zip.pt#arch=cnn"), "holds Python objects that only run code can restore"),
    (ev("file:linear.safetensors#arch=cnn"), "linear.safetensors"),
    (ev("py:usernets:Linear#weights=gone.pt"), "there is no weights file gone.pt"),
    (ev("py:usernets:Linear#weights=short-gray4.safetensors"), "is truncated"),
    (ev("py:usernets:Linear#weights=page.pt"), "is an HTML or XML page, not weights"),
    (ev("py:usernets:Linear#weights=evil.pt"), "holds Python objects that only run code can restore"),
    (ev("py:usernets:Linear#weights=evil-zip.pt"), "holds Python objects that only run code can restore"),
    (ev("py:usernets:Linear#weights=gray4.safetensors"), "does not fit the model: 1 missing (such as weight)"),
    # models that do not fit the data
    (ev("file:gray4.safetensors#arch=cnn", dataset="fake:n=4,size=8,channels=1,classes=7"),
     "gray4.safetensors tells 4 classes apart, the dataset has 7; use a dataset that fits"),
    (ev("file:rgb4.safetensors#arch=cnn"), "rgb4.safetensors takes RGB images, the dataset's are grayscale"),
    (ev("file:gray4.safetensors#arch=cnn", dataset="fake:n=4,size=8,channels=3,classes=4"),
     "gray4.safetensors takes grayscale images, the dataset's are RGB"),
    (ev("file:gray4.safetensors#arch=cnn,mean=0.1:0.2:0.3"), "mean has 3 numbers for 1 channel"),
    (ev(py("Linear"), dataset="fake:n=4,size=8,channels=1,classes=7"), "does not fit the model"),
    (ev(py("Linear"), "fgsm", "-d", "prune", "--no-baseline"), "prune removes filters of convolutions"),
    # the user's own code
    (ev("py:usernet:Linear"), "no module 'usernet'"),
    (ev("py:usernets:Liner"), "py:usernets:Liner cannot be built"),
    (ev("py:usernets"), "'usernets' is no MODULE:FACTORY"),
    (ev("py:usernets:raises"), "py:usernets:raises cannot be built: RuntimeError: no weights to be had"),
    (ev("py:usernets:nothing"), "py:usernets:nothing must return an nn.Module, got a NoneType"),
    (ev(py("Narrow")), "gives outputs of shape (2, 3) for 2 images, the dataset's 4 classes need (2, 4)"),
    (ev(py("Several")), "must map images to one tensor of logits, got a tuple"),
    # nothing that was asked for can be computed
    (ev(CNN, "ifgsm", "-e", "l1:1"), "has no l1 version; it works in"),
    # the output folder
    ((*E, "-o", "a-file"), "cannot write to a-file: it is a file, not a folder; choose another folder with -o"),
    ((*E, "-o", "a-file/below"), "it is a file, not a folder"),
    ((*E, "-o", "/proc/here"), "cannot write to /proc/here"),
    (("plugin", "new", "no name"), "no name"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), USAGE, ids=[t[:60] for _, t in USAGE])
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, arguments: tuple[str, ...], text: str) -> None:
    says(run(*arguments), 2, text)
    assert not (folder / "it-ran").exists()


FAILING = [
    (py("Raising"), "raised ZeroDivisionError: the user's code is wrong"),
    ("py:usernets:RaisingInTraining#epochs=1", "raised ZeroDivisionError: not meant to be trained"),
    ("py:usernets:Nan#epochs=1", "the loss became nan in epoch 1 of 1"),
]


@pytest.mark.parametrize(("model", "text"), FAILING, ids=lambda v: v[:40])
def test_a_failing_cell_is_exit_code_3_and_the_others_are_kept(folder: Path, model: str, text: str) -> None:
    ran = run(*ev(model, "fgsm", "-m", CNN, "-o", "out", "--json", "-q"))
    assert ran.code == 3
    assert ran.err.startswith("Error: 1 of 2 cells failed: ")
    assert ran.err.count("\n") == 1
    assert text in ran.err
    failed, ok = ran.json["cells"]
    assert failed["status"] == "failed"
    assert text in failed["reason"]
    assert failed["metrics"] == {}
    assert failed["passes"] is None
    assert ok["status"] == "ok"
    assert [row[0] for row in stored("out").values()] == ["failed", "ok"]


def test_a_model_that_fails_is_built_once_for_all_attacks(folder: Path) -> None:
    """Training it again for each of them would fail each time."""
    ran = run(*ev("py:usernets:Nan#epochs=1", "fgsm", "-a", "pgd", "-a", "noise", "-q", "-o", "out"))
    assert ran.code == 3
    assert ran.err.startswith("Error: 3 of 3 cells failed: ")


@pytest.mark.parametrize("name", ["Nan", "NanOffTheGrid"])
def test_a_model_that_answers_nan_gets_no_silent_score(folder: Path, name: str) -> None:
    result = evaluate("-m", py(name), "-a", "pgd")
    (cell,), (threat,) = result["cells"], result["threats"]
    flags = {f["name"] for f in (*cell["flags"], *threat["flags"])}
    assert threat["verdict"] == "not trustworthy", (cell, threat)
    assert flags & {"zero-or-nonfinite-gradients", "near-chance"}, flags


# --- the output folder -----------------------------------------------------------------------------


def test_a_folder_in_use_by_another_run_is_left_alone(folder: Path) -> None:
    evaluate("-m", CNN, "-a", "fgsm", *QUICK)
    before = stored("out")
    with Store(Path("out")):
        says(run(*E, "-a", "pgd", "-o", "out"), 2, "out is in use by another run")
        says(run(*E, "-o", "out", "--fresh"), 2, "out is in use by another run")
        assert run(*E, "-o", "out", "--dry-run").code == 0
    assert stored("out") == before


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_no_permission_to_write(folder: Path) -> None:
    evaluate("-m", CNN, "-a", "fgsm", *QUICK)
    before = stored("out")
    mode = Path("out").stat().st_mode
    folder.chmod(0o555)
    Path("out").chmod(0o555)
    try:
        with unprivileged():
            says(run(*E, "-o", "out"), 2, "cannot write to out: no permission to write there; choose another folder")
            says(run(*E, "-o", "new"), 2, "cannot write to new: no permission to write there; choose another folder")
            says(run("plugin", "new", "mine", "-o", "new"), 2, "new")
    finally:
        folder.chmod(0o755)
        Path("out").chmod(mode)
    assert stored("out") == before


def test_a_weight_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", "a-file")
    says(run(*E, "-o", "out"), 2, "the weight cache a-file/artifacts cannot be used")


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_results_file_that_is_none(folder: Path, content: bytes) -> None:
    Path("out").mkdir()
    Path("out/results.sqlite").write_bytes(content)
    says(run(*E, "-o", "out"), 2, "it is no results file or is damaged; move it away, or start anew with --fresh")
    says(run(*E, "-o", "out", "--dry-run"), 2, "it is no results file or is damaged")
    assert Path("out/results.sqlite").read_bytes() == content
    assert run(*E, "-o", "out", "--fresh").code == 0


def test_a_results_file_with_damaged_pages(folder: Path) -> None:
    evaluate("-m", CNN, "-a", "fgsm", "-e", "1/255", "-e", "2/255", "-e", "3/255", *QUICK)
    path = Path("out/results.sqlite")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    ran = run(*E, "-e", "1/255", "-e", "2/255", "-e", "3/255", "-o", "out")
    says(ran, 2, "it is no results file or is damaged; move it away, or start anew with --fresh")


def test_an_empty_results_file_is_a_new_one(folder: Path) -> None:
    """A run that is killed early leaves one."""
    Path("out").mkdir()
    Path("out/results.sqlite").touch()
    assert run(*E, "-o", "out", "--dry-run").code == 0
    assert run(*E, "-o", "out").code == 0


def test_a_dry_run_reads_what_a_killed_run_left(folder: Path) -> None:
    """A transaction that was cut short leaves its journal, which the next reader has to roll back."""
    evaluate("-m", CNN, "-a", "fgsm", *QUICK)
    script = (
        "import os, sqlite3; db = sqlite3.connect('out/results.sqlite', isolation_level=None); "
        "db.execute('PRAGMA cache_size=1'); db.execute('BEGIN IMMEDIATE'); "
        "db.execute(\"UPDATE cell SET cell = zeroblob(200000), status = 'spoiled'\"); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert Path("out/results.sqlite-journal").stat().st_size > 0
    ran = run(*E, "-o", "out", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert [c["state"] for c in ran.json["cells"]] == ["done"]
    assert [row[0] for row in stored("out").values()] == ["ok"]


def test_any_folder_name_will_do(folder: Path) -> None:
    odd = "50% of?them#1 ü"
    evaluate("-m", CNN, "-a", "fgsm", *QUICK, output=odd)
    ran = run(*E, "-o", odd, "--dry-run", "--json")
    assert [c["state"] for c in ran.json["cells"]] == ["done"]


# --- full disks ------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k,mode=777", "advplug-test", place], capture_output=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if made is None or made.returncode:
        pytest.skip("mounting a small file system takes the rights of root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Takes all the space but `leave` bytes."""
    file = place / "filler"
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            pass
        out.truncate(max(0, out.tell() - leave))
    return file


def test_a_full_disk_loses_nothing_and_the_run_goes_on_from_there(folder: Path, disk: Path) -> None:
    evaluate("-m", CNN, "-a", "fgsm", *QUICK, output=disk)
    before = stored(disk)
    filler = fill(disk)
    says(run(*ev(CNN, "noise", "-o", str(disk))), 2, "the disk is full; free some space, then run the same command")
    filler.unlink()
    after = stored(disk)
    assert {k: after[k] for k in before} == before
    evaluate("-m", CNN, "-a", "fgsm", "-a", "noise", *QUICK, output=disk)
    after = stored(disk)
    assert {k: after[k] for k in before} == before
    assert len(after) == 2


def test_a_disk_that_is_full_from_the_start(folder: Path, disk: Path) -> None:
    fill(disk)
    says(run(*E, "-o", disk / "out"), 2, "the disk is full")


def test_a_disk_that_adversarial_images_fill(folder: Path, disk: Path) -> None:
    """They are kept for the defended model; written through a memory map, this would be a bus error."""
    data = "fake:n=200,train=40,size=16,channels=1,classes=4"  # 205 kB of them
    child = nursery().start(folder, *ev(CNN, "noise", "-d", "prune:epochs=1", "-o", str(disk), dataset=data))
    says(child.wait(), 2, "the disk is full; free some space, then run the same command again to go on")


def test_a_full_weight_cache(folder: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate("-m", CNN, "-a", "fgsm", *QUICK)
    before = stored("out")
    fill(disk, 8192)
    monkeypatch.setenv("ADVPLUG_CACHE", str(disk))
    says(run(*E, "-o", "out", "--seed", "1"), 2, "cannot be used: no space is left; free some")
    assert {k: v for k, v in stored("out").items() if v[0] == "ok"} == before


def test_a_limit_on_the_size_of_files(folder: Path) -> None:
    """The kernel ends a write with an error or a signal, as for a disk quota."""
    says(nursery().start(folder, *E, "-o", "out", file_limit=9000).wait(), 2, "or a limit on file sizes is reached")


# --- interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("doing", ["training", "attack"])
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(folder: Path, doing: str) -> None:
    model = "py:usernets:Slow#epochs=1"
    arguments = ("eval", "-m", CNN, "-m", model, "-a", "noise", "-a", "fgsm", "--dataset", TINY, *QUICK, "-o", "out")
    here = {"ADVPLUG_CACHE": str(folder / "cache")}
    child = nursery().start(folder, *arguments, SLOW=doing, **here)
    wait_for((folder / doing).exists)
    child.send(signal.SIGINT)
    ran = child.wait()
    says(ran, 130, "interrupted: finished cells are kept in out; to go on: advplug eval -m cnn:epochs=1 -m")
    before = stored("out")
    assert len(before) == (2 if doing == "training" else 3)
    again = nursery().start(folder, *arguments, **here).wait()
    assert again.code == 0, again.err
    after = stored("out")
    assert len(after) == 4
    assert {k: after[k] for k in before} == before


def test_a_reader_that_stops_reading_is_no_error() -> None:
    done = subprocess.run(
        f"set -o pipefail; '{sys.executable}' -c 'from advplug.cli import main; main()' list --json | head -c 9",
        shell=True, capture_output=True, text=True, check=False, executable=shutil.which("bash"),
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == "[\n  {\n   "
    assert done.stderr == ""


def test_an_unforeseen_error_is_one_line_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr("advplug.session.plan_all", broken)
    says(run(*E), 4, "internal: KeyError")
    monkeypatch.setenv("ADVPLUG_DEBUG", "")  # so that it is put back
    debugged = run("--debug", *E)
    assert debugged.code == 4
    assert "Traceback" in debugged.err
