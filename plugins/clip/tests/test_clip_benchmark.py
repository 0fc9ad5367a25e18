"""The loops that caption-pgd is timed against: they do what they say, and alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advplug.contracts import Batch
from conftest import benchmark_module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with benchmark_module("clip") as module:
        yield module


@pytest.fixture(scope="module")
def small(benchmark: Any) -> Any:
    return benchmark.task("clip-tiny:task=retrieval,epochs=1", "digit-scenes:train=64,n=12", 12)


def test_similarities_are_the_victims(benchmark: Any, small: Any) -> None:
    batch: Batch = small.batch
    columns = small.victim.columns
    expected = columns.similarity(small.victim.cosines(batch.x), batch.y)
    torch.testing.assert_close(benchmark.similarities(small, batch.x), expected, atol=1e-5, rtol=0)


def test_both_loops_take_the_same_step_and_ours_goes_as_low(benchmark: Any, small: Any) -> None:
    flags = [p.requires_grad for p in small.scorer.parameters()]
    careful, plain = benchmark.careful(small, 1, 0), benchmark.plain(small, 1, 0)
    assert (careful - plain).abs().gt(1e-6).float().mean() < 0.01
    assert not torch.equal(careful, benchmark.careful(small, 1, 1)), "another start each time"
    clean = benchmark.similarities(small, small.batch.x)
    left = {}
    for name, run in benchmark.VARIANTS.items():
        x = run(small, 10, 0)
        benchmark.demand_inside(small, x, name)
        left[name] = benchmark.similarities(small, x)
        assert (left[name] < clean).all()
    means = np.array([v.mean().item() for v in left.values()])
    assert np.ptp(means) < 0.1 * (clean.mean().item() - means.max())
    assert [p.requires_grad for p in small.scorer.parameters()] == flags
    with pytest.raises(SystemExit, match="left its budget"):
        benchmark.demand_inside(small, small.batch.x + 0.1, "a bad one")


def test_what_is_written_and_when_a_bar_is_missed(
    benchmark: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.json"
    monkeypatch.setattr(benchmark, "task", lambda *_: small)
    monkeypatch.setattr(benchmark, "STEPS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["clip.py", "--quick", "--output", str(out)])
    benchmark.main()
    written = json.loads(out.read_text())
    assert [r["variant"] for r in written["variants"]] == [benchmark.OURS, benchmark.CAREFUL, benchmark.PLAIN]
    assert len(written["bars"]) == 4
    assert "mean cosine above" in capsys.readouterr().out
    rows = [{"variant": v, "seconds": s, "cpu": s, "cosine": c, "all seconds": [s, 2 * s], "all cpu": [s, 2 * s]}
            for v, s, c in zip(benchmark.VARIANTS, (1.0, 0.9, 1.5), (0.3, 0.3, 0.29), strict=True)]  # fmt: skip
    bars = benchmark.judge(rows)
    assert [b["holds"] for b in bars] == [False, True, True, False]
    assert benchmark.render(0.7, rows, bars).count("MISSED") == 2
