"""The report: what it says of a folder made by hand, in numbers known beforehand, and that it is one safe file."""

from __future__ import annotations

import base64
import hashlib
import importlib
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from advplug.errors import UsageError
from advplug.report import images
from advplug.report.page import write
from advplug.report.parts import load
from cli_tools import CNN, QUICK, evaluate, run
from conftest import ROOT
from page_reader import Node, cells, numbers, parse, pixels, rows
from report_folder import CLASSES, DETAIL, EVIL, Folder, sample, whole
from run_folders import cell, evidence, stored, threat

SECTIONS = [
    "headline", "warnings", "worst-case", "curves", "heat-maps", "origins", "trade-off", "classes", "transfer",
    "convergence", "images", "certificates", "poisonings", "cost", "missing", "all-cells", "provenance",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return whole(tmp_path_factory.mktemp("runs") / "all")


@pytest.fixture(scope="module")
def html(folder: Folder) -> str:
    return write(folder.path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Node:
    return parse(html)


def section(page: Node, name: str) -> Node:
    return page.one("section", id=name)


# --- one safe file ---------------------------------------------------------------------------------


def test_the_same_runs_give_the_same_bytes_in_any_process(folder: Folder, html: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from advplug.report.page import write; write(*map(Path, sys.argv[1:])); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(folder.path), str(tmp_path / "again.html")]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}, check=True)
    assert (tmp_path / "again.html").read_bytes() == html.encode()
    # A folder is left as it was, but for the page.
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "report.html", "results.sqlite"]


