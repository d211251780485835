"""Inner bases of heads: narrower, whitened, turned towards each other.

    W_V W_O = (W_V R) (R^-1 W_O)        for any invertible R

Source: singular values of a product, whitened by its inputs; generalised Procrustes (Gower 1975).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_compiler.variants.conversion.ordinary import Moments

_TURNS = 12
# of the largest direction of a head
_FLAT = 1e-12


def narrowed(
    a: Tensor, b: Tensor, width: int, inputs: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The best product of a smaller inner width: [H, D, width] each, a b^T nearly as before.

    Args:
        a, b: [H, D, d], two factors of a b^T.
        inputs: second moments [D, D] of what multiplies a from the left and b from the right; None
            for the identity.
    """
    roots = [_root(x, moment) for x, moment in zip((a, b), inputs, strict=True)]
    u, sizes, vh = torch.linalg.svd(roots[0] @ roots[1].mT)
    kept = sizes[:, None, :width].sqrt()
    sides = (u[..., :width] * kept, vh.mT[..., :width] * kept)
    left, right = (
        x @ torch.linalg.solve_triangular(root, side, upper=True)
        for x, root, side in zip((a, b), roots, sides, strict=True)
    )
    return left, right


def aligned(w_v: Tensor, w_o: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Heads whose values are white and as equal as turns can make them; every product as before.

    Args:
        w_v: [E, D, d].
        w_o: [E, d, D].
        second: moment of what `w_v` reads.
    """
    root = _root(w_v, second)
    white = torch.linalg.solve_triangular(root, w_v, upper=True, left=False)
    outputs = root @ w_o
    goal = white[0]
    turn = torch.eye(w_v.shape[2]).to(w_v).expand(len(w_v), -1, -1)
    for _ in range(_TURNS):
        u, _, vh = torch.linalg.svd(white.mT @ (second @ goal))
        turn = u @ vh
        goal = (white @ turn).mean(0)
    return torch.matmul(white, turn), torch.matmul(turn.mT, outputs)


def _root(x: Tensor, second: Tensor | None) -> Tensor:
    """Upper triangular R [H, d, d] with R^T R = x^T M x."""
    gram = x.mT @ (x if second is None else second @ x)
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    flat = torch.finfo(gram.dtype).tiny + _FLAT * size
    root: Tensor = torch.linalg.cholesky(gram + flat * torch.eye(x.shape[2]).to(x), upper=True)
    return root


def without_bias(w: Tensor, b: Tensor | None, inputs: Moments) -> Tensor:
    """The weights that come nearest to x w + b, in the mean square over inputs.

    Args:
        w: [H, D, d].
        b: [H, d].
    """
    if b is None:
        return w
    constant: Tensor = torch.linalg.solve(inputs.second, inputs.mean)  # x . constant is nearly 1
    return w + constant[None, :, None] * b[:, None, :]
