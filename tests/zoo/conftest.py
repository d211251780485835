"""What all sweeps of this folder share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _graphs_are_kept() -> Iterator[None]:
    """Who listens to the log is shown the graphs: `claims.accepted` looks into them."""
    log = logging.getLogger("attn_compiler")
    level, log.propagate = log.level, False
    log.setLevel(logging.DEBUG)
    yield
    log.setLevel(level)
    log.propagate = True
