"""Every public operator has samples, and keeps what an operator promises on them."""

from __future__ import annotations

import pytest
import torch

import attn_compiler as ac
from attn_compiler.kernels.schema import LIBRARY

SAMPLES = list(ac.op_samples())


def test_every_operator_has_samples() -> None:
    named = {str(operator).split(".")[1] for operator, _, _ in SAMPLES}
    defined = {name.split("::")[1].split(".")[0] for name in LIBRARY._op_defs}
    assert named == defined


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_samples_run_and_agree_with_their_fakes(index: int) -> None:
    operator, args, kwargs = SAMPLES[index]
    torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))
