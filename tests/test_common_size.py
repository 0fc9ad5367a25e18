"""Few batch sizes: prepared kernels are kept for each."""

from __future__ import annotations

import pytest

from advplug.victim import common_parts, common_size


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 100, 128])
def test_sizes_hold_the_images_and_are_few(most: int) -> None:
    sizes = {n: common_size(n, most) for n in range(1, most + 1)}
    assert all(n <= size <= most for n, size in sizes.items())
    assert len(set(sizes.values())) <= 6
    assert all(size <= max(2 * n + 1, most // 16) for n, size in sizes.items()), "never twice the work, but at the end"


def test_more_than_a_batch_is_left_alone() -> None:
    assert common_size(200, 128) == 200


@pytest.mark.parametrize("most", [1, 3, 8, 100, 128])
def test_parts_hold_the_images_without_much_waste(most: int) -> None:
    used = set()
    for n in range(1, most + 1):
        parts = common_parts(n, most)
        assert sum(count for count, _ in parts) == n
        assert all(count <= size for count, size in parts)
        assert sum(size for _, size in parts) <= n * 8 / 7 + max(most // 32, most // 8, 1)
        used |= {size for _, size in parts}
    assert len(used) <= 6
