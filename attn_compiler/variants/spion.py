"""SPION: attention over the blocks that a layer's own attention maps mark as worth it.

    softmax(q k^T) v   over all keys   ->   over the blocks of a fixed nb x nb pattern

The pattern is made from maps of the layer (convolved along diagonals, pooled by blocks, followed
from block to block above a quantile); the diagonal is always in it.

Source: SPION (arXiv 2309.12578) and its authors' settings; bounds on block counts are derived
from the rule that makes the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.kernels.sparse import is_causal, joined
from attn_compiler.variants.base import (
    ByPath,
    Fidelity,
    Lowering,
    NewTensor,
    Scope,
    Variant,
    VariantSpec,
    Work,
    demand,
    demand_flag,
    demand_one_of,
    is_size,
)

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

Auto = Literal["auto"]

# the authors' settings are alpha = 1 - 40.96 / length (1024: 0.96, 2048: 0.98, 4096: 0.99), at
# least 32 blocks a side, and sides of 32 and 64
_KEPT_OF_LENGTH, _LEAST_ALPHA = 40.96, 0.5
_LEAST_BLOCKS = 32
_LEAST_SIDE = 16  # the rows of a tensor core's tile
_FILTER = 31  # the authors', for blocks of 32 and 64


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which blocks are kept: a square of booleans that compares by its bytes.

    Attributes:
        side: blocks along a side.
        kept: one byte a block, row after row.
    """

    side: int
    kept: bytes

    @classmethod
    def of(cls, value: Any) -> Pattern:
        """From a boolean tensor [nb, nb], or nested lists of booleans (or of 0 and 1).

        Raises:
            BadOption: not a square of booleans, or a row without a block.
        """
        if isinstance(value, Pattern):
            return value
        square = _square(value)
        if not bool(square.any(1).all()):
            raise BadOption(
                "pattern has a row without a block",
                where="option pattern",
                why=["queries of that row would have no keys"],
                do="keep at least the diagonal",
            )
        return cls(len(square), bytes(square.to(torch.uint8).flatten().tolist()))

    def tensor(self) -> Tensor:
        """The same as a boolean tensor [nb, nb]."""
        kept = torch.tensor(list(self.kept), dtype=torch.bool)
        return kept.reshape(self.side, self.side)

    @property
    def blocks(self) -> int:
        """How many are kept."""
        return sum(self.kept)

    @property
    def density(self) -> float:
        """Which share of them."""
        return self.blocks / self.side**2

    def __repr__(self) -> str:
        return f"Pattern({self.blocks} of {self.side} x {self.side} blocks)"


def _square(value: Any) -> Tensor:
    try:
        given = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        given = torch.empty(0)
    given = given.detach().cpu()
    numbers = given.dtype == torch.bool or (
        not given.dtype.is_floating_point and bool(((given == 0) | (given == 1)).all())
    )
    if given.dim() != 2 or given.shape[0] != given.shape[1] or not numbers or not given.numel():
        raise BadOption(
            "pattern is not a square of booleans",
            where="option pattern",
            do="give a boolean tensor [nb, nb], or a dict of them by module path",
        )
    return given.bool()


