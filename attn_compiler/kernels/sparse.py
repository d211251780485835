"""The program of an attention over some blocks of rows and keys.

    k <= q   ->   t0[q // 64, k // 64] & (k <= q),  sink: t1[q // 64]

The sink counts what was left out as logits of 0 without a value, as SPION's authors do.

Source: SPION (arXiv 2309.12578), section on its sparse kernels, and the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.expr import TRUE, Int, Var, call, parse, walk
from attn_compiler.ir.mask import Causal, classify
from attn_compiler.ir.score import Program
from attn_compiler.kernels.selecting import added_masks


def sparse(
    program: Program,
    pattern: Tensor,
    *,
    block: int,
    length: int,
    slot: int,
    softmax: Literal["neg_inf", "zero_logit"] = "neg_inf",
) -> tuple[Program, list[Tensor]]:
    """The program of an attention over the kept blocks only.

        k <= q   ->   t0[q // 64, k // 64] & (k <= q),  sink: t1[q // 64]

    Args:
        program: of the attention as it is.
        pattern: boolean [nb, nb], or [H, nb, nb] for one of each head.
        block: rows of a block.
        length: tokens of the sequence.
        slot: the first free one, as many as the program has reads.
        softmax: "zero_logit" adds the logarithm of how many keys were left out as a sink.

    Returns:
        The program, and the tensors that follow its reads. A row without any key gives 0.

    Raises:
        BadOption: the pattern has another size, or "zero_logit" is asked of an attention that has
            a sink, or whose mask is not causal or padding.
    """
    side = math.ceil(length / block)
    if pattern.dtype != torch.bool or pattern.dim() not in (2, 3) or pattern.shape[-1] != side:
        raise BadOption(
            f"a pattern of shape {tuple(pattern.shape)} does not fit {length} tokens",
            where="option pattern",
            do=f"give booleans [{side}, {side}], or one such for each head",
        )
    reads = [pattern]
    if softmax == "zero_logit":
        reads.append(left_out(program, pattern, block, length))
    return joined(program, block, slot, pattern.dim() == 3, softmax), reads


def joined(program: Program, block: int, slot: int, per_head: bool, softmax: str) -> Program:
    """A map of blocks in the mask, and the logits of 0 as a sink. A row without any key, as the
    blocks of padding may leave it, gets 0: NaN would be read by others.
    """
    place = f"{'h, ' * per_head}q // {block}"
    kept = parse(f"t{slot}[{place}, k // {block}]")
    mask = kept if program.mask == TRUE else call("and", kept, program.mask)
    sink = parse(f"t{slot + 1}[{place}]") if softmax == "zero_logit" else program.sink
    empty = program.empty if program.empty in ("any", "zero") else "zero"
    return replace(program, mask=mask, sink=sink, empty=empty)


def left_out(program: Program, pattern: Tensor, block: int, length: int) -> Tensor:
    """The logarithm of how many keys a row of each block has lost to the pattern, [nb] or [H, nb].

    Keys of padding count, as they do for the authors; keys after the query do not.
    """
    causal = is_causal(program, length)
    if program.sink is not None or causal is None:
        raise BadOption(
            "the logits of 0 of what is left out have no meaning here",
            where="option softmax",
            why=["they are defined where every key, or every earlier key, may be seen"],
            do='give softmax="neg_inf"',
        )
    sizes = torch.full((pattern.shape[-1],), block)
    sizes[-1] = length - block * (len(sizes) - 1)
    lost = ~pattern.cpu()
    if causal and bool(lost.diagonal(dim1=-2, dim2=-1).any()):
        raise BadOption(
            "a block of a causal pattern's diagonal is missing",
            where="option pattern",
            why=["the rows of such a block lose different numbers of keys"],
            do='keep the diagonal, or give softmax="neg_inf"',
        )
    lost = lost.tril() if causal else lost
    return (lost * sizes).sum(-1).to(pattern.device, torch.float32).log()


def is_causal(program: Program, length: int) -> bool | None:
    """Beside padding: is a mask causal, or nothing? None where it is something else, or where the
    numbers of a tensor that is added to each row may say so.
    """
    added = (index for read in added_masks(program) for index in read.index)
    if any(Var("q") in walk(index) for index in added):
        return None
    structural, _, other = classify(program.mask).split()
    terms = classify(structural).terms
    if not terms and other == TRUE:
        return False
    offset = terms[0].offset if len(terms) == 1 and isinstance(terms[0], Causal) else None
    if offset is None or other != TRUE or any(isinstance(n, Int) for n in walk(offset)):
        return None
    shift = evaluate(offset, {"T": length, "S": length})
    return True if int(shift) == 0 else None
