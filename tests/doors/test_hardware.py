"""What a report says about hardware that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as ac


class Attention(nn.Module):
    def __init__(self, cap: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.cap = nn.Linear(64, 192), cap

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / 4
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(above, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


X = torch.randn(2, 128, 64)


def test_the_source_of_a_kernel_is_in_the_report() -> None:
    report = ac.explain(Attention(5.0), (X,), hardware="h200")
    (site,) = report.sites
    assert site.decision.tile is not None and site.decision.predicted_seconds > 0
    (forward,) = (text for name, text in report.kernels.items() if name.startswith("forward"))
    assert "@triton.jit" in forward and "_tanh" in forward
    compile(forward, "forward", "exec")
    assert "runs on triton" in str(report) and "us predicted" in str(report)
    assert forward in json.loads(report.to_json())["kernels"].values()


def test_pytorchs_kernel_where_it_is_expected_to_be_faster() -> None:
    report = ac.explain(Attention().bfloat16(), (X.bfloat16(),), hardware="h200")
    assert report.sites[0].facts["kernel"] == "cudnn" and not report.kernels


def test_a_mask_that_is_only_nearly_causal_is_not_given_to_pytorchs_kernel() -> None:
    class Prefix(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            above[:, :5] = False
            scores = (q @ k.transpose(-1, -2) / 4).masked_fill(above, float("-inf"))
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    (site,) = ac.explain(Prefix().bfloat16(), (X.bfloat16(),), hardware="h200").sites
    assert site.decision.accepted and site.facts["kernel"] == "triton"


@pytest.mark.parametrize(("name", "words"), [("t4", "no matrix units"), ("v100", "sm_70")])
def test_why_there_is_no_kernel(name: str, words: str) -> None:
    report = ac.explain(Attention(5.0), (X,), hardware=name)
    assert words in report.sites[0].facts["kernel"] and not report.kernels
    assert report.sites[0].decision.accepted


def test_nothing_is_predicted_unasked_on_a_cpu() -> None:
    (site,) = ac.explain(Attention(), (X,)).sites
    assert site.decision.predicted_seconds is None and "kernel" not in site.facts
    (site,) = ac.explain(Attention(), (X,), hardware="cpu").sites
    assert site.decision.predicted_seconds is not None and site.facts["kernel"] == "sdpa"


@pytest.mark.parametrize("hardware", ["cpu", "h200"])
def test_a_decision_says_how_long_and_why(hardware: str) -> None:
    report = ac.explain(Attention(5.0), (X,), to="fastest", hardware=hardware)
    (site,) = report.sites
    decision = site.decision
    assert decision.predicted_seconds > 0 and decision.limit
    assert f"us predicted, bounded by {decision.limit}" in str(report)
    assert json.loads(report.to_json())["sites"][0]["decision"]["limit"] == decision.limit
    drawn = report.roofline
    assert drawn is not None and drawn.hardware == hardware
    (point,) = drawn.points
    assert point.limit == decision.limit and 0 < point.rate <= drawn.peak
    assert (report + report).roofline.points == (point, point)
    assert ac.explain(Attention(), (X,)).roofline is None


def test_an_unknown_name() -> None:
    with pytest.raises(ac.BadOption, match="did you mean h200"):
        ac.explain(Attention(), (X,), hardware="h20")
