"""Which tokens a row of gated attention sees, as intervals, and what its sums are divided by.

    near  lo <= j < hi     own chunk and document, up to the row itself if causal
    far   first <= j < chunk start if causal,  first <= j < last otherwise

Keys that count between two places are a difference of two sums, so everything here is a vector over
the tokens. States are carried along chunks; a document that ends lets none through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_compiler.kernels.gau_schema import GauInputs

Direction = Literal["before", "after", "all"]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One way along the chunks with a state, sum over j of k_lin_j v_j^T.

    Attributes:
        direction: which chunks a row reads: "before" its own, "after" it, or "all".
        read: [b, T] factors of the rows that read, 0 for those that see none of it.
        write: [b, T] factors of the tokens that are added, None for 1.
        carry: [b, chunks, 1, 1] whether a state survives a chunk, None for always.
    """

    direction: Direction
    read: Tensor
    write: Tensor | None
    carry: Tensor | None


class Reach:
    """Intervals and factors of one call; vectors are [1, T] where they are the same for all
    sequences.

    Attributes:
        lo, hi: keys that a row sees by A, where they are valid.
        near: 1 over what its scores or their squares are divided by.
        inner: factors of the queries, the scale included.
        outer: factors of the rows of A.
    """

    def __init__(self, given: GauInputs) -> None:
        self._given, self._length = given, given.size[1]
        index = torch.arange(self._length, device=given.q.device).unsqueeze(0)
        chunk = given.chunk
        start = index // chunk * chunk if chunk else torch.zeros_like(index)
        stop = (start + chunk).clamp(max=self._length) if chunk else start + self._length
        first, last = self._documents(index)
        self._start, self._stop, self._first, self._last = start, stop, first, last
        self.lo = torch.maximum(start, first)
        own = torch.minimum(stop, last)
        self.hi = index + 1 if given.causal else own
        counted = torch.ones_like(index) if given.valid is None else given.valid.long()
        self._before = pad(counted.cumsum(1), (1, 0))
        seen = self._count(self.lo, own if given.scale_mode == "valid" else self.hi)
        self.near = near = self._divided(seen, given.chunk)
        whole = torch.ones_like(near)
        self.inner = (near if given.inside else whole) * given.scale
        self.outer = self.rows(whole if given.inside else near)

    def _documents(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """First token of each token's document, and the one after its last."""
        documents = self._given.documents
        if documents is None:
            return torch.zeros_like(index), torch.full_like(index, self._length)
        changes = documents[:, 1:] != documents[:, :-1]
        begins, ends = pad(changes, (1, 0), value=True), pad(changes, (0, 1), value=True)
        first = torch.where(begins, index, 0).cummax(1).values
        last = torch.where(ends, index + 1, self._length).flip(1).cummin(1).values.flip(1)
        return first, last

    def _count(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Valid tokens of intervals, [b, T]; empty ones have none."""
        before, rows = self._before, max(self._before.shape[0], lo.shape[0], hi.shape[0])
        before, lo, hi = (x.expand(rows, -1) for x in (before, lo, torch.maximum(lo, hi)))
        return before.gather(1, hi) - before.gather(1, lo)

    def _divided(self, seen: Tensor, chunk: int | None) -> Tensor:
        """1 over what the scale mode counts, 0 over no keys."""
        given = self._given
        by = {"chunk": chunk, "seqlen": self._length}.get(given.scale_mode, given.fixed)
        if by is not None:
            return torch.full(seen.shape, 1 / by, dtype=given.dtype, device=seen.device)
        return torch.where(seen > 0, 1 / seen.clamp(min=1).to(given.dtype), 0.0)

    def rows(self, factors: Tensor) -> Tensor:
        """Factors of rows, 0 for rows that are not valid."""
        return factors if self._given.valid is None else factors * self._given.valid

    def sweeps(self) -> Iterator[Sweep]:
        """The ways of the states, none without chunks."""
        given = self._given
        if given.chunk is None:
            return
        first, last, start, stop = self._first, self._last, self._start, self._stop
        ends_before = given.causal and given.scale_mode != "valid"
        seen = self._count(first, start if ends_before else last)
        reads = self.rows(self._divided(seen, given.chunk if given.causal else self._length))
        write = None if given.valid is None else given.valid.to(given.dtype)
        if given.documents is None:
            yield Sweep("before" if given.causal else "all", reads, write, None)
            return
        # what is kept of a chunk belongs to the document of its last token, and of its first
        yield self._directed("before", reads, first < start, last >= stop)
        if not given.causal:
            yield self._directed("after", reads, last > stop, first <= start)

    def _directed(self, direction: Direction, reads: Tensor, read: Tensor, write: Tensor) -> Sweep:
        """The documents of the two ends of a chunk decide what passes.

        Args:
            read: the row's document goes on in the direction it reads from.
            write: the token's document goes on to where it is read.
        """
        given = self._given
        chunk = given.chunk or self._length
        if direction == "before":  # the document at the end of a chunk began before it
            ends = [min(n, self._length) - 1 for n in range(chunk, self._length + chunk, chunk)]
        else:
            ends = list(range(0, self._length, chunk))
        carry = read[:, ends].to(given.dtype)[..., None, None]
        return Sweep(direction, reads * read, self.rows(write.to(given.dtype)), carry)

    def within(self) -> Tensor | None:
        """[b, T] factors of linear attention within a chunk, which documents in both directions
        need; elsewhere a state has it, or nobody.
        """
        given = self._given
        if given.chunk is None or given.causal or given.documents is None:
            return None
        return self.rows(self._divided(self._count(self._first, self._last), self._length))

    def mask(self, rows: slice, keys: slice) -> Tensor | None:
        """0 and 1 [b, rows, keys], None where a row sees all keys, or those up to itself."""
        given, found = self._given, None
        if given.documents is not None:
            index = torch.arange(keys.start, keys.stop, device=given.q.device)
            found = (index >= self.lo[:, rows, None]) & (index < self.hi[:, rows, None])
        if given.valid is not None:
            allowed = given.valid[:, None, keys]
            found = allowed if found is None else found & allowed
        return None if found is None else found.to(given.dtype)
