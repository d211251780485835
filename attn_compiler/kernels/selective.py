"""Selective attention as an operator; import this file to have it.

    attn_compiler::selective_attention(q, k, v, reads, ints, seed, selector, gate, carry, *,
        program, scale, dropout, head, select_from) -> (out, lse, state)

    out = softmax(score - gate * F) v,     F[b,i,j] = sum over r < i of relu(z*[b,r,j])

The first six arguments, the program, scale and dropout are those of attn_compiler::attention; the
program is causal, and what forbids keys stands in its mask. F is shared by all heads.

select_from   "qk": z* without additive biases, "logits": with them
head          the query head whose logits are z*
selector      [] or [q* [B, 1, T, e], k* [B, 1, S, e]], whose logits are z* instead, with reads and
              mask as `head` has them
gate          one number, None for 1
carry         [B, P]: F in row 0 of the P keys before it, None for P = 0; row i stands at key P + i
state         [B, S]: the same for the rows that follow: F >= 0, or -1 for a key that nobody may
              mask, because it saw nothing but itself

Only `out` has a gradient; gate, carry and the selector get one.

`reference` is the specification: it builds F.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels import attention as composite
from attn_compiler.kernels import devices, selective_paths
from attn_compiler.kernels.derivatives import derive
from attn_compiler.kernels.frame import Inputs, accumulator, empty_heads, empty_lse, in_heads_layout
from attn_compiler.kernels.masking import PROTECTED
from attn_compiler.kernels.schema import LIBRARY, check
from attn_compiler.kernels.selection import Selection

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor[] reads, SymInt[] ints, Tensor? seed, "
    "Tensor[] selector, Tensor? gate, Tensor? carry"
)
_OPTIONS = "*, str program, float scale, float dropout, int head, str select_from"
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    f"selective_attention({_ARGUMENTS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor state)",
    tags=_TAGS,
)
LIBRARY.define(
    f"selective_attention_backward(Tensor grad_out, {_ARGUMENTS}, Tensor out, Tensor lse, "
    f"Tensor state, bool[] needs, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
selective_attention = torch.ops.attn_compiler.selective_attention.default
selective_attention_backward = torch.ops.attn_compiler.selective_attention_backward.default


def selection_of(*args: Any, head: int, select_from: str, **kwargs: Any) -> Selection:
    """The arguments of the operator as one record.

    Raises:
        UnsupportedCall: they do not belong together.
    """
    *six, selector, gate, carry = args
    found = Selection(Inputs.of(*six, **kwargs), selector, gate, carry, head, select_from)
    check(*found.given.qkv, found.given.drop)
    reason = _problem(found)
    if reason:
        raise UnsupportedCall(
            "selective_attention cannot read its arguments",
            why=(reason, f"given: q {tuple(six[0].shape)}, k {tuple(six[1].shape)}, head {head}"),
            do="see attn_compiler.kernels.selective",
        )
    return found


def _problem(found: Selection) -> str:
    q, k, _ = found.given.qkv
    if not 0 <= found.head < q.shape[1]:
        return "head is the number of a query head"
    if found.select_from not in ("qk", "logits"):
        return "select_from is qk or logits"
    if found.gate is not None and found.gate.numel() != 1:
        return "gate is one number"
    if found.carry is not None and (
        found.carry.dim() != 2
        or found.carry.shape[0] != q.shape[0]
        or found.carry.shape[1] > k.shape[2]
    ):
        return "carry is [batch, keys before row 0]"
    return _selector_problem(found.selector, q, k)


def _selector_problem(selector: Sequence[Tensor], q: Tensor, k: Tensor) -> str:
    if not selector:
        return ""
    shapes = [x.shape for x in selector]
    wanted = [(x.shape[0], 1, x.shape[2]) for x in (q, k)]
    if (
        len(shapes) != 2
        or [tuple(s[:3]) for s in shapes] != wanted
        or shapes[0]
        != (
            *wanted[0],
            shapes[1][3],
        )
    ):
        return "selector is empty, or a query and a key of one head"
    return ""


# ---------------------------------------------------------------- the specification


def masking(selection: Selection) -> tuple[Tensor, Tensor]:
    """F [B, T, S] and the state [B, S] in plain PyTorch, differentiable."""
    alone, past = selection.alone, selection.past
    (batch, _, length, _), keys = alone.q.shape, alone.k.shape[2]
    dtype, device, program = alone.dtype, alone.q.device, Program.parse(alone.program)
    env: dict[str, Any] = {"B": batch, "T": length, "S": keys}
    for i, (name, size) in enumerate((("b", batch), ("q", length), ("k", keys))):
        env[name] = torch.arange(size, device=device).view((-1,) + (1,) * ((3, 1, 0)[i]))
    dot = alone.q.to(dtype) @ alone.k.to(dtype).transpose(-1, -2) * alone.scale
    z = evaluate(program.score, env, alone.reads, alone.ints, dot, dtype).to(dtype)
    allowed = evaluate(program.mask, env, alone.reads, alone.ints).to(device).bool()
    z, allowed = (x.expand(batch, 1, length, keys).squeeze(1) for x in (z, allowed))
    allowed = allowed & (env["k"] < env["q"] + past)
    before = dot.new_zeros(batch, 0) if selection.carry is None else selection.carry.to(dtype)
    alone_at = torch.zeros(batch, keys + length, dtype=torch.bool, device=device)
    alone_at[:, :past] = before < 0
    alone_at[:, past : past + length] = ~allowed.any(-1)
    protected = alone_at[:, :keys]
    chosen = torch.where(allowed & ~protected.unsqueeze(1), torch.relu(z), 0.0)
    start = torch.nn.functional.pad(before.clamp(min=0), (0, keys - past))
    sums = torch.cat([start.unsqueeze(1), chosen], 1).cumsum(1)
    return sums[:, :-1], sums[:, -1].masked_fill(protected, PROTECTED)


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch, differentiable to any order; same arguments and results."""
    selection = selection_of(*args, **kwargs)
    with devices.full_precision(args[0].device.type):
        amount, state = masking(selection)
        given = selection.reading(selection.weighed(amount))
        (batch, heads, length, _), keys = given.q.shape, given.k.shape[2]
        dropped = given.drop.dropped((heads, length), (0, batch), (0, length), (0, keys))
        factor = None if dropped is None else (~dropped).to(given.dtype) * given.drop.gain
        out, lse = composite.reference(
            *given.qkv, given.reads, given.ints, given.program, given.scale, factor
        )
    return out, lse, state


