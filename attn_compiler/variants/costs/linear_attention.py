"""What linear attention beyond a window costs: features, a window of scores, sums.

    features 2 (H + G) d^2    near 2 H (C + t) (d + e)    far 2 H t (F + e) + 2 (H + G) F e

operations of a token, with a window of C keys, tiles of t rows and F = 2 d features, which the code
holds in float32. It is PyTorch code that writes its scores to memory, so their bytes count. The
length stands in none of these; a step of generation reads a window and a state.

Source: derived from `kernels.far_tiles`, `kernels.far_linear` and `kernels.feature_maps`.
"""

from __future__ import annotations

from attn_compiler.cost.letters import B, C, Cost, G, H, K, Number, T, d, e, n
from attn_compiler.variants.base import Work

# how often the code reads, and writes, a near score, a far one, a feature, an entry of a state
_NEAR, _FAR, _FEATURES, _STATES = 6, 3, 6, 3
_FLOAT = 4
_KERNELS = 60


def core(work: Work, tile: int = 64) -> Cost:
    """The core of a layer, causal.

    Args:
        work: see `Work`.
        tile: rows of a tile.
    """
    if work == "decode":
        return _step()
    features = _maps(B * T)
    if work == "prefill":
        return features + _forward(tile) + Cost(cache=_kept(B))
    # the maps' backward makes gradients of their input and of their weights
    kept = n * B * T * (H * (d + e) + G * (d + e)) + _FLOAT * B * T * (H + G) * 5 * d
    return features.times(3) + _forward(tile) + _backward(tile) + Cost(saved=kept)


def _maps(tokens: Number) -> Cost:
    """Two softmaxes of a linear map, of queries and of keys."""
    heads = tokens * (H + G)
    moved = _FLOAT * _FEATURES * 2 * d * heads
    return Cost(
        flops=2 * heads * d**2,
        exps=2 * heads * d,
        read=n * heads * d + moved + _FLOAT * (H + G) * d**2,
        written=moved,
        launches=16,
    )


def _forward(tile: int) -> Cost:
    near, far, states = _sizes(tile)
    moved = _FLOAT * (_NEAR * near + _FAR * far + _STATES * states)
    rows = n * B * T * H * (d + e)
    return Cost(
        flops=2 * near * (d + e) + 2 * far * (2 * d + e) + 4 * B * T * (H + G) * d * e,
        exps=2 * near,
        read=moved + rows + n * B * T * G * (d + e),
        written=moved + rows,
        launches=_KERNELS,
    )


def _backward(tile: int) -> Cost:
    """Scores again, and a product for each gradient."""
    near, far, states = _sizes(tile)
    moved = 2 * _FLOAT * (_NEAR * near + _FAR * far + _STATES * states)
    rows = n * B * T * (H + G) * (d + e)
    return Cost(
        flops=2 * near * (3 * d + 2 * e)
        + 2 * far * (6 * d + 2 * e)
        + 8 * B * T * (H + 2 * G) * d * e,
        exps=near,
        read=moved + 2 * rows,
        written=moved + rows,
        launches=2 * _KERNELS,
    )


def _sizes(tile: int) -> tuple[Number, Number, Number]:
    """Scores near and far, and entries of the states before tiles."""
    rows = B * T * H
    return rows * (C + tile), rows * tile, B * T * G * 2 * d * e / tile


def _step() -> Cost:
    """A new token: its features, the window, the state; the window moves on by copying."""
    sequences = B * K
    rows = sequences * T
    kept = _kept(sequences)
    core = Cost(
        flops=2 * rows * H * (C * (d + e) + 2 * d * e) + 4 * rows * G * d * e,
        exps=rows * H * C,
        read=2 * kept,
        written=kept,
        launches=_KERNELS,
        cache=kept,
    )
    return _maps(rows) + core


def _kept(sequences: Number) -> Number:
    """Keys, values and features of the window; the state."""
    return sequences * G * (C * (n * (d + e) + _FLOAT * 2 * d) + _FLOAT * 2 * d * (e + 1))
