"""A dataset as the command line makes it, read to the end, and what it says where that is impossible."""

from __future__ import annotations

import numpy as np
import pytest

from advplug.contracts import DatasetSource
from advplug.errors import UsageError
from advplug.parse import parse_reference
from advplug.registry import registry


def make(text: str) -> DatasetSource:
    """The dataset of a reference, as the command line makes it."""
    reference = parse_reference(text)
    entry = registry().get("dataset", reference.name)
    made: DatasetSource = entry.make(entry.bind(reference))
    return made


def read_everything(text: str) -> None:
    source = make(text)
    source.info()
    source.fingerprint()
    data = source.load(offline=True)
    for part in (data.train, data.test):
        part.batch(np.arange(len(part)))


def rejects(text: str, *words: str) -> None:
    """`text` ends in one line that holds `words`, at the latest when the images are read."""
    with pytest.raises(UsageError) as caught:
        read_everything(text)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