@dataclass(frozen=True, slots=True, kw_only=True)
class SPION(VariantSpec):
    """Block-sparse attention with a pattern for each layer.

    Attributes:
        mode: "CF" convolves and follows, "C" convolves and takes the best, "F" follows alone.
        alpha: quantile that a block has to be above (CF, F).
        density: share of blocks that is taken (C).
        block: rows of a block, a power of two.
        filter: length of the convolution along the diagonal, odd; "auto" is 31, the authors', and
            less than a block where blocks are smaller.
        softmax: "neg_inf" leaves blocks out; "zero_logit" counts them as logits of 0 without a
            value, as the authors' kernels do.
        per_head: a pattern for each head.
        max_lost_mass: a layer whose pattern loses more of its attention stays dense.
        pattern: a boolean block mask [nb, nb], or a dict of them by module path; then nothing is
            calibrated.

    Raises:
        BadOption: a field has a wrong value.
    """

    mode: Literal["CF", "C", "F"] = "CF"
    alpha: float | Auto = "auto"
    density: float | Auto = "auto"
    block: int | Auto = "auto"
    filter: int | Auto = "auto"
    softmax: Literal["neg_inf", "zero_logit"] = "neg_inf"
    per_head: bool = False
    max_lost_mass: float = 0.05
    pattern: Any = None

    def __post_init__(self) -> None:
        demand_one_of(self, "mode", "CF", "C", "F")
        demand(self, "alpha", _is_share(self.alpha), 'give a number between 0 and 1, or "auto"')
        whole = self.density == 1 and not isinstance(self.density, bool)
        good = whole or _is_share(self.density)
        demand(self, "density", good, 'give a number above 0, at most 1, or "auto"')
        good = self.block == "auto" or (is_size(self.block) and self.block.bit_count() == 1)
        demand(self, "block", good, 'give a power of two, such as 64, or "auto"')
        good = self.filter == "auto" or (is_size(self.filter) and self.filter % 2 == 1)
        demand(self, "filter", good, 'give an odd number, or "auto"')
        demand_one_of(self, "softmax", "neg_inf", "zero_logit")
        demand_flag(self, "per_head")
        lost = self.max_lost_mass
        good = isinstance(lost, int | float) and not isinstance(lost, bool) and 0 <= lost <= 1
        demand(self, "max_lost_mass", good, "give a number from 0 to 1")
        self._freeze_pattern()

    def _freeze_pattern(self) -> None:
        given = self.pattern
        if given is None:
            return
        why = "a pattern that is given is that of all heads"
        demand(self, "per_head", not self.per_head, "leave out per_head, or the pattern", why)
        if isinstance(given, Mapping):
            frozen: Any = ByPath({path: Pattern.of(value) for path, value in given.items()})
        else:
            frozen = Pattern.of(given)
        object.__setattr__(self, "pattern", frozen)

    def pattern_at(self, path: str) -> Pattern | None:
        """The pattern that is given for a module, None if there is none."""
        if isinstance(self.pattern, ByPath):
            return self.pattern.get(path)
        return self.pattern  # type: ignore[no-any-return]


# ---------------------------------------------------------------- replacing a site


# names of what a module gets; the number of the site in it follows
BLOCKS, REST = "attn_blocks", "attn_rest"


def legality(site: AttentionSite, spec: SPION) -> Iterator[Reason]:
    if site.length is None or site.length < 2:
        text = (
            "a pattern belongs to a sequence that attends to itself, all at once, without a cache"
        )
        yield Reason("spion.not_square", text, site.location)
        return
    try:
        made = filled(spec, site.length, path=site.path)
    except BadOption as error:
        yield Reason("spion.pattern", "; ".join((error.what, *error.why)), site.location)
        return
    assert isinstance(made.block, int)
    if site.length <= made.block:
        yield Reason("spion.one_block", f"{site.length} tokens are one block", site.location)
    known = is_causal(site.program, site.length) is not None and site.program.sink is None
    if spec.softmax == "zero_logit" and not known:
        text = "zero logits have no meaning beside a sink, or a mask not causal or padding"
        yield Reason("spion.softmax", text, site.location)
    if spec.per_head and site.query_heads is None:
        yield Reason("spion.heads", "the number of heads is not known", site.location)


