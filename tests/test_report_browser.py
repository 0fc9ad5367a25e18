"""The report as Chromium shows it: on a desk and on a phone, light and dark, with the keyboard alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from advplug.report.page import write
from browser import DESKTOP, PHONE, Browser, browser, needs_browser
from report_folder import EVIL, Folder, whole

pytestmark = needs_browser
VIEWS = [(size, dark) for size in (DESKTOP, PHONE) for dark in (False, True)]
TABLE = "document.getElementById('cells')"

CONTRAST = """
(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.a === 1) return found.rgb;
    }
    return null;
  };
  const poor = [];
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    // What the drawings paint behind their texts is looked at elsewhere.
    if (!walk.currentNode.textContent.trim() || node.closest("svg, script, style") || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const pair = [luminance(parse(style.color).rgb), luminance(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push([walk.currentNode.textContent.trim().slice(0, 40), style.color, ratio]);
  }
  return { seen, poor };
})()
"""
SERIES = """
(() => {
  const style = getComputedStyle(document.documentElement);
  const luminance = (hex) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(style.getPropertyValue("--paper").trim());
  return [0, 1, 2, 3, 4, 5, 6].map((i) => luminance(style.getPropertyValue(`--series-${i}`).trim()))
    .map((l) => (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05));
})()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return whole(tmp_path_factory.mktemp("runs") / "all")


@pytest.fixture(scope="module")
def page(folder: Folder) -> Path:
    return write(folder.path)


@pytest.fixture(scope="module")
def tab(page: Path) -> Iterator[Browser]:
    with browser() as made:
        made.open(page)
        yield made


@pytest.fixture
def fresh(tab: Browser, page: Path) -> Browser:
    """On a desk, light, as it is loaded."""
    tab.open(page)
    return tab


def column(tab: Browser, number: int) -> list[str]:
    """The shown entries of a column of the big table."""
    rows = f"[...{TABLE}.tBodies[0].rows].filter((r) => !r.hidden)"
    found: list[str] = tab.run(f"{rows}.map((r) => r.cells[{number}].textContent.trim())")
    return found


# --- as it is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dark"), VIEWS)
def test_it_loads_alone_and_in_silence_and_fits_the_window(
    tab: Browser, page: Path, size: tuple[int, int], dark: bool, request: pytest.FixtureRequest
) -> None:
    tab.open(page, size, dark)
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.console == []
    assert [u for u in tab.requests if not u.startswith("data:image/png;base64,")] == [page.absolute().as_uri()]
    assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.run("document.documentElement.clientWidth") == size[0]
    # Wide tables and drawings scroll in a frame of their own, which the keyboard reaches.
    frames = tab.run(
        "[...document.querySelectorAll('.scroll')].map((s) => [s.getBoundingClientRect().right, s.tabIndex, "
        "s.getAttribute('role')])"
    )
    assert len(frames) > 20
    assert all(right <= size[0] and index == 0 and role in ("region", "img") for right, index, role in frames)
    assert tab.run("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    kept = os.environ.get("ADVPLUG_SCREENSHOTS")
    if kept:
        tab.screenshot(Path(kept) / f"{size[0]}-{'dark' if dark else 'light'}.png")


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_lines_stand_out_from_their_ground(tab: Browser, page: Path, dark: bool) -> None:
    tab.open(page, dark=dark)
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    found = tab.run(CONTRAST)
    assert found["seen"] > 500
    assert found["poor"] == []  # WCAG 2, AA
    assert min(tab.run(SERIES)) >= 3  # of graphics
    # The drawings follow the scheme, too.
    ink = tab.run("getComputedStyle(document.querySelector('svg text')).fill")
    assert ink == tab.run("getComputedStyle(document.body).color")


def test_a_model_called_script_is_text(fresh: Browser) -> None:
    assert fresh.run("document.scripts.length") == 1
    titles = fresh.run("[...document.querySelectorAll('.card h3')].map((n) => n.textContent)")
    assert EVIL in titles
    assert fresh.run("document.title") == f"Robustness of cnn, {EVIL} on digits"


def test_the_policy_keeps_other_scripts_from_running(fresh: Browser) -> None:
    inline = "const s = document.createElement('script'); s.textContent = 'window.ran = true'; document.body.append(s);"
    fresh.run(inline)
    assert fresh.run("window.ran === undefined")
    assert any("Content Security Policy" in line for line in fresh.console)


def test_numbers_in_the_page_are_those_of_the_store(fresh: Browser, folder: Folder) -> None:
    heads = fresh.run(f"[...{TABLE}.tHead.rows[0].cells].map((c) => c.textContent.trim())")
    at = heads.index("robust % [95 %]")
    shown = fresh.run(f"[...{TABLE}.tBodies[0].rows].map((r) => r.cells[{at}].dataset.value ?? null)")
    wanted = [c.metrics.get("robust_accuracy") for c in folder.result.cells]
    assert [None if s is None else float(s) for s in shown] == [None if w is None else w.value for w in wanted]
    cards = fresh.run("[...document.querySelectorAll('.card .large')].map((n) => Number(n.dataset.value))")
    worst = [t.worst_case_accuracy.value for t in folder.result.threats if t.worst_case_accuracy]
    assert [c for i, c in enumerate(cards) if i % 3][:6] == worst


def test_everything_has_a_name_that_a_reader_can_hear(fresh: Browser) -> None:
    tree = fresh.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"image", "img", "table", "grid", "region", "button", "searchbox", "link", "article", "navigation"}
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree
             if not n.get("ignored") and n.get("role", {}).get("value") in roles]  # fmt: skip
    assert {"table", "region", "button", "searchbox", "link"} <= {role for role, _ in named}
    assert [(r, n) for r, n in named if not n and r not in ("article",)] == []
    # Verdicts are words, not only colours.
    badges = fresh.run("[...document.querySelectorAll('.badge')].every((b) => b.textContent.trim().length > 1)")
    assert badges


