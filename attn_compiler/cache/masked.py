"""What a module rewritten to Selective attention calls in place of its cache and its attention.

    keys, values = cache.update(key, value, 3)   ->   kept = take(cache, (memory, key), value, 3)
    softmax(q keys^T) values                     ->   attend(memory, kept, q, ...)

Without a cache the keys and values themselves stand for `kept`. With one, a layer keeps how much
each token is masked; where the site has a budget, a layer of fixed size drops what is masked most.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_compiler.errors import UnsupportedCall, require
from attn_compiler.ir.evaluate import evaluate
from attn_compiler.ir.score import Program
from attn_compiler.kernels.selective import selective_attention
from attn_compiler.kernels.selective_memory import Memory
from attn_compiler.kernels.slots import Rule, Token, rows_with_deaths
from attn_compiler.passes.rewrite_states import CacheCalls

Outs = tuple[Tensor, ...]


class Rest(NamedTuple):
    """What the operator is given behind q, k and v; see `kernels.selective`."""

    reads: Sequence[Tensor]
    ints: Sequence[int]
    seed: Tensor | None
    selector: Sequence[Tensor]
    gate: Tensor | None
    carry: Tensor | None


@dataclass(frozen=True, slots=True)
class Held:
    """All keys and values as `update` gives them, and the layer that knows what masks them."""

    layer: Any
    keys: Tensor
    values: Tensor


def take(cache: Any, made: tuple[Memory, Tensor], values: Tensor, index: int, *more: Any) -> Any:
    """Instead of `cache.update(keys, values, index, *more)`.

    Args:
        cache: any object with such a method.
        made: what the site remembers, and the keys of the new tokens.
        values: of the new tokens.
        index: of the layer.
        more: further arguments.

    Returns:
        What `attend` and `shown` read.

    Raises:
        UnsupportedCall: the cache cannot hold what tokens mask, or keeps other tokens than it
            gives.
    """
    memory, keys = made
    layer = None
    if "transformers" in sys.modules:
        from attn_compiler.cache.masked_layer import hold

        layer = hold(cache, index, memory.budget if memory.prunes else None)
    pair = cache.update(keys, values, index, *more)
    if layer is None or hasattr(layer, "attend"):
        return pair if layer is None else layer
    layer.check_held(pair[0].shape[2])
    return Held(layer, *pair)


def attend(
    memory: Memory,
    kept: Any,
    q: Tensor,
    rest: tuple[Any, ...],
    own: Sequence[Tensor] = (),
    **options: Any,
) -> Tensor:
    """Selective attention of q [B, H, T, d].

    Args:
        memory: what the site remembers.
        kept: keys [B, G, S, d] and values [B, G, S, dv], or what `take` gave.
        rest: see `Rest`.
        own: x [B, T, D] and the weights of a selecting head of its own: [D, d], [D, d], [D, f],
            and [f, H dv], which adds what it finds to the other heads.
        options: program, scale, dropout, head and select_from, as of the operator; whether the
            program says itself that it is causal.

    Returns:
        [B, H, T, dv].

    Raises:
        UnsupportedCall: the rows are not the last of the keys, or dropout would be pruned.
    """
    given, dropout, causal = Rest(*rest), options.pop("dropout"), options.pop("causal")
    rule = Rule(reads=given.reads, ints=given.ints, gate=given.gate, **options)
    x, *weights = own or (None,)
    selector = tuple((x @ w).unsqueeze(1) for w in weights[:3]) if x is not None else ()
    if memory.rows is not None:
        memory.rows = max(memory.rows, q.shape[2])
    if not causal and q.shape[2] > 1:
        _check_causal(rule, q, shown(kept, 0).shape[2])
    if isinstance(kept, tuple):
        keys, values = kept
        outs = _alone(memory, Token(q, keys, values, selector), rule, given, dropout)
    elif hasattr(kept, "attend"):
        _check_undropped(dropout)
        outs = kept.attend(q, rule, selector)
    else:
        token = Token(q, kept.keys, kept.values, selector)
        outs = _going_on(memory, kept.layer, token, rule, given, dropout)
    return _mixed(outs, weights[3]) if weights else outs[0]


@torch.compiler.disable
def _check_causal(rule: Rule, q: Tensor, keys: int) -> None:
    """A mask that is a tensor may let no row see keys after its own.

    Raises:
        UnsupportedCall: it does; on a GPU the device says so.
    """
    batch, heads, rows, _ = q.shape
    env: dict[str, Any] = {"B": batch, "H": heads, "T": rows, "S": keys}
    for name, size, shape in (
        ("b", batch, (-1, 1, 1, 1)),
        ("h", heads, (-1, 1, 1)),
        ("q", rows, (-1, 1)),
        ("k", keys, (-1,)),
    ):
        env[name] = torch.arange(size, device=q.device).view(shape)
    allowed = evaluate(Program.parse(rule.program).mask, env, rule.reads, rule.ints).bool()
    later = (allowed.to(q.device) & (env["k"] > env["q"] + (keys - rows))).any()
    text = "a mask that lets no row see later keys: Selective attention is causal"
    if later.device.type == "cpu" and not torch.compiler.is_compiling():
        require(not bool(later), text)
    else:
        torch._assert_async(~later, text)


def _mixed(outs: Outs, weight: Tensor) -> Tensor:
    """What the selecting head found, added to the other heads."""
    out, found = outs
    more: Tensor = (found.squeeze(1) @ weight).unflatten(-1, (out.shape[1], out.shape[3]))
    mixed: Tensor = out + more.transpose(1, 2).to(out.dtype)
    return mixed


def _alone(memory: Memory, token: Token, rule: Rule, rest: Rest, dropout: float) -> Outs:
    """A whole sequence."""
    rows, keys = token.q.shape[2], token.k.shape[2]
    if rows != keys:
        raise UnsupportedCall(
            f"{rows} rows attend to {keys} keys, and what masks the earlier keys is not known",
            why=("only caches of transformers keep it",),
            do="give all tokens at once, or use such a cache",
        )
    memory.note(token.q, token.k, token.selector, rule)
    if memory.prunes:
        _check_undropped(dropout)
        assert memory.budget is not None
        return rows_with_deaths(rule, token, memory.budget)[2]
    return _run(token, rule, rest, None, dropout)[1]


def _check_undropped(dropout: float) -> None:
    if dropout:
        raise UnsupportedCall(
            "a pruned attention drops weights at random", do="set its dropout to 0"
        )


def _going_on(
    memory: Memory, layer: Any, token: Token, rule: Rule, rest: Rest, dropout: float
) -> Outs:
    """The next rows, over all keys."""
    from attn_compiler.cache.masked_layer import joined

    past = token.k.shape[2] - token.q.shape[2]
    if past == 0:
        memory.note(token.q, token.k, token.selector, rule)
    carry = layer.carried(past)
    selector = joined(layer.selector, token.selector[1:])
    token = Token(token.q, token.k, token.v, (*token.selector[:1], *selector))
    state, outs = _run(token, rule, rest, carry, dropout)
    layer.remember(state, selector)
    return outs


def _run(
    token: Token, rule: Rule, rest: Rest, carry: Tensor | None, dropout: float
) -> tuple[Tensor, Outs]:
    """F after the last row, and what attends."""
    selector = list(token.selector[:2])
    behind = (list(rest.reads), list(rest.ints), rest.seed, selector, rule.gate, carry)
    options: dict[str, Any] = {"program": rule.program, "scale": rule.scale, "dropout": dropout}
    options["select_from"] = rule.select_from
    out, _, state = selective_attention(
        token.q, token.k, token.v, *behind, head=rule.head, **options
    )
    if len(token.selector) < 3:
        return state, (out,)
    found = selective_attention(*token.selector, *behind, head=0, **options)[0]
    return state, (out, found)


def shown(kept: Any, position: int) -> Tensor:
    """Something of the shape of all keys (0) or values (1)."""
    if isinstance(kept, tuple):
        found: Tensor = kept[position]
    elif hasattr(kept, "attend"):
        found = kept.shown(position)
    else:
        found = kept.values if position else kept.keys
    return found


MASKED = CacheCalls(keep=take, attend=attend, shown=shown)