def lower(site: AttentionSite, spec: SPION, length: int, slots: int) -> Lowering:
    """A map of blocks joins the mask; until it is written to, it keeps them all."""
    block = filled(spec, length, path=site.path).block
    assert isinstance(block, int)
    side = -(-length // block)
    heads = (site.query_heads or 1,) if spec.per_head else ()
    reads = [NewTensor(BLOCKS, (*heads, side, side), torch.bool, True)]
    if spec.softmax == "zero_logit":
        reads.append(NewTensor(REST, (*heads, side), torch.float32, -math.inf))
    made = joined(site.program, block, slots, spec.per_head, spec.softmax)
    return Lowering(made, tuple(reads), length=length)


def _is_share(value: object) -> bool:
    return value == "auto" or (isinstance(value, float) and 0 < value < 1)


def cost(spec: SPION, work: Work) -> Cost:
    """What the core of one layer costs, in the letters of `cost.letters`: C rows of a block, rho
    the share of blocks that is kept. Numbers that the spec gives stand in their place.

    Raises:
        BadOption: work is "decode"; a pattern belongs to a whole sequence.
    """
    if work == "decode":
        raise BadOption(
            "SPION has no cost of a decoding step",
            why=["its patterns are those of a whole sequence"],
            do='ask for "prefill" or "training"',
        )
    from attn_compiler.variants.costs import parts, spion

    found = spion.core(
        work == "training", zero_logit=spec.softmax == "zero_logit", per_head=spec.per_head
    )
    density = spec.pattern.density if isinstance(spec.pattern, Pattern) else None
    return parts.filled(found, C=spec.block, rho=density)


def filled(spec: SPION, length: int, *, path: str = "", rows_of_tile: int = 64) -> SPION:
    """The spec with numbers for "auto".

    Args:
        spec: what is wanted.
        length: tokens of the sequence.
        path: of the module, where patterns are given for each.
        rows_of_tile: rows that one matrix instruction of the device fills.

    Raises:
        BadOption: the block, or every block, does not fit the given pattern.
    """
    block, pattern = spec.block, spec.pattern_at(path)
    if block == "auto":
        block = block_side(length, rows_of_tile) if pattern is None else _fit(pattern, length)
    elif pattern is not None:
        _check_fit(pattern, length, block, f"blocks of {block} tokens were asked for")
    alpha = quantile(length) if spec.alpha == "auto" else spec.alpha
    side = math.ceil(length / block)
    density = spec.density
    if density == "auto":
        density = min(1.0, most_blocks(side, alpha) / side**2)
    filter = filter_of(block) if spec.filter == "auto" else spec.filter
    return replace(spec, alpha=alpha, density=density, block=block, filter=filter)


def _fit(pattern: Pattern, length: int) -> int:
    block = 1
    while math.ceil(length / block) > pattern.side:
        block *= 2
    _check_fit(pattern, length, block, "a block has a power of two of rows")
    return block


def _check_fit(pattern: Pattern, length: int, block: int, why: str) -> None:
    if math.ceil(length / block) != pattern.side:
        raise BadOption(
            f"a pattern of {pattern.side} blocks a side does not fit {length} tokens",
            where="option pattern",
            why=[why],
            do="give a pattern made for this length, or block",
        )


def quantile(length: int) -> float:
    """alpha where it is "auto": the authors' three settings, by length."""
    return max(_LEAST_ALPHA, 1 - _KEPT_OF_LENGTH / length)


def block_side(length: int, rows_of_tile: int = 64) -> int:
    """Rows of a block where they are "auto": as many as fill a matrix instruction, fewer while
    that leaves fewer than 32 blocks a side, a power of two.

    A larger block blurs the pattern, a smaller one starves the tensor cores. The authors' five
    settings (32 at a length of 1024, 64 at 2048 and 4096) are what this gives.
    """
    side = min(rows_of_tile, max(_LEAST_SIDE, length // _LEAST_BLOCKS))
    return int(2 ** math.floor(math.log2(side)))


def filter_of(block: int) -> int:
    """Length of the convolution where it is "auto", for this side of a block.

    A longer one carries a key that every query attends to into the blocks beside its own.
    """
    return min(_FILTER, max(1, block - 1))


def most_blocks(side: int, alpha: float) -> int:
    """The most blocks that modes CF and F can keep: those above the quantile of all, and the
    diagonal.
    """
    last = side**2 - 1
    return last - math.floor(alpha * last) + side


def most_blocks_of_share(side: int, density: float) -> int:
    """The most that mode C can keep: the best floor(nb^2 density - nb), and the diagonal."""
    return max(0, math.floor(side**2 * density - side)) + side


def most_density(*, causal: bool = False, efficiency: float = 1.0, imbalance: float = 1.0) -> float:
    """Share of blocks above which dense attention wins.

    Args:
        causal: dense attention visits half of the pairs.
        efficiency: how fast tiles of the pattern's blocks are against those of dense attention.
        imbalance: the longest wave of programs over the mean; 1 if rows are equally long.
    """
    return (0.5 if causal else 1.0) * efficiency / imbalance


SPION_ = Variant(
    name="spion",
    spec=SPION,
    scope=Scope.CORE,
    fidelity=Fidelity.CALIBRATED,
    legality=legality,
    lower=lower,
)
