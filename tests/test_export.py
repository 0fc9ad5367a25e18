"""`advplug export`: flat rows in every format, tables as papers print them, and what cannot be exported."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import advplug
from advplug.errors import UsageError
from advplug.export import as_csv, export
from advplug.results import RunResult
from advplug.stored.runs import read
from advplug.tables.paper import latex, markdown, tables
from cli_tools import run
from conftest import python
from run_folders import INFO, UNTRUSTED, cell, certificate, evidence, poisoned, poisoning, stored, threat

SEEN = evidence(range(20), found=np.full(50, np.inf))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two victims under two attacks at one of two budgets, a backdoor, a certificate, and a failure."""
    seen = evidence(range(30))
    return stored(
        tmp_path_factory.mktemp("export") / "run",
        (cell(SEEN), SEEN),
        (cell(seen, attack="square:queries=100"), seen),
        (cell(SEEN, defense="prune:ratio=0.2"), SEEN),
        (cell(defense="prune:ratio=0.2", attack="square:queries=100", status="failed", reason="=no luck"), None),
        (cell(SEEN, eps="1/5"), SEEN),
        threats=(threat(), threat(defense="prune:ratio=0.2", worst=0.6, **UNTRUSTED),
                 threat(eps="1/5", worst=0.2, verdict="upper bound")),
        poisonings=[(poisoning(poisoned(30), verdict="upper bound"), poisoned(30))],
        certificates=[certificate()],
    )  # fmt: skip


def rows(folder: Path, form: str, part: str | None = None) -> list[dict[str, Any]]:
    text = export(folder, form, part).data.decode()
    if form == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def test_a_cell_is_a_row_with_its_metrics_and_their_intervals(folder: Path) -> None:
    found, told = rows(folder, "jsonl"), read(folder).cells
    assert [r["key"] for r in found] == [c.key for c in told]
    assert len({tuple(r) for r in found}) == 1
    robust = told[0].metrics["robust_accuracy"]
    assert robust is not None
    first = found[0]
    assert [first[f"robust_accuracy{end}"] for end in ("", "_low", "_high", "_n")] == [
        robust.value, robust.low, robust.high, 50,
    ]  # fmt: skip
    assert (first["eps"], first["eps_value"]) == ("1/10", 0.1)
    assert found[3]["robust_accuracy"] is None
    assert "static_robust_accuracy" not in first  # no cell has one
    assert "provenance" not in first


def test_csv_says_the_same_and_holds_no_formula(folder: Path) -> None:
    found = rows(folder, "csv")
    assert [r["attack"] for r in found] == [r["attack"] for r in rows(folder, "jsonl")]
    assert float(found[0]["robust_accuracy"]) == 0.6
    assert found[3]["robust_accuracy"] == ""
    assert found[3]["reason"] == "'=no luck"
    (header, *lines) = csv.reader(io.StringIO(as_csv([{"@a": "-x", "b": -0.5, "c": "+1", "d": True}]).decode()))
    assert (header, lines) == (["'@a", "b", "c", "d"], [["'-x", "-0.5", "'+1", "1"]])


def test_the_other_parts_have_rows_of_their_own(folder: Path) -> None:
    worst = rows(folder, "jsonl", "threats")
    assert [r["worst_case_accuracy"] for r in worst] == [0.4, 0.6, 0.2]
    assert worst[1]["flags"] == "zero-gradients"
    (backdoor,) = rows(folder, "jsonl", "poisonings")
    assert (backdoor["attack_success_rate"], backdoor["attack_success_rate_n"], backdoor["poisons"]) == (0.75, 40, 7)
    proven = rows(folder, "jsonl", "certificates")
    assert [(r["radius"], r["certified_accuracy"]) for r in proven] == [("1/4", 0.6), ("1/2", 0.2)]


def test_images_are_told_one_by_one(folder: Path) -> None:
    found = rows(folder, "jsonl", "images")
    assert len(found) == 4 * 50
    first = [r for r in found if r["key"] == found[0]["key"]]
    assert [r["index"] for r in first] == list(range(50))
    assert sum(r["robust"] for r in first) == 30
    assert [r["adaptive_success"] for r in first] == [1.0] * 20 + [0.0] * 30
    assert "found" not in first[0]  # infinite everywhere, which JSON cannot say


