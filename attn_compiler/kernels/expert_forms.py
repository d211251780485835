"""Two ways to multiply rows by the experts that each of them chose, with all gradients.

    out[dst(r)] += gate(r) * a[src(r)] @ w[expert(r)]        over the routes r

"grouped" sorts the routes by expert: one product of gathered rows for each expert, added into
their places. "masked" multiplies all rows by all experts, with gate 0 where one was not chosen:
more arithmetic, no sort, no gather, and nothing that the host has to wait for.

A row of `out` or of `a` is a token, or a token and a head: see `Routed`. Nothing as large as
[routes, D] is ever made: the rows of one expert at a time, or c columns of each route.

Source: the grouping of SwitchHead's and ScatterMoE's kernels (arXiv 2312.07987, 2403.08245), and
their sums over routes pulled into the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.frame import accumulator

# E / k from which "grouped" is faster on a CPU, measured at widths 512 and 1024, heads 64 to 112
# wide. Its gathered and added rows are moved at the same speed in any precision, while products of
# 16 bits run on matrix units; what is added is D wide in a merge, and in a project's backward.
_WORTH_SORTING = {"32 bits": 1.75, "16 bits, narrow": 2.5, "16 bits, wide": 8.0}
# elements of the widest tensor that "masked" makes: what a cache holds, and what fills a GPU
_CHUNK = {"cpu": 2**22}
_LARGE_CHUNK = 2**26

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Routed:
    """One call.

    Attributes:
        a: rows that go in, [N, D] if `merge` is False, else [N H, c].
        w: [H E, in, out]; [E, in, out] if all heads share their experts.
        index: [N, H, k], integers from 0, below E.
        gate: [N, H, k].
        experts: E.
        merge: the rows that come out are tokens, summed over heads, and not heads of tokens.
    """

    a: Tensor
    w: Tensor
    index: Tensor
    gate: Tensor
    experts: int
    merge: bool

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.a, self.w, self.gate)

    @property
    def own(self) -> bool:
        """Has every head experts of its own? One head has, and shares them with nobody."""
        return self.w.shape[0] != self.experts

    @property
    def rows(self) -> int:
        """Of the result."""
        tokens, heads, _ = self.index.shape
        return tokens if self.merge else tokens * heads

    def head(self, expert: int) -> range:
        """The heads that can choose an expert."""
        heads = self.index.shape[1]
        first = expert // self.experts
        return range(first, first + 1) if self.own else range(heads)


def forward(call: Routed) -> Tensor:
    """[rows, out], in the dtype of the sums."""
    return _grouped(call) if _sorts(call, call.merge) else _masked(call)


def backward(call: Routed, grad: Tensor, needs: Sequence[bool]) -> Gradients:
    """Gradients of `a`, `w` and `gate`, those that are needed, in the dtype of the sums.

    Args:
        grad: [rows, out], in the dtype of `a`.
        needs: of a, w and gate.
    """
    form = _grouped_backward if _sorts(call, not call.merge) else _masked_backward
    return form(call, grad, needs)


def _sorts(call: Routed, wide: bool) -> bool:
    """Is "grouped" the better form? `wide`: rows of D columns are added."""
    kind = "32 bits"
    if call.a.dtype.itemsize == 2:
        kind = "16 bits, wide" if wide else "16 bits, narrow"
    tokens, _, k = call.index.shape
    # some are certainly left out: their weights need not even be read
    spared = tokens * k < call.experts
    few = call.experts > _WORTH_SORTING[kind] * k
    return (few or spared) and call.a.device.type == "cpu"


# ---------------------------------------------------------------- grouped


@dataclass(frozen=True, slots=True)
class _Group:
    """The routes of one expert: rows that it reads, rows that it adds to, gates [routes, 1]."""

    expert: int
    first: int
    last: int
    source: Tensor
    target: Tensor
    gate: Tensor


class _Sorted:
    """All routes by expert."""

    def __init__(self, call: Routed) -> None:
        _, heads, k = call.index.shape
        ids = _in_range(call).to(torch.int32)
        if call.own:
            ids = (
                ids
                + torch.arange(0, heads * call.experts, call.experts, dtype=torch.int32)[:, None]
            )
        flat = ids.flatten()
        number = call.w.shape[0]
        # the sort of bytes is several times faster
        narrow = flat.to(torch.uint8) if number <= 256 else flat
        self.order = narrow.argsort(stable=True)
        self._counts = torch.bincount(flat, minlength=number).tolist()
        token, slot = self.order // (heads * k), self.order // k
        self._source, self._target = (slot, token) if call.merge else (token, slot)
        self._gate = call.gate.flatten()[self.order].to(call.dtype).unsqueeze(1)

    def __iter__(self) -> Iterator[_Group]:
        last = 0
        for expert, count in enumerate(self._counts):
            first, last = last, last + count
            if count:
                here = slice(first, last)
                yield _Group(
                    expert, first, last, self._source[here], self._target[here], self._gate[here]
                )


def _in_range(call: Routed) -> Tensor:
    if call.index.numel():
        low, high = (int(end) for end in call.index.aminmax())
        if low < 0 or high >= call.experts:
            raise UnsupportedCall(
                "a route leads to no expert",
                why=(f"experts are 0 to {call.experts - 1}, found {low} to {high}",),
                do="choose experts with attn_compiler.kernels.routing.route",
            )
    return call.index


def _grouped(call: Routed) -> Tensor:
    out = call.a.new_zeros(call.rows, call.w.shape[2], dtype=call.dtype)
    narrow_in = call.w.shape[1] <= call.w.shape[2]  # the gate multiplies the narrower side
    for group in _Sorted(call):
        rows = call.a.index_select(0, group.source)
        if narrow_in:
            rows = (rows * group.gate).to(call.a.dtype)
        product = (rows @ call.w[group.expert]).to(call.dtype)
        if not narrow_in:
            product = product.mul_(group.gate)
        out.index_add_(0, group.target, product)
    return out


def _grouped_backward(call: Routed, grad: Tensor, needs: Sequence[bool]) -> Gradients:
    a, w, dtype = call.a, call.w, call.dtype
    da = a.new_zeros(a.shape, dtype=dtype) if needs[0] else None
    dw = w.new_zeros(w.shape) if needs[1] else None
    routes = _Sorted(call)
    dgate = a.new_zeros(call.gate.numel(), dtype=dtype) if needs[2] else None
    for group in routes:
        above = grad.index_select(0, group.target)
        rows = a.index_select(0, group.source) if needs[1] or needs[2] else None
        if dw is not None and rows is not None:
            dw[group.expert] = _weight_gradient(rows, above, group.gate)
        if not (needs[0] or needs[2]):
            continue
        back = above @ w[group.expert].mT
        if dgate is not None and rows is not None:
            dots = torch.bmm(back.to(dtype).unsqueeze(1), rows.to(dtype).unsqueeze(2))
            dgate.index_copy_(0, routes.order[group.first : group.last], dots.flatten())
        if da is not None:
            da.index_add_(0, group.source, back.to(dtype).mul_(group.gate))
    return da, dw, None if dgate is None else dgate.view_as(call.gate)


def _weight_gradient(rows: Tensor, above: Tensor, gate: Tensor) -> Tensor:
    """rows^T (gate above), the gate on the narrower side."""
    if rows.shape[1] <= above.shape[1]:
        rows = (rows * gate).to(rows.dtype)
    else:
        above = (above * gate).to(above.dtype)
    return rows.mT @ above


# ---------------------------------------------------------------- masked


class _Dense:
    """Some tokens of a call, with a gate for every expert.

    Attributes:
        a: [n, D], or [n, H, c] if `merge`.
        gate: [n, H, E], 0 where an expert was not chosen.
    """

    def __init__(self, call: Routed, first: int, last: int) -> None:
        self.call = call
        heads = call.index.shape[1]
        self.rows = slice(first * heads, last * heads), slice(first, last)
        self.index = call.index[first:last].to(torch.int64)
        chosen = call.gate[first:last].to(call.dtype)
        empty = chosen.new_zeros(*chosen.shape[:2], call.experts)
        self.gate = empty.scatter_add_(2, self.index, chosen)
        self.a = call.a[self.rows[0 if call.merge else 1]]
        if call.merge:
            self.a = self.a.view(last - first, heads, -1)

    @cached_property
    def mixed(self) -> Tensor:
        """gate * a for every expert, [n, experts in w * c]: what one product merges."""
        return self.spread(self.a)

    def spread(self, narrow: Tensor) -> Tensor:
        """[n, H, c] -> [n, experts in w * c]."""
        each = narrow.unsqueeze(2) * self.gate.unsqueeze(3)
        each = each.flatten(1, 2) if self.call.own else each.sum(1)
        return each.to(narrow.dtype).flatten(1)

    def gate_of(self, expert: int) -> list[tuple[int, Tensor]]:
        """For each head that can choose an expert, its gates [n, 1]."""
        place = expert % self.call.experts
        return [(head, self.gate[:, head, place, None]) for head in self.call.head(expert)]


def _chunks(call: Routed) -> Iterator[_Dense]:
    tokens, heads, _ = call.index.shape
    narrow = min(call.w.shape[1:])
    elements = _CHUNK.get(call.a.device.type, _LARGE_CHUNK)
    step = max(1, elements // max(1, heads * call.experts * narrow))
    for first in range(0, tokens, step):
        yield _Dense(call, first, min(tokens, first + step))


def _masked(call: Routed) -> Tensor:
    out = call.a.new_zeros(call.rows, call.w.shape[2], dtype=call.dtype)
    for part in _chunks(call):
        if call.merge:
            out[part.rows[1]] = (part.mixed @ call.w.flatten(0, 1)).to(call.dtype)
            continue
        into = out[part.rows[0]].view(*part.gate.shape[:2], -1)
        for expert, weight in enumerate(call.w):
            product = (part.a @ weight).to(call.dtype)
            for head, gate in part.gate_of(expert):
                into[:, head].addcmul_(product, gate)
    return out


def _masked_backward(call: Routed, grad: Tensor, needs: Sequence[bool]) -> Gradients:
    a, w = call.a, call.w
    da = a.new_zeros(a.shape, dtype=call.dtype) if needs[0] else None
    dw = w.new_zeros(w.shape, dtype=call.dtype) if needs[1] else None
    dgate = torch.zeros_like(call.gate, dtype=call.dtype) if needs[2] else None
    step = _merge_backward if call.merge else _project_backward
    for part in _chunks(call):
        step(part, grad, da, dw, dgate)
    return da, dw, dgate


def _project_backward(
    part: _Dense, grad: Tensor, da: Tensor | None, dw: Tensor | None, dgate: Tensor | None
) -> None:
    call, w = part.call, part.call.w
    heads, tokens = part.rows
    above = grad[heads].view(*part.gate.shape[:2], -1)
    spread = part.spread(above)
    if da is not None:
        da[tokens] = (spread @ w.mT.flatten(0, 1)).to(call.dtype)
    if dw is not None:
        dw += (part.a.mT @ spread).unflatten(1, (-1, w.shape[2])).transpose(0, 1)
    if dgate is not None:
        dots = torch.zeros_like(part.gate)
        for expert, weight in enumerate(w):
            product = (part.a @ weight).to(call.dtype)
            for head in call.head(expert):
                dots[:, head, expert % call.experts] = (product * above[:, head]).sum(-1)
        dgate[tokens] = dots.gather(2, part.index)


def _merge_backward(
    part: _Dense, grad: Tensor, da: Tensor | None, dw: Tensor | None, dgate: Tensor | None
) -> None:
    call, w = part.call, part.call.w
    heads, tokens = part.rows
    above = grad[tokens]
    if dw is not None:
        dw += (part.mixed.mT @ above).view(w.shape)
    if da is None and dgate is None:
        return
    dots = torch.zeros_like(part.gate)
    into = None if da is None else da[heads].view(*part.gate.shape[:2], -1)
    for expert, weight in enumerate(w):
        back = (above @ weight.mT).to(call.dtype)
        for head, gate in part.gate_of(expert):
            dots[:, head, expert % call.experts] = (back * part.a[:, head]).sum(-1)
            if into is not None:
                into[:, head].addcmul_(back, gate)
    if dgate is not None:
        dgate[tokens] = dots.gather(2, part.index)
