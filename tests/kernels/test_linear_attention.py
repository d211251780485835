"""attn_compiler::linear_attention: its equation, its limits, its derivatives, its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Largest
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels import far_tiles
from attn_compiler.kernels.derivatives import by_reference
from attn_compiler.kernels.feature_maps import FeatureMaps
from attn_compiler.kernels.linear_attention import linear_attention, reference

B, H, G, D, DV, F = 2, 6, 2, 5, 7, 3
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
SCALE = 0.3


def drawn(rows: int = 23, keys: int | None = None, groups: int = G) -> list[Tensor]:
    """q, k, v and features of q and k."""
    draw = torch.Generator().manual_seed(rows)
    keys = rows if keys is None else keys
    sizes = ((H, rows, D), (groups, keys, D), (groups, keys, DV), (H, rows, F), (groups, keys, F))
    found = [torch.randn(B, *size, generator=draw, dtype=torch.float64) for size in sizes]
    return [*found[:3], found[3].relu() + 0.1, found[4].exp()]


def plain(given: list[Tensor], window: int, valid: Tensor | None = None) -> Tensor:
    """The equation, row by row and key by key."""
    q, k, v, f, g = (x.repeat_interleave(H // x.shape[1], 1) for x in given)
    past, rows = k.shape[2] - q.shape[2], []
    for i in range(q.shape[2]):
        low, own = max(0, i + past - window + 1), i + past + 1
        near = (q[:, :, i, None] @ k[:, :, low:own].mT * SCALE).exp()
        weights = torch.cat((f[:, :, i, None] @ g[:, :, :low].mT, near), -1)
        weights = weights if valid is None else weights * valid[:, None, None, :own]
        total = weights.sum(-1, keepdim=True)
        found = weights @ v[:, :, :own] / torch.where(total > 0, total, 1.0)
        rows.append(found)
    return torch.cat(rows, 2)


def run(given: list[Tensor], window: int, *more: Any) -> Tensor:
    valid, state = (*more, None, None)[:2]
    out: Tensor = linear_attention(*given, valid, state, window=window, scale=SCALE)[0]
    return out


def some(keys: int) -> Tensor:
    """Padding on the left, and a key in the middle that does not count."""
    valid = torch.arange(keys) >= torch.tensor([[0], [3]])
    valid[:, keys // 2] = False
    return valid


@pytest.fixture(params=[(2, 2**8), (4, 2**30)], ids=["bands", "one band"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and bands of several sizes."""
    least, scores = request.param
    monkeypatch.setattr(far_tiles, "_LEAST_TILE", least)
    monkeypatch.setattr(far_tiles, "_MOST_TILE", max(4, least))
    monkeypatch.setitem(far_tiles._SCORES, "cpu", scores)


CASES = [
    (23, 23, 5, False), (23, 23, 5, True), (23, 23, 1, True), (13, 13, 11, False),
    (3, 17, 4, True), (7, 19, 40, True), (1, 11, 4, False), (1, 1, 2, False),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "keys", "window", "padded"), CASES)
@pytest.mark.usefixtures("tiles")
def test_it_is_its_equation(rows: int, keys: int, window: int, padded: bool) -> None:
    given = [x.requires_grad_() for x in drawn(rows, keys)]
    valid = some(keys) if padded else None
    exact, found = plain(given, window, valid), run(given, window, valid)
    torch.testing.assert_close(found, exact, **TIGHT)
    specified, lse = reference(*given, valid, None, window=window, scale=SCALE)
    torch.testing.assert_close(specified, exact, **TIGHT)
    torch.testing.assert_close(
        linear_attention(*given, valid, None, window=window, scale=SCALE)[1], lse, **TIGHT
    )
    weights = torch.randn_like(exact)
    grads = [
        torch.autograd.grad(x, given, weights, materialize_grads=True)
        for x in (exact, found, specified)
    ]
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, **TIGHT)
        torch.testing.assert_close(c, a, **TIGHT)


@pytest.mark.usefixtures("tiles")
def test_a_state_stands_for_earlier_keys() -> None:
    given, window, cut = drawn(), 5, 11
    whole = run(given, window)
    q, k, v, f, g = given
    early = cut - (window - 1)
    state = (g[:, :, :early].mT @ pad(v[:, :, :early], (0, 1), value=1.0)).requires_grad_()
    late = [x[:, :, early:] for x in (k, v, g)]
    rest = [q[:, :, cut:], late[0], late[1], f[:, :, cut:], late[2]]
    found = run(rest, window, None, state)
    torch.testing.assert_close(found, whole[:, :, cut:], **TIGHT)
    exact = reference(*rest, None, state, window=window, scale=SCALE)[0]
    weights = torch.randn_like(found)
    (mine,), (theirs,) = (torch.autograd.grad(x, [state], weights) for x in (found, exact))
    torch.testing.assert_close(mine, theirs, **TIGHT)


