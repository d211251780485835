"""The passes on small graphs: what is rewritten, what is refused, and that nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import claims
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attn_compiler as ac
from attn_compiler.backend import attn_compiler

B, H, T, S, D = 2, 3, 5, 7, 4
INF = float("inf")


def compiled(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, ac.Report]:
    torch._dynamo.reset()
    options = {"then": "eager", **options}
    out = torch.compile(function, backend=attn_compiler, options=options, fullgraph=True)(*args)
    return out, ac.last_report()


def qkv(t: int = T, s: int = S) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, t, D), torch.randn(B, H, s, D), torch.randn(B, H, s, D)


def only(report: ac.Report) -> Any:
    assert len(report.sites) == 1, str(report)
    return report.sites[0]


# ---------------------------------------------------------------- soundness


def test_a_mask_written_through_a_view_is_not_dropped() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        later = torch.ones(S, S, dtype=torch.bool).triu(1)
        s.view(B * H, S, S).masked_fill_(later, -INF)
        return s.softmax(-1) @ v

    args = qkv(S, S)
    out, report = compiled(attend, *args)
    assert only(report).mask == "causal" and only(report).decision.accepted
    torch.testing.assert_close(out, attend(*args))


def _added(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    q, k, v = (x[0, 0] * 2 for x in (q, k, v))
    return torch.addmm(q, torch.addmm(gate[0, 0], q, k.T).softmax(-1), v)


def _gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * gate) @ v


def _three(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd,bhx->bthd", (q @ k.mT).softmax(-1), v, gate[..., 0])


@pytest.mark.parametrize("attend", [_added, _gated, _three])
def test_compound_products_keep_dtype_and_strides(attend: Callable[..., Tensor]) -> None:
    args = (*qkv(S, S), torch.rand(B, H, 1, 1))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, report = compiled(attend, *args)
            wanted = attend(*args)
        assert only(report).decision.accepted
        found = claims.gap("out", out, wanted, attend(*claims.double(args)))
        assert found.ok and out.stride() == wanted.stride(), found


def test_an_item_assigned_is_not_dropped() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        s[..., 0] = -INF
        return s.softmax(-1) @ v

    args = qkv()
    out, report = compiled(attend, *args)
    assert only(report).decision.accepted
    torch.testing.assert_close(out, attend(*args))


def test_a_cache_written_in_place_stays_written() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        cache.index_copy_(2, at, k)
        return (q @ cache.transpose(-1, -2)).softmax(-1) @ v

    q, _, v = qkv()
    k, at, cache = torch.randn(B, H, 2, D), torch.tensor([1, 4]), torch.randn(B, H, S, D)
    mine = cache.clone()
    expected = attend(q, k, v, cache, at)
    out, report = compiled(attend, q, k, v, mine, at)
    assert only(report).decision.accepted
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mine, cache, rtol=0, atol=0)


def test_an_operand_overwritten_afterwards_keeps_its_gradient_right() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k * 2
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        k.zero_()
        return out + k.sum()

    args = [x.requires_grad_() for x in qkv()]
    # the original cannot even be differentiated: its backward needs what was overwritten
    with torch.no_grad():
        expected = attend(*args)
        out, _ = compiled(attend, *args)
    torch.testing.assert_close(out, expected)


def test_gradients_do_not_pass_a_detach() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.detach().transpose(-1, -2)).softmax(-1) @ v

    q, k, v = (x.requires_grad_() for x in qkv())
    out, report = compiled(attend, q, k, v)
    assert only(report).decision.accepted
    out.sum().backward()
    assert k.grad is None and q.grad is not None


def test_values_made_without_gradients_stay_without() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = k.transpose(-1, -2)
        return (q @ frozen).softmax(-1) @ v

    q, k, v = (x.requires_grad_() for x in qkv())
    out, _ = compiled(attend, q, k, v)
    out.sum().backward()
    assert k.grad is None


# ---------------------------------------------------------------- readers of inner tensors


@pytest.mark.parametrize("inner", ["scores", "weights"])
def test_a_second_reader_stops_the_rewrite(inner: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.transpose(-1, -2)
        p = s.softmax(-1)
        return p @ v, s.sum() if inner == "scores" else p

    args = qkv()
    out, report = compiled(attend, *args)
    decision = only(report).decision
    assert not decision.accepted
    assert [r.code for r in decision.reasons] == ["attention.second_reader"]
    assert inner in decision.reasons[0].text
    torch.testing.assert_close(out, attend(*args))


def test_who_reads_for_nobody_is_no_reader() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        before = s.clone()
        p = s.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        _ = (before.amax(-1), entropy.mean().sqrt())
        return p @ v

    args = qkv()
    out, report = compiled(attend, *args)
    assert only(report).decision.accepted
    torch.testing.assert_close(out, attend(*args))


def test_a_write_that_nobody_but_the_caller_reads_is_read() -> None:
    kept = torch.zeros(())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        kept.copy_(s.detach().amax())
        return s.softmax(-1) @ v

    args = qkv()
    out, report = compiled(attend, *args)
    assert not only(report).decision.accepted
    torch.testing.assert_close(out, attend(*args))
    torch.testing.assert_close(kept, (args[0] @ args[1].mT).amax())


def test_one_mask_for_all_layers_is_made_once_or_not_at_all() -> None:
    def model(x: Tensor) -> Tensor:
        mask = torch.full((T, T), -INF).triu(1)
        for _ in range(3):
            x = (x @ x.transpose(-1, -2) + mask).softmax(-1) @ x
        return x

    x = torch.randn(B, H, T, D)
    out, report = compiled(model, x)
    assert [str(s.mask) for s in report.sites] == ["causal"] * 3
    torch.testing.assert_close(out, model(x))


# ---------------------------------------------------------------- facts


def test_scale_and_mask_become_facts_of_the_site() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = (q / 2) @ k.transpose(-1, -2) * 0.5
        s = s.masked_fill(~keep[:, None, None, :], torch.finfo(s.dtype).min)
        return F.dropout(s.softmax(-1), 0.0) @ v

    keep = torch.ones(B, S, dtype=torch.bool)
    keep[1, :3] = False
    args = (*qkv(), keep)
    out, report = compiled(attend, *args)
    site = only(report)
    assert site.mask == "padding(keep)"
    assert (site.scale, site.query_heads, site.kv_heads, site.head_dim) == (0.25, H, H, D)
    torch.testing.assert_close(out, attend(*args))


def test_a_row_without_keys_is_what_it_was() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        return (s + torch.where(keep[:, None, None], 0.0, torch.finfo(s.dtype).min)).softmax(-1) @ v

    keep = torch.zeros(B, S, dtype=torch.bool)
    keep[1, 2] = True
    args = (*qkv(), keep)
    out, report = compiled(attend, *args)
    assert only(report).program.empty == "absorbed"
    torch.testing.assert_close(out, attend(*args))
    torch.testing.assert_close(out[0], args[2][0].mean(1, keepdim=True).expand(H, T, D))


def test_a_fill_that_the_softmax_cannot_hold_is_infinite() -> None:
    """What float64 calls its lowest number, float32 calls -inf."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        fill = torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, torch.finfo(s.dtype).min)
        s = s + fill[:, None, None]
        return s.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    keep = torch.zeros(B, S, dtype=torch.bool)
    keep[1, 2] = True
    args = (*(x.double() for x in qkv()), keep)
    out, report = compiled(attend, *args)
    assert only(report).decision.accepted
    torch.testing.assert_close(out, attend(*args), equal_nan=True)


