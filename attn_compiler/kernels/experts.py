"""Projections by experts, chosen and weighed for every token, as two operators.

    expert_project(x, w, index, gate)    out[b, h, t] = sum_j gate[b, t, h, j] x[b, t] @ W
    expert_merge(o, w, index, gate)      out[b, t] = sum_h sum_j gate[b, t, h, j] o[b, h, t] @ W

with W = w[h E + index[b, t, h, j]]; or w[index[b, t, h, j]] where w has only E matrices, which all
heads share. x [B, T, D], o [B, H, T, c]; index and gate [B, T, H, k], k experts of a head for a
token. The result of expert_project lies in memory as [B, T, H, c].

Source: SwitchHead (arXiv 2312.07987v3), equations 9 and 10.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import expert_forms as forms
from attn_compiler.kernels import experts_triton, gpu
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.devices import full_precision, under_autocast
from attn_compiler.kernels.expert_forms import Routed
from attn_compiler.kernels.frame import accumulator, empty_heads, in_heads_layout
from attn_compiler.kernels.schema import LIBRARY

_TAGS = (torch.Tag.pt2_compliant_tag,)
for _name, _rows in (("expert_project", "x"), ("expert_merge", "o")):
    _routed = f"Tensor {_rows}, Tensor w, Tensor index, Tensor gate"
    LIBRARY.define(f"{_name}({_routed}, *, int experts) -> Tensor", tags=_TAGS)
    LIBRARY.define(
        f"{_name}_backward(Tensor grad_out, {_routed}, Tensor out, bool[] needs, *, int experts) "
        "-> Tensor[]",
        tags=_TAGS,
    )
expert_project = torch.ops.attn_compiler.expert_project.default
expert_project_backward = torch.ops.attn_compiler.expert_project_backward.default
expert_merge = torch.ops.attn_compiler.expert_merge.default
expert_merge_backward = torch.ops.attn_compiler.expert_merge_backward.default


def check(name: str, rows: Tensor, w: Tensor, index: Tensor, gate: Tensor, experts: int) -> None:
    """Refuse arguments that no kernel can read.

    Raises:
        UnsupportedCall: shapes or dtypes that do not belong together.
    """
    reason = _problem(name == "expert_merge", rows, w, index, gate, experts)
    if reason:
        shapes = ", ".join(str(tuple(t.shape)) for t in (rows, w, index, gate))
        raise UnsupportedCall(
            f"{name} cannot read its arguments",
            why=(reason, f"given: {shapes}, {experts} experts"),
            do="hand over rows, weights [experts, in, out], and routes [batch, rows, heads, k]",
        )


def _problem(
    merge: bool, rows: Tensor, w: Tensor, index: Tensor, gate: Tensor, experts: int
) -> str:
    if index.dim() != 4 or index.shape != gate.shape:
        return "index and gate have the same four dimensions: batch, rows, heads, k"
    batch, length, heads, _ = index.shape
    expected = (batch, heads, length) if merge else (batch, length)
    if rows.dim() != len(expected) + 1 or rows.shape[:-1] != expected:
        return "rows have the batch and the length of the routes, and their heads if merged"
    if w.dim() != 3 or w.shape[1] != rows.shape[-1]:
        return "weights have three dimensions: experts, features that go in, features that come out"
    if experts < 1 or w.shape[0] not in (experts, heads * experts):
        return "there are so many matrices as a head has experts, or that many for each head"
    if index.is_floating_point() or index.dtype is torch.bool:
        return "index holds integers"
    if rows.dtype != w.dtype or not rows.is_floating_point() or not gate.is_floating_point():
        return "rows and weights have one floating dtype, and gates have one"
    return ""


def in_one_dtype(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weights as autocast hands them to other projections."""
    device = x.device.type
    if x.dtype is torch.float64 or not under_autocast(device):
        return x, w
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), w.to(dtype)


# ---------------------------------------------------------------- the specification


def reference_project(x: Tensor, w: Tensor, index: Tensor, gate: Tensor, *, experts: int) -> Tensor:
    """expert_project in plain PyTorch, differentiable to any order: [B, H, T, c]."""
    check("expert_project", x, w, index, gate, experts)
    with full_precision(x.device.type):
        weight, dense, dtype = _plain(x, w, index, gate, experts)
        each = torch.einsum("btd,hedc->bthec", x.to(dtype), weight)
        return torch.einsum("bthec,bthe->bhtc", each, dense).to(x.dtype)


