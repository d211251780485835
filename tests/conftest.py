"""What every test starts from: seeds, a quiet Dynamo, and which machines may run it."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # tests that need a GPU draw no examples
    pass
else:
    # The default run draws the same examples each time; --hypothesis-profile=fuzz draws new ones.
    settings.register_profile(
        "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("fuzz", settings.get_profile("steady"), derandomize=False)
    settings.load_profile("steady")


# pytest listens to every logger that does not propagate, and PyTorch writes its structured trace,
# graphs and guards and all, as soon as somebody listens to this one.
logging.getLogger("torch.__trace").propagate = True
# Dynamo measures the guards of each graph with cold caches: a flush that costs as much as a layer.
torch._C._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
        torch.set_num_threads(1)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs an NVIDIA GPU"
    if os.environ.get("TRITON_INTERPRET") != "1":
        missing["interpret"] = "needs TRITON_INTERPRET=1 from the start of the process"
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # nothing compiled in one test may answer in the next
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