def test_parquet_keeps_numbers_as_numbers(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra 'parquet', is not installed")
    file = tmp_path / "run.parquet"
    assert run("export", folder, "-f", "parquet", "--what", "cells", "-o", file).code == 0
    table = parquet.read_table(file)
    assert table.to_pylist() == rows(folder, "jsonl", "cells")
    assert str(table.schema.field("robust_accuracy").type) == "double"


def test_json_is_what_eval_prints(tmp_path: Path) -> None:
    result = advplug.evaluate("cnn:epochs=1", "fgsm", n=10, audit="none", output=tmp_path,
                              dataset="fake:n=20,train=40,size=8,channels=1,classes=4")  # fmt: skip
    ran = run("export", tmp_path, "--format", "json")
    assert ran.code == 0
    assert ran.json == json.loads(json.dumps(result.to_json()))


def test_the_command_says_what_it_leaves_out_and_writes_files(folder: Path, tmp_path: Path) -> None:
    ran = run("export", folder, "-f", "csv")
    assert ran.out == export(folder, "csv").data.decode()
    assert ran.err == "note: these are the 5 cells; --what gives the 1 poisonings, 1 certificates, 3 threats\n"
    file = tmp_path / "rows.csv"
    assert run("export", folder, "-f", "csv", "--what", "cells", "-o", file).err == ""
    assert file.read_text() == ran.out
    gone = run("export", folder, "-f", "csv", "-o", tmp_path / "none" / "rows.csv")
    assert gone.code == 2
    assert "cannot be written: No such file or directory" in gone.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-f", "json", "--what", "cells"), "json is the whole result; leave --what out"),
        (("-f", "md", "--what", "images"), "tables are of threats, poisonings, certificates; for images take"),
        (("-f", "parquet"), "a Parquet file is no text for standard output; name a file with -o"),
    ],
)
def test_what_does_not_go_together(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    ran = run("export", folder, *arguments)
    assert ran.code == 2
    assert told in ran.err


def test_nothing_to_export(tmp_path: Path) -> None:
    only = stored(tmp_path / "poisons", poisonings=[(poisoning(poisoned(30)), poisoned(30))])
    with pytest.raises(UsageError, match="holds no cells, but 1 poisonings: choose with --what"):
        export(only, "csv", "cells")
    assert rows(only, "jsonl")[0]["attack"] == "ba:count=7"
    with pytest.raises(UsageError, match="holds no finished cell"):
        export(stored(tmp_path / "empty"), "csv")
    with pytest.raises(UsageError, match="there is no table to print"):
        export(stored(tmp_path / "bare", (cell(SEEN), SEEN)), "latex")


# --- tables for papers -------------------------------------------------------------------------------


def test_markdown_tables_have_a_row_a_victim_and_a_column_an_attack(folder: Path) -> None:
    made = export(folder, "md", "threats").data.decode()
    caption, _, *lines = made.strip().splitlines()
    assert caption.startswith("Accuracy in % on `digits` under L∞ attacks (untargeted); n = 50 images, 95 % intervals")
    assert "† upper bound" in caption
    # Not every check is on the attack: clean accuracy near chance is no fault of one.
    assert "‡ not trustworthy: a health check found that the evaluation went wrong." in caption
    table = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in table} == {8}
    assert table[0][2:] == ["clean", "`pgd`, ε = 1/10", "`square:queries=100`, ε = 1/10", "worst case, ε = 1/10",
                            "`pgd`, ε = 1/5", "worst case, ε = 1/5"]  # fmt: skip
    assert table[2] == ["`cnn`", "none", "90.0 [78.6, 95.7]", "60.0", "40.0", "40.0 [27.6, 53.8]", "60.0",
                        "20.0 [11.2, 33.0]†"]  # fmt: skip
    assert table[3] == ["`cnn`", "`prune:ratio=0.2`", "90.0 [78.6, 95.7]", "60.0", "failed", "60.0 [46.2, 72.4]‡", "–",
                        "–"]  # fmt: skip


