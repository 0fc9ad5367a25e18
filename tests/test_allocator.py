"""Memory is kept where the C library allows it, and the setting is harmless elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from advplug.allocator import keep_freed_memory, release_freed_memory

COUNT = """
import resource, sys, torch
from advplug.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(25):  # the heap settles
    torch.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="no glibc here")
def test_a_second_tensor_faults_in_no_pages():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert 4 * faults("keep") < faults("leave")


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert release_freed_memory() is False