# --- with the keyboard -----------------------------------------------------------------------------


def test_the_first_key_leads_past_the_navigation(fresh: Browser) -> None:
    fresh.press("Tab")
    assert fresh.run("document.activeElement.textContent") == "Skip to the content"
    assert fresh.run("document.activeElement.getBoundingClientRect().left >= 0")
    fresh.press("Enter")
    assert fresh.run("location.hash") == "#content"


def test_the_table_is_filtered_by_words_as_they_are_typed(fresh: Browser, folder: Folder) -> None:
    fresh.run("document.querySelector('[data-filter=cells]').focus()")
    total = len(folder.result.cells)
    status = "document.querySelector('[data-count=cells]').textContent"
    assert fresh.run(status) == f"{total} of {total} rows"
    fresh.type("jpeg PGD")
    assert fresh.run(status) == f"2 of {total} rows"
    assert column(fresh, 1) == ["jpeg", "jpeg"]
    fresh.run("document.activeElement.select()")
    fresh.type("failed")
    assert column(fresh, 2) == ["boom"]


def test_the_table_is_sorted_by_keys_by_number_or_word_and_back(fresh: Browser, folder: Folder) -> None:
    robust = [c.metrics["robust_accuracy"].value for c in folder.result.cells if c.status == "ok"]  # type: ignore[union-attr]
    heads = fresh.run(f"[...{TABLE}.tHead.rows[0].cells].map((c) => c.textContent.trim())")
    at = heads.index("robust % [95 %]")
    # From the filter with Tab: the frame of the table, then one button a column.
    fresh.run("document.querySelector('[data-filter=cells]').focus()")
    for _ in range(2 + at):
        fresh.press("Tab")
    assert fresh.run("document.activeElement.textContent") == "robust % [95 %]"
    assert float(fresh.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")) >= 2
    fresh.press("Enter")
    assert fresh.run(f"{TABLE}.tHead.rows[0].cells[{at}].getAttribute('aria-sort')") == "ascending"
    shown = column(fresh, at)
    assert [float(s.split()[0]) for s in shown[: len(robust)]] == sorted(round(100 * r, 1) for r in robust)
    assert shown[len(robust) :] == ["-", "-"]  # no score is not the lowest score
    fresh.press(" ")
    assert fresh.run(f"{TABLE}.tHead.rows[0].cells[{at}].getAttribute('aria-sort')") == "descending"
    shown = column(fresh, at)
    falling = sorted((round(100 * r, 1) for r in robust), reverse=True)
    assert [float(s.split()[0]) for s in shown[: len(robust)]] == falling
    assert shown[len(robust) :] == ["-", "-"]  # nor the highest
    # Budgets are fractions: 1/20 stands below 1/10.
    fresh.run(f"{TABLE}.tHead.rows[0].cells[{heads.index('eps')}].querySelector('button').focus()")
    fresh.press("Enter")
    budgets = column(fresh, heads.index("eps"))
    assert budgets == sorted(budgets, key=lambda text: 1 / int(text.split("/")[1]))
    assert fresh.run(f"{TABLE}.querySelectorAll('[aria-sort]').length") == 1


def test_grids_open_with_a_key(fresh: Browser) -> None:
    fresh.run("document.querySelectorAll('#images summary')[1].focus()")
    assert not fresh.run("document.querySelectorAll('#images details')[1].open")
    fresh.press("Enter")
    assert fresh.run("document.querySelectorAll('#images details')[1].open")


def test_without_its_script_the_page_still_has_everything(tab: Browser, page: Path, folder: Folder) -> None:
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(page)
        assert tab.run(f"{TABLE}.tBodies[0].rows.length") == len(folder.result.cells)
        assert tab.run(f"{TABLE}.querySelectorAll('button').length") == 0
        # A filter that could do nothing is not shown.
        assert tab.run("document.querySelector('.tools').checkVisibility()") is False
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)
