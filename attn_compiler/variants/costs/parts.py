"""The parts that formulas are made of: a product with a weight, and the core of attention.

linear   [rows, wide] x [wide, out]: 2 * rows * wide * out operations, three times that in training
Core     softmax(q k^T) v: 2 * pairs * (d + e) forward, 2 * pairs * (4 d + 3 e) backward

Source: FlashAttention-2 (arXiv 2307.08691), section 3: five products and a second pass over the
scores, which this package's two backward kernels each do for themselves: seven products.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Rational

from attn_compiler.cost.letters import B, Cost, G, H, M, Number, S, T, d, e, n
from attn_compiler.variants.base import Work


def linear(
    rows: Number, wide: Number, out: Number, *, training: bool = False, keeps: bool = True
) -> Cost:
    """A product with a weight, [rows, wide] x [wide, out]. Projections that read the same tensor
    count as one product.

    Args:
        rows, wide, out: sizes.
        training: add the gradients of input and weight.
        keeps: the input is kept for the backward by this product, and not by another.
    """
    x, w, y = n * rows * wide, n * wide * out, n * rows * out
    flops = 2 * rows * wide * out
    cost = Cost(flops=flops, read=x + w, written=y, launches=1)
    if not training:
        return cost
    gradients = Cost(flops=2 * flops, read=2 * y + w + x, written=x + w, launches=2)
    return cost + gradients + Cost(saved=x if keeps else 0)


@dataclass(frozen=True, slots=True)
class Core:
    """Sizes of softmax(q k^T) v, computed tile by tile.

    Attributes:
        batch, heads, groups, rows, keys: B, H, G, T, S.
        qk, v: widths of a key and of a value.
        share: of the pairs that are visited.
    """

    batch: Number = B
    heads: Number = H
    groups: Number = G
    rows: Number = T
    keys: Number = S
    qk: Number = d
    v: Number = e
    share: Number = 1

    @property
    def pairs(self) -> Number:
        """Scores that are computed."""
        return self.share * self.batch * self.heads * self.rows * self.keys

    def cost(self, training: bool) -> Cost:
        return self.forward(keep=True) + self.backward() if training else self.forward()

    def forward(self, keep: bool = False) -> Cost:
        """One kernel; `keep` also writes the log of each row's sum, float32, for the backward."""
        queries, keys, values, out, sums = self._tensors()
        cost = Cost(
            flops=2 * self.pairs * (self.qk + self.v),
            exps=self.pairs,
            read=queries + keys + values,
            written=out,
            launches=1,
            near=self._loaded() + queries + out + sums,
        )
        if keep:
            cost += Cost(written=sums, saved=queries + keys + values + out + sums)
        return cost

    def backward(self) -> Cost:
        """Three kernels: row sums of gradient times output; dq; dk and dv. Each of the last two
        computes the scores again.
        """
        queries, keys, values, out, sums = self._tensors()
        return Cost(
            flops=2 * self.pairs * (4 * self.qk + 3 * self.v),
            exps=2 * self.pairs,
            read=2 * out + 2 * (queries + keys + values + out + 2 * sums),
            written=sums + queries + keys + values,
            launches=3,
            # row sums, dq, dk and dv
            near=2 * self._loaded() + 2 * (queries + keys + values) + 3 * out + 3 * sums,
        )

    def cache(self) -> Cost:
        """Keys and values, kept from step to step."""
        return Cost(cache=n * self.batch * self.groups * self.keys * (self.qk + self.v))

    def _loaded(self) -> Number:
        """Bytes of tiles that run past: each block of M rows, or keys, meets the other side."""
        return n * self.pairs * (self.qk + self.v) / M

    def _tensors(self) -> tuple[Number, Number, Number, Number, Number]:
        """Bytes of q, k, v, the output and the logs of the rows' sums."""
        rows = self.batch * self.heads * self.rows
        keys = n * self.batch * self.groups * self.keys
        return n * rows * self.qk, keys * self.qk, keys * self.v, n * rows * self.v, 4 * rows


def visited(work: Work, causal: bool) -> Number:
    """Share of the pairs that a kernel visits; a step of generation sees all that came before."""
    return Rational(1, 2) if causal and work != "decode" else 1


def filled(cost: Cost, **sizes: Number) -> Cost:
    """Put sizes in the place of their letters; "auto" and None leave the letter."""
    numbers = {name: v for name, v in sizes.items() if v is not None and v != "auto"}
    return Cost(*(_filled(getattr(cost, f), numbers) for f in cost.__slots__))


def _filled(formula: Number, numbers: dict[str, Number]) -> Number:
    letters = {str(s): s for s in getattr(formula, "free_symbols", ())}
    known = {letters[name]: v for name, v in numbers.items() if name in letters}
    return formula.subs(known) if known else formula