def test_two_finite_fills_that_overlap_stay_arithmetic() -> None:
    """Set and then added: keys forbidden twice fall below those forbidden once."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        lowest = torch.finfo(q.dtype).min
        s = q @ k.transpose(-1, -2)
        s = s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), lowest)
        return (s + torch.where(keep[:, None, None], 0.0, lowest)).softmax(-1) @ v

    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :4] = False
    args = (*qkv(S, S), keep)
    out, _ = compiled(attend, *args)
    torch.testing.assert_close(out, attend(*args))


# ---------------------------------------------------------------- doors


def test_kept_where_no_pattern_names_it() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    _, report = compiled(attend, *qkv(), to={"decoder.*": ac.Flash()})
    assert [r.code for r in only(report).decision.reasons] == ["config.not_selected"]


def test_on_reject_raise_names_the_site() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.transpose(-1, -2)).softmax(-1)
        return p @ v, p

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(attend, *qkv(), on_reject="raise")
    assert isinstance(caught.value.inner_exception, ac.NoLegalVariant)
    assert "attention.second_reader" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"too": "fastest"},
        {"to": "fast"},
        {"hardware": "h2000"},
        {"on_reject": "ignore"},
        {"then": "jax"},
        {"inductor": 3},
    ],
    ids=str,
)
def test_a_wrong_option_is_one_clear_error(options: dict[str, Any]) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(lambda x: x + 1, torch.ones(1), **options)
    error = caught.value.inner_exception
    assert isinstance(error, ac.BadOption) and "do:" in str(error)


def test_a_symbolic_head_dim_without_a_scale_is_a_reason() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    args = qkv()
    for x in args:
        torch._dynamo.mark_dynamic(x, 3)
    out, report = compiled(attend, *args)
    (missed,) = report.missed
    assert missed.code == "attention.scale" and "head dim" in missed.text
    torch.testing.assert_close(out, attend(*args))


def test_a_scripted_function_is_read_through() -> None:
    """It is traced in operations of another namespace."""
    script = torch.jit.CompilationUnit("""
        def soft_cap(scores, cap: float):
            return (scores / cap).tanh() * cap
    """)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return script.soft_cap(q @ k.mT, 5.0).softmax(-1) @ v

    args = qkv()
    new = ac.rewrite(attend, args)
    assert str(only(ac.last_report()).score) == "tanh(dot) * 5.0"
    torch.testing.assert_close(new(*args), attend(*args))