def test_nothing_is_loaded_and_only_the_own_script_may_run(html: str, page: Node) -> None:
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    script = page.one("script")
    own = base64.b64encode(hashlib.sha256("".join(map(str, script.inside)).encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not page.all("link")
    for node in page.all():
        names = set(node.attributes)
        assert not {n for n in names if n.startswith("on")}
        assert node.attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert node.attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_text_of_the_runs_stays_text(html: str, page: Node) -> None:
    assert EVIL not in html
    assert page.one("h1").text == f"Robustness of cnn, {EVIL} on digits"
    assert DETAIL in section(page, "warnings").text
    assert "nine & <b>more</b>" in section(page, "classes").text
    # In the drawings, too, which are markup.
    drawn = " ".join(n.text for n in section(page, "heat-maps").all("text"))
    assert EVIL in drawn
    assert not page.all("b")


def test_every_part_is_there_with_headline_and_warnings_first(page: Node) -> None:
    found = [n.attributes["id"] for n in page.all("section")]
    assert found == SECTIONS
    assert [a.attributes["href"][1:] for a in page.one("nav").all("a")] == SECTIONS
    # Headings go down one level at a time, and identifiers are unique.
    levels = [int(n.tag[1]) for n in page.all() if re.fullmatch(r"h[1-6]", n.tag)]
    assert levels[0] == 1
    assert max(b - a for a, b in itertools.pairwise(levels)) == 1
    named = [n.attributes["id"] for n in page.all() if "id" in n.attributes]
    assert len(named) == len(set(named))
    for node in page.all():
        assert set(node.attributes.get("aria-labelledby", "").split()) <= set(named)


def test_a_table_stands_under_every_figure_and_text_under_every_image(page: Node) -> None:
    drawn = [f for f in page.all("figure") if f.all("div", role="img")]
    assert len(drawn) == 11
    for figure in drawn:
        order = [n for n in figure.all() if n.tag in ("svg", "table")]
        assert [n.tag for n in order] == ["svg", "table"]
        assert len(figure.one("div", role="img").attributes["aria-label"]) > 30
        # Texts of a drawing are texts: they can be searched and read.
        assert figure.all("text")
    pictures = page.all("img")
    assert pictures
    assert all(len(p.attributes["alt"]) > 10 for p in pictures)
    assert all(p.attributes["alt"].count(",") >= 2 for p in pictures if p.attributes["alt"].startswith("Adversarial"))


# --- numbers ---------------------------------------------------------------------------------------


def test_the_headline_has_clean_and_worst_case_with_interval_and_verdict(folder: Folder, page: Node) -> None:
    found = {}
    for card in section(page, "headline").all("article"):
        lines = [(d.one("dt").text, [n.text for n in d.all("dd")]) for d in card.all("div")]
        found[card.one("h3").text, card.one("p", class_="threat").text] = lines
    assert found["cnn", "digits, linf, undefended"] == [
        ("clean accuracy, %", ["100.0 [92.9, 100.0]"]),
        ("worst-case accuracy, %, at eps 1/20", ["60.0 [46.2, 72.4]", "trusted"]),
        ("worst-case accuracy, %, at eps 1/10", ["10.0 [4.3, 21.4]", "upper bound"]),
    ]
    assert found["cnn+jpeg", "digits, linf"][2][1][1] == "not trustworthy"
    assert found["cnn", "digits, trained under ba:count=7"][1][1] == ["75.0 [59.8, 85.8]", "upper bound"]
    assert len(found) == 4
    exact = [float(n.attributes["data-value"]) for n in section(page, "headline").all("dd", class_="large")]
    assert exact[:3] == [1.0, 0.6, 0.1]
    meanings = section(page, "headline").one("ul").text
    assert all(word in meanings for word in ("trusted", "upper bound", "not trustworthy"))


def test_warnings_name_what_is_wrong_and_where(page: Node) -> None:
    told = [li.text for li in section(page, "warnings").all("li")]
    assert told[0].startswith("failed 1 of 16 cells could not be computed")
    assert told[1].startswith("refused 1 of 16 cells were refused")
    # The worst first, each with the victim and what to do.
    assert told[2].startswith(f"error zero-gradients {DETAIL}; look for detached")
    assert told[2].endswith("cnn+jpeg, linf 1/10")
    assert told[3].startswith("warn not-converged")
    assert told[4] == "warn unreached half of the trigger is lost ba:count=7 on cnn"
    assert [t.split()[0] for t in told[5:]] == ["upper", "upper"]


def test_the_big_tables_agree_with_the_store(folder: Folder, page: Node) -> None:
    table = section(page, "all-cells").one("table")
    shown = list(zip(rows(table), numbers(table), strict=True))
    assert len(shown) == len(folder.result.cells)
    for (texts, exact), made in zip(shown, folder.result.cells, strict=True):
        assert (texts["model"], texts["defense"], texts["attack"], texts["eps"], texts["status"]) == (
            made.model, made.defense, made.attack, made.eps, made.status)  # fmt: skip
        robust = made.metrics.get("robust_accuracy")
        assert exact.get("robust % [95 %]") == (None if robust is None else robust.value)
    threats = section(page, "worst-case").one("table")
    assert [n["worst case % [95 %]"] for n in numbers(threats)] == [0.6, 0.1, 0.8, 0.5, 0.7, 0.2]
    assert [r["verdict"] for r in rows(threats)] == [t.verdict for t in folder.result.threats]


def test_cells_without_a_score_have_words_and_reasons_never_zero(page: Node) -> None:
    found = {r["what"]: r for r in rows(section(page, "missing").one("table"))}
    assert (found["boom"]["status"], found["boom"]["reason"]) == ("failed", "memory <ran> out")
    assert (found["grad"]["status"], found["grad"]["reason"]) == ("refused", "use square instead")
    for row, exact in zip(rows(t := section(page, "all-cells").one("table")), numbers(t), strict=True):
        if row["status"] != "ok":
            assert row["robust % [95 %]"] == row["clean %"] == "-"
            assert set(exact) == {"eps"}


def test_security_curves_begin_without_attack(page: Node) -> None:
    first, second = section(page, "curves").all("table")
    assert [(r["line"], r["eps"], r["accuracy, % [95 %]"].split()[0], r["verdict"]) for r in rows(first)] == [
        ("undefended", "0", "100.0", "without attack"), ("undefended", "1/20", "60.0", "trusted"),
        ("undefended", "1/10", "10.0", "upper bound"), ("jpeg", "0", "100.0", "without attack"),
        ("jpeg", "1/20", "80.0", "trusted"), ("jpeg", "1/10", "50.0", "not trustworthy"),
    ]  # fmt: skip
    assert [n["accuracy, % [95 %]"] for n in numbers(second)] == [1.0, 0.7, 0.2]


def test_heat_maps_go_defense_by_defense(page: Node) -> None:
    figure = section(page, "heat-maps").one("figure")
    drawn = [n.text for n in figure.all("text")]
    assert {"undefended", "under jpeg", "pgd", "square", "worst case"} <= set(drawn)
    assert [(r["model, defense"], r["pgd"], r["square"], r["worst case"]) for r in rows(figure.one("table"))] == [
        ("cnn", "60.0", "90.0", "60.0"), (EVIL, "70.0", "-", "70.0"), ("cnn+jpeg", "80.0", "-", "80.0"),
    ]  # fmt: skip


def test_a_failed_or_refused_cell_has_no_colour(tmp_path: Path) -> None:
    seen = evidence(range(10))
    path = stored(tmp_path, (cell(seen), seen), (cell(attack="x", status="failed", reason="no"), None),
                  (cell(attack="y", status="refused", reason="no"), None), threats=[threat()])  # fmt: skip
    figure = section(parse(write(path).read_text()), "heat-maps").one("figure")
    (found,) = rows(figure.one("table"))
    assert (found["pgd"], found["x"], found["y"]) == ("80.0", "failed", "refused")
    # Two of four cells are filled, each with one path in the mesh of colours.
    mesh = next(g for g in figure.all("g") if "QuadMesh" in g.attributes.get("id", ""))
    filled = [p for p in mesh.all() if "fill: #" in p.attributes.get("style", "")]
    assert len(filled) == 2


def test_static_stands_beside_adaptive(page: Node) -> None:
    (table,) = section(page, "origins").all("table")
    assert [(r["attack"], r["eps"], n["static %"], n["adaptive %"]) for r, n in zip(rows(table), numbers(table),
            strict=True)] == [("pgd", "1/20", 0.9, 0.8), ("pgd", "1/10", 0.76, 0.5)]  # fmt: skip


def test_the_pareto_front_is_told(tmp_path: Path) -> None:
    at = [("a", 0.9, 0.2), ("b", 0.8, 0.4), ("c", 0.7, 0.3), ("d", 0.9, 0.1), ("e", 0.8, 0.4)]
    bad = threat(1.0, 1.0, model="f", verdict="not trustworthy")  # too good to be on the front
    seen = evidence([1])
    path = stored(tmp_path, *((cell(seen, model=m), seen) for m in "abcdef"),
                  threats=[*(threat(x, y, model=m) for m, x, y in at), bad])  # fmt: skip
    figure = section(parse(write(path).read_text()), "trade-off").one("figure")
    assert [(r["model, defense"], r["on the Pareto front"]) for r in rows(figure.one("table"))] == [
        ("a", "yes"), ("b", "yes"), ("c", "no"), ("d", "no"), ("e", "yes"), ("f", "no")]  # fmt: skip
    # Victims at one place share a label.
    assert "2, 5" in [n.text for n in figure.all("text")]


def test_classes_fall_by_what_the_worst_case_takes(page: Node) -> None:
    figure = section(page, "classes").one("figure")
    found = rows(figure.one("table"))
    assert {r["class"] for r in found} == set(CLASSES)
    # At 1/20: 20 of 50 images in turn, so two of each class's five, fall for cnn; one of five under jpeg.
    assert all(r["images"] == "5" for r in found)
    assert all(r["cnn %"] == "100 → 60" for r in found)
    assert all(r["cnn+jpeg %"] == "100 → 80" for r in found)


def test_the_drop_by_class_is_of_the_images_that_the_worst_case_is_of(tmp_path: Path) -> None:
    """A folder may hold an earlier run on fewer images, under the same names."""
    few, many = evidence(range(20), n=20), evidence(range(10))
    path = stored(tmp_path, (cell(few), few), (cell(many), many), threats=[threat(1.0, 0.8)])
    (table,) = section(parse(write(path).read_text()), "classes").all("table")
    assert {(r["images"], r["cnn %"]) for r in rows(table)} == {("5", "100 → 80")}


def test_transfer_is_a_matrix_of_sources_and_judges(page: Node) -> None:
    figure = section(page, "transfer").one("figure")
    table = figure.one("table")
    assert [r["crafted on"] for r in rows(table)] == ["(no attack)", "cnn", EVIL]
    assert [(n["cnn"], n[EVIL]) for n in numbers(table)] == [(1.0, 1.0), (0.1, 0.76), (0.76, 0.1)]
    assert "crafted by pgd" in figure.one("h3").text


def test_effort_tells_when_each_attack_succeeded(page: Node) -> None:
    tables = section(page, "convergence").all("table")
    found = {(r["attack"], r["model, defense"]): r for r in rows(tables[0])}
    # 20 of 50 images fall, one with every step: 2 after 2 of 20, 5 after 5, 10 after 10.
    steps = found["pgd", "cnn"]
    assert [steps[f"% after {w}"] for w in ("a tenth", "a quarter", "half", "all")] == ["96.0", "90.0", "80.0", "60.0"]
    twice = [r["twice the steps"] for r in rows(tables[1])]
    assert twice == ["no flag", "it goes on falling", "no flag", "no flag", "no flag", "no flag"]


def test_images_stand_above_their_difference_with_its_factor(page: Node) -> None:
    grid = section(page, "images").all("details")[0]
    strips = [(tr.one("th").text, tr.one("img")) for tr in grid.all("tr", class_="strip")]
    assert [label for label, _ in strips[:3]] == ["clean", "pgd, linf 1/20", "difference × 25"]
    kept = sample()
    clean, adversarial, apart = (pixels(image) for _, image in strips[:3])
    for i in range(3):
        place = slice(9 * i, 9 * i + 8)  # 8 pixels, then a gap of one
        assert (clean[:, place, 0] == kept.clean[i, 0]).all()
        assert (adversarial[:, place, 0] == kept.adversarial[i, 0]).all()
        assert (apart[:, place, 0] == 250).all()  # ten levels, 25 times
        assert (clean[:, place, 3] == 255).all()
        assert (clean[:, 9 * i + 8, 3] == 0).all()
    answers = [td.text for td in grid.all("tr", class_="answers")[1].all("td")]
    assert answers == ["one", "two", "three"]
    assert len(grid.all("tr", class_="answers")[1].all("strong")) == 3
    assert not grid.all("tr", class_="answers")[0].all("strong")


def test_poisons_stand_beside_their_originals(page: Node) -> None:
    poison, trigger = section(page, "poisonings").all("details")
    labels = [tr.one("th").text for tr in poison.all("tr", class_="strip")]
    assert labels == ["original", "poisoned", "difference × 1"]
    said = [[td.text for td in tr.all("td")] for tr in poison.all("tr", class_="answers")]
    assert said == [list(CLASSES[:4]), [CLASSES[9]] * 4]
    assert [th.text for th in poison.one("thead").all("th")] == [
        "training image",
        "no. 0",
        "no. 10",
        "no. 20",
        "no. 30",
    ]
    before, after, apart = (pixels(i) for i in poison.all("img"))
    assert (before[7, 7, 0], after[7, 7, 0], apart[7, 7, 0]) == (40, 255, 215)
    assert "it asks for nine" in trigger.one("summary").text
    # Two of the four are taken for what the attacker wants.
    (answers,) = trigger.all("tr", class_="answers")
    assert [td.text for td in answers.all("strong")] == [CLASSES[9]] * 2
    table = section(page, "poisonings").one("table", id="poisonings-table")
    assert numbers(table)[0]["triggered as wanted % [95 %]"] == 0.75


def test_certificates_cost_and_provenance_are_told(page: Node) -> None:
    (proofs,) = section(page, "certificates").all("table")
    assert [(r["radius"], n["certified % [95 %]"]) for r, n in zip(rows(proofs), numbers(proofs), strict=True)] == [
        ("1/4", 0.6), ("1/2", 0.2)]  # fmt: skip
    attacks, victims = section(page, "cost").all("table")
    first = rows(attacks)[0]
    assert (first["model, defense"], first["attack"], first["cells"]) == ("cnn", "pgd", "2")
    assert (first["attack, s"], first["images forward"], first["through the model"]) == ("4.00", "100", "120")
    assert rows(victims)[0]["train, s"] == "1.00"
    facts = {r["what"]: r["value"] for r in rows(section(page, "provenance").all("table")[0])}
    assert facts["command"] == f"advplug eval -m '{EVIL}'"
    assert (facts["passes of an image"], facts["wall time"], facts["torch"]) == ("1,234", "5.5 s", "2.13.0")
    assert "ab" * 32 in section(page, "provenance").text


def test_threats_stand_in_the_order_of_the_cells_whichever_run_told_them_last(tmp_path: Path) -> None:
    seen = evidence([1])
    made = [cell(seen, model=m, defense=d, eps=e) for m in "ba" for d in ("none", "jpeg") for e in ("1/20", "1/10")]
    told = [threat(model=c.model, defense=c.defense, eps=c.eps) for c in made]
    path = stored(tmp_path, *((c, seen) for c in made), threats=told[::-1])
    found = [(t.model, t.defense, t.eps) for t in load(path).result.threats]
    assert found == [(c.model, c.defense, c.eps) for c in made]


def test_a_run_that_was_interrupted_says_so(tmp_path: Path) -> None:
    seen = evidence([1])
    page = parse(write(stored(tmp_path, (cell(seen), seen))).read_text())
    assert "interrupted 1 finished cells have no verdict" in section(page, "warnings").text
    assert "no threat was judged" in section(page, "headline").text


# --- size and time ---------------------------------------------------------------------------------


def test_a_hundred_cells_with_eight_images_each_stay_small_and_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    build = importlib.import_module("report").build
    assert build(tmp_path) == 100
    begun = time.process_time()
    made = write(tmp_path)
    assert time.process_time() - begun < 10
    assert 500_000 < made.stat().st_size < 3_000_000
    page = parse(made.read_text())
    assert len(rows(section(page, "all-cells").one("table"))) == 100
    # Noise does not fit; what was left out is said.
    assert re.search(r"Of 8 images kept of a cell \d are shown", section(page, "images").text)
    assert len(section(page, "images").all("details")) == 10


@pytest.mark.parametrize(("channels", "levels"), [(1, 3), (1, 200), (1, 256), (3, 2), (3, 6), (3, 256)])
def test_images_are_kept_to_the_bit_whatever_the_form(channels: int, levels: int) -> None:
    rng = np.random.default_rng(levels)
    given = (rng.integers(0, levels, (3, channels, 40, 40)) * (255 // (levels - 1))).astype(np.uint8)
    found = pixels(Node("img", {"src": images.strip(given)}))
    for i, one in enumerate(given):
        own = found[:, 41 * i : 41 * i + 40]
        assert (np.moveaxis(own[..., :3], 2, 0) == one).all()  # a grey image is three times the same
        assert (own[..., 3] == 255).all()
        assert (found[:, 41 * i + 40, 3] == 0).all()


def test_images_that_fit_are_all_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole(tmp_path)
    data = load(folder.path)
    all_of_them = images.images(data)
    assert all_of_them is not None
    assert len(all_of_them.lead) == 1
    monkeypatch.setattr(images, "BYTES", 1_500)
    fewer = images.images(data)
    assert fewer is not None
    assert "so that the page stays small" in fewer.lead[1]
    assert "cells are left out for the same reason" in fewer.lead[2]
    held = sum(len(s.data) for g in fewer.grids for s in g.strips if s.label != "clean")
    assert held <= 1_500


# --- the command -----------------------------------------------------------------------------------


def test_a_real_run_is_reported_with_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = evaluate("-m", CNN, "-a", "fgsm", "-d", "jpeg", "-e", "0.1", *QUICK)
    done = run("report", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("out/report.html  (0.")
    page = parse(Path("out/report.html").read_text())
    table = section(page, "all-cells").one("table")
    shown = [n["robust % [95 %]"] for n in numbers(table)]
    assert shown == [c["metrics"]["robust_accuracy"]["value"] for c in result["cells"]]
    # The images are those of the run: 8 of them, with answers, in two grids.
    grids = section(page, "images").all("details")
    assert [len(cells(g.all("tr", class_="answers")[0])) for g in grids] == [8, 8]


def test_the_poisons_of_a_real_run_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("advplug_poisoning")
    monkeypatch.chdir(tmp_path)
    evaluate("-m", CNN, "-a", "ba:rate=0.2", *QUICK)
    page = parse(Path(write(Path("out"))).read_text())
    poison, trigger = section(page, "poisonings").all("details")
    before, after, _ = (pixels(i) for i in poison.all("img"))
    # A white square in the lower right corner; everything else is as it was.
    changed = (before[..., 0] != after[..., 0])[:, :8]
    assert changed.any()
    assert not changed[:4].any()
    assert not changed[:, :4].any()
    assert len(trigger.all("img")) == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere",), "nowhere holds no results.sqlite; give the folder of a run"),
        (("empty",), "empty holds no finished cell yet"),
        (("full", "-o", "full"), "'full' is a folder; name a file with -o, like full/report.html"),
        (("full", "-o", "nowhere/page.html"), "cannot write to nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = evidence([1])
    stored(Path("full"), (cell(seen), seen))
    stored(Path("empty"))
    done = run("report", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert told in done.err


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = evidence([1])
    path = write(stored(tmp_path, (cell(seen), seen)))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="the disk is full"):
        write(tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".report-*"))


def test_explanations_need_captum_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = evidence([1])
    stored(Path("out"), (cell(seen), seen))
    monkeypatch.setitem(sys.modules, "captum", None)
    done = run("report", "out", "--explain")
    assert done.code == 2
    assert "pip install 'advplug[explain]'" in done.err
