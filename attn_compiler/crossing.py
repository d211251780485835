"""Where the answer turns from "keep it as it is" to "it pays", found by asking the planner.

SwitchHead at 1024 channels, h200   ->   "pays from about 6,144 tokens"

    lengths 64, 96, 128, 192, ...     shares of blocks, budgets of tokens in 64 equal steps

The answer is taken to turn once: what a variant saves grows with the length, what it adds does not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from attn_compiler.variants import SPION, ELAttention, Flash, Pattern, Selective
from attn_compiler.variants.base import Shape, VariantSpec

Pays = Callable[[VariantSpec, Shape], bool]
_LENGTHS = tuple(n for k in range(6, 20) for n in (2**k, 3 * 2 ** (k - 1)))
_STEPS = 64
_NEVER = "never pays at these sizes"


def crossing(spec: VariantSpec, shape: Shape, pays: Pays) -> str:
    """From which length, density or budget on a variant pays at otherwise the same sizes.

    Args:
        spec: as it was asked for, its open sizes open.
        shape: the sizes.
        pays: the planner's answer.

    Returns:
        A sentence; "" for exact attention.
    """
    if isinstance(spec, Flash):
        return ""
    if isinstance(spec, SPION):
        return _density(spec, shape, pays)
    if isinstance(spec, Selective):
        return _budget(spec, shape, pays)
    step = shape.work == "decode"
    if isinstance(spec, ELAttention) and not step:
        return "pays in steps of generation alone: a whole sequence runs the ordinary attention"

    def at(length: int) -> bool:
        return pays(spec, replace(shape, key=length, query=shape.query if step else length))

    unit = f"keys, {shape.batch} x {shape.beams} rows" if step else "tokens"
    return _turn(_LENGTHS, [f"{n:,} {unit}" for n in _LENGTHS], at)


def _density(spec: SPION, shape: Shape, pays: Pays) -> str:
    """Above which share of blocks dense attention wins."""
    if isinstance(spec.pattern, Pattern):
        spec = replace(spec, pattern=None, block=max(1, shape.key // spec.pattern.side))
    shares = [i / _STEPS for i in range(1, _STEPS + 1)]

    def at(number: int) -> bool:
        share = shares[number]
        return pays(replace(spec, density=share if share < 1 else 1 - 1e-9), shape)

    words = [f"{share:.0%} of the blocks" for share in shares]
    return _turn(range(_STEPS), words, at)


def _budget(spec: Selective, shape: Shape, pays: Pays) -> str:
    """Up to which number of kept tokens a step is faster."""
    if shape.work != "decode":
        return "pays in generation with budgets alone: reading a sequence never becomes cheaper"
    budgets = sorted({max(2, shape.key * i // _STEPS) for i in range(1, _STEPS + 1)})
    words = [f"{n:,} kept tokens of {shape.key:,}" for n in budgets]
    return _turn(budgets, words, lambda n: pays(replace(spec, budgets=(n,)), shape))


def _turn(values: Sequence[int], words: Sequence[str], pays: Callable[[int], bool]) -> str:
    first, last = pays(values[0]), pays(values[-1])
    if first == last:
        return f"pays from {words[0]} to {words[-1]}" if first else _NEVER
    turn = bisect_left(values, True, key=lambda value: pays(value) == last)
    return f"pays from about {words[turn]}" if last else f"pays up to about {words[turn - 1]}"