# ---------------------------------------------------------------- the operator


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    with devices.full_precision(args[0].device.type):
        return selective_paths.forward(selection_of(*args, **kwargs))


def _backward(grad_out: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    *own, out, lse, _, needs = args
    with devices.full_precision(grad_out.device.type):
        selection = selection_of(*own, **kwargs)
        count, wanted = len(selection.given.reads), iter(needs)
        reads = [i for i in range(count) if next(wanted)]
        found = selective_paths.backward(selection, grad_out, (out, lse), reads)
        qkv = [
            in_heads_layout(g, x.dtype)
            for g, x in zip((found.q, found.k, found.v), selection.given.qkv, strict=True)
        ]
        rest = [found.reads[i].to(selection.given.reads[i].dtype) for i in reads]
        if selection.given.drop.seed is not None:
            next(wanted)
        for grad, x in zip(found.selector, selection.selector, strict=True):
            if next(wanted):
                rest.append(grad.to(x.dtype))
        if selection.gate is not None and next(wanted):
            rest.append(found.gate.to(selection.gate.dtype).reshape(selection.gate.shape))
        if selection.carry is not None and next(wanted):
            carry = found.carry[:, : selection.past].masked_fill(selection.carry < 0, 0.0)
            rest.append(carry.to(selection.carry.dtype))
    return [*qkv, *rest]


LIBRARY.impl("selective_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("selective_attention_backward", _backward, "CompositeExplicitAutograd")
derive(
    selective_attention,
    selective_attention_backward,
    reference=reference,
    always=3,
    kernels=(_forward, _backward),
)


@torch.library.register_fake("attn_compiler::selective_attention", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(q, k, v)
    lse = empty_lse(q, dtype)
    state = k.new_empty((k.shape[0], k.shape[2]), dtype=dtype)
    return empty_heads(v, (*q.shape[:3], v.shape[-1])), lse, state


@torch.library.register_fake("attn_compiler::selective_attention_backward", lib=LIBRARY)
def _fake_backward(grad_out: Tensor, *args: Any, **_: Any) -> list[Tensor]:
    q, k, v, reads, _ints, seed, selector, gate, carry, *_rest, needs = args
    rest = [*reads, seed, *selector, gate, carry]
    tensors = [x for x in rest if x is not None]
    wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
    return [
        *(empty_heads(x, x.shape) for x in (q, k, v)),
        *(x.new_empty(x.shape) for x in wanted),
    ]


# ---------------------------------------------------------------- samples


def samples() -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(operator, args, kwargs) for both operators and every option, small, on the CPU."""
    draw = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def heads(number: int, length: int, width: int) -> Tensor:
        return tensor(2, length, number, width).transpose(1, 2).requires_grad_()

    slopes = tensor(4).abs().requires_grad_()
    gate, carry = torch.zeros(1, requires_grad=True), tensor(2, 2).abs()
    causal = "score: dot; mask: (k <= q); empty: any"
    late = "score: dot; mask: (k <= q + (S - T)); empty: any"
    biased = "score: dot - t0[h] * float(q - k); mask: (k <= q); empty: any"
    capped = "score: 5.0 * tanh(dot / 5.0); mask: (k <= q) & (k > q - n0); empty: any"
    calls: list[dict[str, Any]] = [
        {},
        {"program": capped, "ints": [3], "head": 2},
        {"program": biased, "reads": [slopes], "select_from": "logits", "gate": gate},
        {"selector": [heads(1, 7, 3), heads(1, 7, 3)], "dropout": 0.25, "seed": torch.tensor([3])},
        {"program": late, "length": 5, "carry": carry},
        {"dtype": torch.bfloat16},
    ]
    for call in calls:
        length, dtype = call.pop("length", 7), call.pop("dtype", torch.float32)
        sizes = ((4, length, 8), (2, 7, 8), (2, 7, 6))
        q, k, v = (heads(*size).to(dtype).detach().requires_grad_() for size in sizes)
        options = {"program": causal, "dropout": 0.0, "head": 0, "select_from": "qk"} | call
        names: dict[str, Any] = {
            "reads": [],
            "ints": [],
            "seed": None,
            "selector": [],
            "gate": None,
            "carry": None,
        }
        args = (q, k, v, *(options.pop(name, usual) for name, usual in names.items()))
        options["scale"] = 0.35
        yield selective_attention, args, options
        with torch.no_grad():
            results = selective_attention(*args, **options)
        yield selective_attention_backward, *_backward_sample(args, results), options


def _backward_sample(args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[tuple[Any, ...]]:
    plain = [
        [x.detach() for x in a] if isinstance(a, list) and a and isinstance(a[0], Tensor)
        else a.detach() if isinstance(a, Tensor)
        else a
        for a in args
    ]  # fmt: skip
    _, _, _, reads, _, seed, selector, gate, carry = args
    needs = [x.requires_grad for x in (*reads, seed, *selector, gate, carry) if x is not None]
    return ((torch.ones_like(results[0]), *plain, *results, needs),)
