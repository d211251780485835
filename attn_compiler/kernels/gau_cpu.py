"""Gated attention over one head in plain tensor operations: the CPU's kernel, and any device's.

    squares of A   mixed += (outer relu(S)^2) v           one after the other, none is kept
    states         mixed += read q_lin M;   M = carry M + (write k_lin)^T v

The backward computes squares and states again. States of gradients run the other way: where a state
was read, its gradient is added, and where it was added to, its gradient is read.

    dS = 2 outer relu(S) * dA,    dA = dmixed v^T         no sums of rows: nothing normalises A

Scores, sums and states are float32 or wider. Source: derived from the equations of `gau_schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attn_compiler.kernels.gau_reach import Reach, Sweep
from attn_compiler.kernels.gau_schema import GRADIENTS, GauInputs

# rows and keys of a square where there are no chunks
_ROWS, _KEYS = 256, 1024


def forward(given: GauInputs) -> tuple[Tensor, Tensor]:
    """out and mixed, which is empty without a gate."""
    mixed = torch.zeros(given.v.shape, dtype=given.dtype, device=given.v.device)
    if given.q.numel() and given.v.numel():
        call = _Call(given)
        for rows, keys in call.squares():
            square = _Square(call, rows, keys)
            mixed[:, rows].baddbmm_(square.weights(), call.part(given.v, keys))
        for sweep in call.reach.sweeps():
            call.read_states(sweep, mixed)
    if given.gate is None:
        return mixed.to(given.v.dtype), given.v.new_empty(0)
    return (mixed * given.gate).to(given.v.dtype), mixed.to(given.v.dtype)


def backward(given: GauInputs, grad: Tensor, mixed: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients that `needs` marks, which has an entry for each tensor of the call."""
    wanted, grad, found = given.wanted(needs), grad.to(given.dtype), {}
    if given.gate is not None:
        found["gate"] = (grad * mixed).contiguous()
        grad = grad * given.gate
    if wanted != ["gate"]:
        found |= _gradients(given, grad)
    return [found[name].to(getattr(given, name).dtype) for name in wanted]


def _gradients(given: GauInputs, grad: Tensor) -> dict[str, Tensor]:
    """Of everything but the gate, from that of `mixed`."""
    into = {
        name: torch.zeros(x.shape, dtype=given.dtype, device=x.device)
        for name in GRADIENTS
        if name != "gate" and (x := getattr(given, name)) is not None
    }
    if given.q.numel() and given.v.numel():
        call = _Call(given)
        for rows, keys in call.squares():
            _Square(call, rows, keys).pull_back(grad[:, rows], into)
        for sweep in call.reach.sweeps():
            call.pull_back_states(sweep, grad, into)
    return into


class _Call:
    """The tensors of one call; parts of them are widened as they are used."""

    def __init__(self, given: GauInputs) -> None:
        self.given, self.reach = given, Reach(given)
        self.within = self.reach.within()
        self.q_lin = given.q if given.q_lin is None else given.q_lin
        self.k_lin = given.k if given.k_lin is None else given.k_lin
        self._biases: tuple[tuple[int, ...], Tensor | None] = ((), None)

    def bias(self, table: Tensor, rows: slice, keys: slice) -> Tensor:
        """[rows, keys]; squares of all chunks have the same."""
        place = (rows.start - keys.start, rows.stop - rows.start, keys.stop - keys.start)
        known, found = self._biases
        if found is None or known != place:
            found = toeplitz(table.to(self.given.dtype), rows, keys)
            self._biases = (place, found)
        return found

    def part(self, x: Tensor, rows: slice, factors: Tensor | None = None) -> Tensor:
        """[B, rows, features], times the factors [b, T] of rows."""
        found = x[:, rows].to(self.given.dtype)
        return found if factors is None else found * factors[:, rows, None]

    def chunks(self) -> list[slice]:
        """In order; the last may be shorter."""
        length = self.given.size[1]
        chunk = self.given.chunk or length
        return [slice(n, min(n + chunk, length)) for n in range(0, length, chunk)]

    def squares(self) -> Iterator[tuple[slice, slice]]:
        """Rows and keys of all parts of A, without what lies above the diagonal if causal."""
        length = self.given.size[1]
        if self.given.chunk is not None:
            yield from ((rows, rows) for rows in self.chunks())
            return
        for row in range(0, length, _ROWS):
            stop = min(row + _ROWS, length)
            seen = stop if self.given.causal else length
            for key in range(0, seen, _KEYS):
                yield slice(row, stop), slice(key, min(key + _KEYS, seen))

    def read_states(self, sweep: Sweep, mixed: Tensor) -> None:
        """Add to `mixed` what the rows read."""

        def read(rows: slice, state: Tensor) -> None:
            mixed[:, rows].baddbmm_(self.part(self.q_lin, rows, sweep.read), state)

        self._along(sweep, self._keys(sweep), (self.given.v, None), read)

    def pull_back_states(self, sweep: Sweep, grad: Tensor, into: dict[str, Tensor]) -> None:
        keys, queries = self._keys(sweep), (self.q_lin, sweep.read)

        def of_queries(rows: slice, state: Tensor) -> None:
            into["q_lin"][:, rows].baddbmm_(self.part(grad, rows, sweep.read), state.mT)

        def of_keys(rows: slice, state: Tensor) -> None:
            value = self.part(self.given.v, rows, sweep.write)
            into["k_lin"][:, rows].baddbmm_(value, state.mT)
            into["v"][:, rows].baddbmm_(self.part(*_of(keys, rows)), state)

        self._along(sweep, keys, (self.given.v, None), of_queries)
        self._along(sweep, queries, (grad, None), of_keys, adjoint=True)

    def _keys(self, sweep: Sweep) -> tuple[Tensor, Tensor | None]:
        return self.k_lin, sweep.write

    def _along(
        self,
        sweep: Sweep,
        left: tuple[Tensor, Tensor | None],
        right: tuple[Tensor, Tensor | None],
        read: Callable[[slice, Tensor], None],
        *,
        adjoint: bool = False,
    ) -> None:
        """Call `read(rows, state)` for every chunk; the state is the sum of left^T right over the
        chunks that it sees, or, adjoint, over those that see it.

        Args:
            left, right: a tensor [B, T, ...] and factors of its rows; state [B, left, right].
        """
        chunks = list(enumerate(self.chunks()))
        if (sweep.direction == "after") != adjoint:
            chunks.reverse()
        shape = (left[0].shape[0], left[0].shape[2], right[0].shape[2])
        state = torch.zeros(shape, dtype=self.given.dtype, device=left[0].device)
        for number, rows in chunks:
            if sweep.direction != "all":
                read(rows, state)
                if sweep.carry is not None:
                    state *= sweep.carry[:, number]
            state.baddbmm_(self.part(*_of(left, rows)).mT, self.part(*_of(right, rows)))
        if sweep.direction == "all":
            for _, rows in chunks:
                read(rows, state)