def reference_merge(o: Tensor, w: Tensor, index: Tensor, gate: Tensor, *, experts: int) -> Tensor:
    """expert_merge in plain PyTorch, differentiable to any order: [B, T, D]."""
    check("expert_merge", o, w, index, gate, experts)
    with full_precision(o.device.type):
        weight, dense, dtype = _plain(o, w, index, gate, experts)
        each = torch.einsum("bhtc,bthe->bthec", o.to(dtype), dense)
        return torch.einsum("bthec,hecd->btd", each, weight).to(o.dtype)


def _plain(
    rows: Tensor, w: Tensor, index: Tensor, gate: Tensor, experts: int
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Weights [H, E, in, out], gates [B, T, H, E] with 0 for what was not chosen, and the dtype."""
    dtype = accumulator(rows, w, gate)
    heads = index.shape[2]
    weight = w.to(dtype).unflatten(0, (-1, experts)).expand(heads, -1, -1, -1)
    empty = gate.new_zeros(*index.shape[:3], experts, dtype=dtype)
    return weight, empty.scatter_add(3, index.to(torch.int64), gate.to(dtype)), dtype


# ---------------------------------------------------------------- the implementation


def _call(merge: bool, given: Sequence[Tensor], experts: int) -> Routed:
    rows, w, index, gate = given
    check("expert_merge" if merge else "expert_project", rows, w, index, gate, experts)
    flat = (rows.transpose(1, 2) if merge else rows).reshape(-1, rows.shape[-1])
    return Routed(flat, w, index.flatten(0, 1), gate.flatten(0, 1), experts, merge)


def runs_triton(call: Routed) -> bool:
    """Do the generated kernels compute this call?"""
    device = call.a.device
    if device.type != "cuda" or experts_triton.refusal(call):
        return False
    return bool(gpu.family(device))


def _forward(call: Routed) -> Tensor:
    return experts_triton.forward(call) if runs_triton(call) else forms.forward(call)


def _project(x: Tensor, w: Tensor, index: Tensor, gate: Tensor, *, experts: int) -> Tensor:
    """expert_project, without derivatives."""
    call = _call(False, (x, w, index, gate), experts)
    with full_precision(x.device.type):
        out = _forward(call).to(x.dtype)
    return out.view(*index.shape[:3], w.shape[2]).transpose(1, 2)


def _merge(o: Tensor, w: Tensor, index: Tensor, gate: Tensor, *, experts: int) -> Tensor:
    """expert_merge, without derivatives."""
    call = _call(True, (o, w, index, gate), experts)
    with full_precision(o.device.type):
        out = _forward(call).to(o.dtype)
    return out.view(*index.shape[:2], w.shape[2])


def _project_backward(grad_out: Tensor, *args: Any, experts: int) -> list[Tensor]:
    """expert_project_backward, without derivatives."""
    *given, _, needs = args
    return _backward(_call(False, given, experts), grad_out.transpose(1, 2), given, needs)


def _merge_backward(grad_out: Tensor, *args: Any, experts: int) -> list[Tensor]:
    """expert_merge_backward, without derivatives."""
    *given, _, needs = args
    return _backward(_call(True, given, experts), grad_out, given, needs)


def _backward(
    call: Routed, grad: Tensor, given: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    rows, w, _, gate = given
    above = grad.reshape(call.rows, w.shape[2]).to(rows.dtype)
    kernels = experts_triton if runs_triton(call) else forms
    with full_precision(rows.device.type):
        found = kernels.backward(call, above, (needs[0], needs[1], needs[3]))
    d_rows, d_w, d_gate = found
    result = []
    if d_rows is not None:
        if call.merge:
            d_rows = d_rows.view(rows.transpose(1, 2).shape).transpose(1, 2)
            result.append(in_heads_layout(d_rows, rows.dtype))
        else:
            result.append(d_rows.to(rows.dtype).view(rows.shape))
    if d_w is not None:
        result.append(d_w.to(w.dtype))
    if d_gate is not None:
        result.append(d_gate.to(gate.dtype).view(gate.shape))
    return result


LIBRARY.impl("expert_project", _project, "CompositeExplicitAutograd")
LIBRARY.impl("expert_merge", _merge, "CompositeExplicitAutograd")
LIBRARY.impl("expert_project_backward", _project_backward, "CompositeExplicitAutograd")
LIBRARY.impl("expert_merge_backward", _merge_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("attn_compiler::expert_project", lib=LIBRARY)
def _fake_project(x: Tensor, w: Tensor, index: Tensor, gate: Tensor, *, experts: int) -> Tensor:
    check("expert_project", x, w, index, gate, experts)
    batch, length, heads, _ = index.shape
    return empty_heads(x, (batch, heads, length, w.shape[2]))


@torch.library.register_fake("attn_compiler::expert_merge", lib=LIBRARY)
def _fake_merge(o: Tensor, w: Tensor, index: Tensor, gate: Tensor, *, experts: int) -> Tensor:
    check("expert_merge", o, w, index, gate, experts)
    return o.new_empty((*index.shape[:2], w.shape[2]))


def _fake_backward(grad_out: Tensor, *args: Any, experts: int) -> list[Tensor]:
    rows, w, _, gate, _, needs = args
    likes = (
        empty_heads(rows, rows.shape) if rows.dim() == 4 else rows.new_empty(rows.shape),
        w.new_empty(w.shape),
        gate.new_empty(gate.shape),
    )
    return [x for x, need in zip(likes, (needs[0], needs[1], needs[3]), strict=True) if need]


for _name in ("expert_project_backward", "expert_merge_backward"):
    torch.library.register_fake(f"attn_compiler::{_name}", _fake_backward, lib=LIBRARY)

derive(
    expert_project,
    expert_project_backward,
    reference=reference_project,
    kernels=(_project, _project_backward),
)
derive(
    expert_merge,
    expert_merge_backward,
    reference=reference_merge,
    kernels=(_merge, _merge_backward),
)


# ---------------------------------------------------------------- flops


def _flops(rows: Any, w: Sequence[int], index: Sequence[int], *_: Any, **__: Any) -> int:
    """A product for every route, and its gate on the narrower side."""
    batch, length, heads, k = index
    return 2 * batch * length * heads * k * (w[1] * w[2] + min(w[1:]))


def _flops_backward(grad: Any, rows: Any, w: Any, index: Any, *_: Any, **kwargs: Any) -> int:
    """The products for the rows and for the weights."""
    return 2 * _flops(rows, w, index)


def register_flops() -> None:
    """Make `FlopCounterMode` count the operators, if its module was imported; may be repeated."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or expert_project.overloadpacket in counter.flop_registry:
        return
    for operator in (expert_project, expert_merge):
        counter.register_flop_formula(operator.overloadpacket)(_flops)
    for operator in (expert_project_backward, expert_merge_backward):
        counter.register_flop_formula(operator.overloadpacket)(_flops_backward)


register_flops()


# ---------------------------------------------------------------- samples


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) of both operators and their backwards, small, on the CPU."""
    draw = torch.Generator().manual_seed(3)
    # sorted, and not; experts of each head, and of all
    sizes = ((2, 7, 3, 5, 2, False), (2, 5, 3, 2, 2, True))
    for (batch, length, heads, experts, k, shared), dtype in zip(
        sizes, (torch.float32, torch.bfloat16), strict=True
    ):
        scores = torch.rand(batch, length, heads, experts, generator=draw)
        index = scores.topk(k, -1).indices.to(torch.int32)
        gate = torch.rand(index.shape, generator=draw).requires_grad_()
        number = experts if shared else heads * experts
        for operator, shape, width in (
            (expert_project, (batch, length, 11), (11, 3)),
            (expert_merge, (batch, length, heads, 3), (3, 11)),
        ):
            rows = torch.randn(shape, generator=draw)
            rows = rows.transpose(1, 2) if rows.dim() == 4 else rows
            w = torch.randn(number, *width, generator=draw)
            args = (*(t.to(dtype).requires_grad_() for t in (rows, w)), index, gate)
            kwargs = {"experts": experts}
            yield operator, args, kwargs
            plain = [t.detach() for t in args]
            out = operator(*plain, **kwargs)
            backward = (
                expert_project_backward if operator is expert_project else expert_merge_backward
            )
            inputs = (torch.ones_like(out), *plain, out, [True, True, False, True])
            yield backward, inputs, kwargs
