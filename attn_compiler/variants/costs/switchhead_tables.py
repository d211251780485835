"""How SwitchHead's paper counts: multiply-adds of one layer and one sequence, floats kept for the
backward. Three counts that differ; only the exact one belongs into a prediction.

    Eq. 13     without routers, every product with keys over all S = C T of them
    tables     what the paper's tables print: the position term over T, a part of the routers
    exact      every product of equations 7 to 10, routers and gates included

Letters: H heads, d their width, E experts a head, k active, D width of the model, T tokens, S
keys (a context of earlier tokens makes S larger than T). `positions`: the relative positions of
Transformer-XL, which models with rotations do not have.

Source: SwitchHead (arXiv 2312.07987v3), equations 11 to 13, tables 1 to 3 and 7.
"""

from __future__ import annotations

from attn_compiler.cost.letters import D, E, H, Number, S, T, d, k


def dense_macs(positions: bool) -> Number:
    """Equation 11: ordinary attention."""
    return H * (4 * T * d * D + 2 * T * S * d + 2 * S * d * D * int(positions))


def dense_floats(positions: bool) -> Number:
    """Equation 12."""
    return H * (4 * T * d + 2 * T * S + 2 * S * d * int(positions))


def equation_macs(positions: bool) -> Number:
    """Equation 13."""
    experts = 2 * T * k * d * (D + 1)
    return H * (2 * T * d * D + experts + 2 * T * S * d + 2 * S * d * D * int(positions))


def table_macs(positions: bool) -> Number:
    """What the tables print."""
    projections = (2 * k + 2) * D * H * d * T + 2 * H * k * T * d
    return 2 * H * d * T * S + projections + 2 * E * D * S + 2 * H * D * T * d * int(positions)


def table_floats(positions: bool) -> Number:
    """What the tables print as memory."""
    return 2 * H * T * S + 4 * H * d * T + 2 * E * S + 2 * H * T * d * int(positions)


def exact_macs(positions: bool) -> Number:
    """Every product of the equations: keys, values and their routers over S rows."""
    plain = (T + S) * D * H * d
    experts = (T + S) * k * H * d * (D + 1)
    routers = (T + S) * H * E * D
    return plain + experts + routers + _scores(positions)


def exact_dense_macs(positions: bool) -> Number:
    """The same count of ordinary attention."""
    return 2 * (T + S) * D * H * d + _scores(positions)


def _scores(positions: bool) -> Number:
    """Products with keys and values, and for relative positions with 2 S - 1 projected offsets."""
    offsets = (2 * S - 1) * H * d * (D + T)
    return 2 * T * S * H * d + offsets * int(positions)
