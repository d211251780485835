"""An error of ours never breaks the user's model."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import attn_compiler as ac
from attn_compiler import pipeline


def test_the_model_compiles_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1) @ v

    def broken(*_: object) -> None:
        raise KeyError("a rule that is wrong")

    monkeypatch.setattr(pipeline, "recognise", broken)
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    with caplog.at_level(logging.WARNING, logger="attn_compiler"):
        out = torch.compile(attend, backend="attn_compiler", options={"then": "eager"})(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v), rtol=0, atol=0)
    (missed,) = ac.last_report().missed
    assert missed.code == "internal.error"
    assert "please report it: KeyError: 'a rule that is wrong'" in missed.text
    assert missed.location.startswith("test_internal_error.py:")
    assert "left as it is" in caplog.text and "Traceback" in caplog.text