def test_threats_of_other_shapes_are_tables_of_their_own(tmp_path: Path) -> None:
    """In one row, the worst case would be that of the last of them."""
    weak, strong = evidence(range(5)), evidence(range(40))
    of = {"norm": "spatial", "eps": "1"}
    made = [(cell(seen, attack=f"spatial:{shape}", shape=shape, **of), seen, worst)
            for shape, seen, worst in (("angle=30", strong, 0.2), ("angle=0", weak, 0.9))]  # fmt: skip
    rows = [threat(1.0, worst, attacks=(c.attack,), shape=c.shape, **of) for c, _, worst in made]
    folder = stored(tmp_path / "run", *((c, seen) for c, seen, _ in made), threats=rows)
    text = run("export", folder, "--format", "md").out
    assert text.count("Accuracy in %") == 2
    assert "attacks (untargeted) with angle=30" in text
    first, second = text.split("angle=0")[0], text
    assert "20.0" in first
    assert "90.0" not in first
    assert "90.0" in second


def test_latex_has_as_many_columns_everywhere(folder: Path) -> None:
    made = export(folder, "latex").data.decode()
    assert made.startswith("% needs \\usepackage{booktabs}\n")
    floats = re.findall(r"\\begin\{table\}.*?\\end\{table\}", made, flags=re.DOTALL)
    assert len(floats) == 3
    for number, text in enumerate(floats, 1):
        assert f"\\label{{tab:advplug-{number}}}" in text
        (layout,) = re.findall(r"\\begin\{tabular\}\{(l+r+)\}", text)
        for line in (row for row in text.splitlines() if row.endswith("\\\\")):
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
            assert len(re.split(r"(?<!\\)&", line)) + sum(spans) - len(spans) == len(layout), line
        assert text.count("{") == text.count("}")
    assert "\\cmidrule(lr){4-6}\\cmidrule(lr){7-8}" in floats[0]
    assert "\\multicolumn{3}{c}{$\\varepsilon$ = 1/10}" in floats[0]
    assert "60.0 {\\scriptsize [46.2, 72.4]}$^\\ddagger$" in floats[0]
    assert "75.0 {\\scriptsize [59.8, 85.8]}$^\\dagger$" in floats[1]
    assert "L$_2$ radius" in floats[2]


def test_signs_that_mean_something_are_escaped() -> None:
    name = "py:my_model:make#1&{50%}~^$\\|`x`"
    made = tables(RunResult(INFO, (), (threat(model=name), threat(model=name, defense="jpeg"))))
    text = latex(made)
    told = r"\texttt{py:my\_model:make\#1\&\{50\%\}\textasciitilde{}\textasciicircum{}\$\textbackslash{}\textbar{}'x'}"
    assert text.count(told) == 2
    assert "py:my_model" not in text
    assert "`py:my_model:make#1&{50%}~^$\\\\|'x'`" in markdown(made)


def test_similarities_are_no_percentages() -> None:
    from advplug.estimate import Estimate

    similar = threat(worst=None, goal="minimise", clean_similarity=Estimate(0.8, 0.75, 0.85, 50),
                     worst_case_similarity=Estimate(0.25, 0.2, 0.3, 50), recovery=0.5)  # fmt: skip
    text = markdown(tables(RunResult(INFO, (), (similar, threat()))))
    assert "Similarity of images and their own texts on `digits`" in text
    assert "| 0.800 [0.750, 0.850] | 0.250 [0.200, 0.300] | 50.0 |" in text
    assert text.count("Accuracy in %") == 1


def test_exporting_needs_no_torch(folder: Path) -> None:
    done = python(
        "-c",
        "import sys; from pathlib import Path; from advplug.export import export\n"
        "for form in ('csv', 'latex'): export(Path(sys.argv[1]), form)\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)",
        str(folder),
    )
    assert done.returncode == 0, done.stderr