def _of(pair: tuple[Tensor, Tensor | None], rows: slice) -> tuple[Tensor, slice, Tensor | None]:
    return pair[0], rows, pair[1]


class _Square:
    """Some rows and keys of A, [B, rows, keys], made when needed and not kept."""

    def __init__(self, call: _Call, rows: slice, keys: slice) -> None:
        given, reach = call.given, call.reach
        self._call, self._rows, self._keys = call, rows, keys
        self._q, self._k = call.part(given.q, rows, reach.inner), call.part(given.k, keys)
        self._mask, self._outer = reach.mask(rows, keys), reach.outer[:, rows, None]
        scores = self._q @ self._k.mT
        if given.bias is not None:
            scores += call.bias(given.bias, rows, keys)
        # relu, 0 where masked
        self._hinge = self._masked(scores.relu_())
        self._kept = self._dropout()

    def _masked(self, scores: Tensor) -> Tensor:
        """In place."""
        rows, keys = self._rows, self._keys
        if self._call.given.causal and keys.stop > rows.start + 1:
            scores.tril_(rows.start - keys.start)
        return scores if self._mask is None else scores.mul_(self._mask)

    def _dropout(self) -> Tensor | None:
        """Factors, 0 or 1 / (1 - rate), None for none."""
        given, rows, keys = self._call.given, self._rows, self._keys
        batch, length, _, _ = given.size
        spans = (0, batch), (rows.start, rows.stop), (keys.start, keys.stop)
        dropped = given.drop.dropped((1, length), *spans)
        return None if dropped is None else (~dropped[:, 0]).to(given.dtype) * given.drop.gain

    def weights(self) -> Tensor:
        """What the values are multiplied with."""
        found = (self._hinge * self._hinge).mul_(self._outer)
        if self._kept is not None:
            found *= self._kept
        if self._call.within is not None:
            q, k = self._linear()
            found += self._masked(q @ k.mT)
        return found

    def _linear(self) -> tuple[Tensor, Tensor]:
        call = self._call
        return call.part(call.q_lin, self._rows, call.within), call.part(call.k_lin, self._keys)

    def pull_back(self, grad: Tensor, into: dict[str, Tensor]) -> None:
        """Add to the gradients, from that of the rows of `mixed`."""
        call, given, rows, keys = self._call, self._call.given, self._rows, self._keys
        into["v"][:, keys].baddbmm_(self.weights().mT, grad)
        weights = grad @ call.part(given.v, keys).mT
        if call.within is not None:
            linear, (q, k) = self._masked(weights.clone()), self._linear()
            factors = call.within[:, rows, None]
            into["q_lin"][:, rows].baddbmm_(linear * factors, k)
            into["k_lin"][:, keys].baddbmm_(linear.mT, q)
        scores = weights.mul_(self._hinge).mul_(2 * self._outer)
        if self._kept is not None:
            scores *= self._kept
        factors = call.reach.inner[:, rows, None]
        into["q"][:, rows].baddbmm_(scores * factors, self._k)
        into["k"][:, keys].baddbmm_(scores.mT, self._q)
        if "bias" in into:
            places = _distances(into["bias"], rows, keys)
            into["bias"].index_add_(0, places.flatten(), scores.sum(0).flatten())


def toeplitz(bias: Tensor, rows: slice, keys: slice) -> Tensor:
    """[rows, keys] of a table over distances, entry j - i + R - 1."""
    return bias[_distances(bias, rows, keys)]


def _distances(bias: Tensor, rows: slice, keys: slice) -> Tensor:
    i = torch.arange(rows.start, rows.stop, device=bias.device)
    j = torch.arange(keys.start, keys.stop, device=bias.device)
    return j - i[:, None] + bias.shape[0] // 2