def test_gradcheck() -> None:
    given = [x.requires_grad_() for x in drawn(5)]
    state = torch.rand(B, G, F, DV + 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: run(list(x[:5]), 2, some(5), x[5]), (*given, state), fast_mode=True
    )


@pytest.mark.parametrize("window", [23, 40])
def test_a_window_of_all_keys_is_softmax_attention(window: int) -> None:
    given = drawn(groups=H)
    exact = scaled_dot_product_attention(*given[:3], is_causal=True, scale=SCALE)
    torch.testing.assert_close(run(given, window), exact, **TIGHT)


@pytest.mark.usefixtures("tiles")
def test_a_prefix_has_the_rows_of_the_whole() -> None:
    """At every length; what comes later may be anything."""
    given = drawn()
    whole = run(given, 4)
    for length in range(1, 23):
        short = run([x[:, :, :length] for x in given], 4)
        torch.testing.assert_close(short, whole[:, :, :length], **TIGHT)
        later = [torch.cat((x[:, :, :length], x[:, :, length:] * 1e9), 2) for x in given]
        torch.testing.assert_close(run(later, 4)[:, :, :length], short, **TIGHT)


def test_large_scores_and_half_precision() -> None:
    q, k, v, f, g = drawn()
    for factor in (1e3, -1e3):
        found = [x.requires_grad_() for x in (factor * q, k, v, f, g)]
        out = run(found, 4)
        assert out.isfinite().all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), found))
    half = [x.detach().bfloat16() for x in (q, k, v, f, g)]
    exact = plain([x.double() for x in half], 4)
    out = run(half, 4)
    assert out.dtype == torch.bfloat16
    error = (out.double() - exact).norm()
    assert error <= 2 * (exact.bfloat16().double() - exact).norm()


def test_rows_without_keys_are_0() -> None:
    given = [x.requires_grad_() for x in drawn(7)]
    valid = torch.zeros(B, 7, dtype=torch.bool)
    valid[1, 3:] = True
    out = run(given, 3, valid)
    assert not out[0].any() and not out[1, :, :3].any() and out[1, :, 3:].all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), given))


def test_memory_is_linear() -> None:
    length = 512
    given = [torch.rand(1, 2, length, 8).requires_grad_() for _ in range(5)]
    with Largest() as seen:
        run(given, 16).sum().backward()
    assert seen.elements <= 2**16 < 2 * length**2 // 4


def test_other_derivatives_run_the_reference() -> None:
    given = drawn(5)
    out, tangent = torch.func.jvp(lambda v: run([*given[:2], v, *given[3:]], 2), (given[2],),
                                  (torch.ones_like(given[2]),))  # fmt: skip
    torch.testing.assert_close(tangent, torch.ones_like(out), **TIGHT)
    with by_reference(torch.float64):
        narrow = [x.float() for x in given]
        torch.testing.assert_close(run(narrow, 2), out.float())
    several = torch.func.vmap(lambda q: run([q, *given[1:]], 2))(torch.stack([given[0]] * 3))
    torch.testing.assert_close(several[2], out, **TIGHT)


def test_refusals() -> None:
    q, k, v, f, g = drawn()
    wrong = [
        [q[0], k, v, f, g], [q, k, v, f[:, :, 1:], g], [q, k, v, f, g[..., 1:]],
        [q, k[:, :, 1:], v, f, g], [q, k[:, :, :5], v[:, :, :5], f, g[:, :, :5]],
        [q[:, :5], k, v, f[:, :5], g],
    ]  # fmt: skip
    for given in wrong:
        with pytest.raises(UnsupportedCall, match="cannot read"):
            run(given, 4)
    for more in ((torch.ones(B, 5, dtype=torch.bool),), (None, torch.ones(B, G, F, DV))):
        with pytest.raises(UnsupportedCall, match="cannot read"):
            run([q, k, v, f, g], 4, *more)
    with pytest.raises(UnsupportedCall, match="at least 1"):
        run([q, k, v, f, g], 0)


def test_features_start_alike_for_both_sides() -> None:
    """A query meets a key of its own direction more than the opposite one, and a product at 0
    counts as a score of 0.
    """
    maps = FeatureMaps(H, G, D)
    x = 3 * torch.randn(1, 1, 11, D, generator=torch.Generator().manual_seed(0))
    f, g = maps.queries(x.expand(1, H, 11, D)), maps.keys(x.expand(1, G, 11, D))
    assert f.shape == (1, H, 11, 2 * D) and g.shape == (1, G, 11, 2 * D)
    same, opposite = ((f[:, 0] * y[:, 0]).sum(-1) for y in (g, maps.keys(-x.expand_as(g[..., :D]))))
    assert (same > 2 * opposite).all()
    zero = torch.zeros(1, H, 1, D)
    at_zero = maps.queries(zero)[0, 0] @ maps.keys(zero[:, :G])[0, 0].T
    torch.testing.assert_close(at_zero, torch.ones(1, 1))
    assert maps.queries(zero.bfloat16()).dtype == torch.float32
