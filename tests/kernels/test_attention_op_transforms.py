"""attn_compiler::attention under compile, export, checkpoint, autocast, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.attention import reference
from attn_compiler.kernels.library import attention, attention_backward, register_flops

B, H, G, T, S, D = 2, 6, 3, 5, 7, 8
PROGRAM = "score: dot + t1[0, h, q, k]; mask: (k <= q) & t0[b, k]; empty: uniform"
PADDING = torch.arange(S) >= torch.tensor([[3], [0]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Q, K, V, BIAS = draw(B, H, T, D), draw(B, G, S, D), draw(B, G, S, D), draw(1, H, T, S)
SEED = torch.tensor([5])


def op(
    q: Tensor, k: Tensor = K, v: Tensor = V, bias: Tensor = BIAS, dropout: float = 0.0
) -> Tensor:
    seed = SEED if dropout else None
    kwargs = {"program": PROGRAM, "scale": 0.3, "dropout": dropout}
    return attention(q, k, v, [PADDING, bias], [], seed, **kwargs)[0]


def plain(q: Tensor, k: Tensor = K, v: Tensor = V, bias: Tensor = BIAS) -> Tensor:
    return reference(q, k, v, [PADDING, bias], [], PROGRAM, 0.3)[0]


def same(transform: Callable[[Callable[..., Tensor]], Any]) -> None:
    for ours, theirs in zip(tree_leaves(transform(op)), tree_leaves(transform(plain)), strict=True):
        assert torch.allclose(ours, theirs, 1e-12, 1e-12)


def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).square().sum()


FUNCTIONAL: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(loss(f), (0, 1, 2, 3))(Q, K, V, BIAS),
    "grad of grad": lambda f: torch.func.grad(loss(torch.func.grad(loss(f))))(Q),
    "jvp": lambda f: torch.func.jvp(f, (Q, K, V, BIAS), (Q + 1, K - 1, V * 2, BIAS)),
    "jacrev": lambda f: torch.func.jacrev(f)(Q),
    "jacfwd": lambda f: torch.func.jacfwd(f)(Q),
    "hessian": lambda f: torch.func.hessian(loss(f))(Q),
    "vmap": lambda f: torch.vmap(f, (2, None, None, 0), 1)(
        draw(B, H, 3, T, D), K, V, draw(3, 1, H, T, S)
    ),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(loss(f)))(draw(3, B, H, T, D)),
    "grad of vmap": lambda f: torch.func.grad(lambda q: torch.vmap(f)(q).square().sum())(
        draw(3, B, H, T, D)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_torch_func(name: str) -> None:
    same(FUNCTIONAL[name])


def test_forward_mode() -> None:
    def tangents(f: Callable[..., Tensor]) -> Any:
        with forward_ad.dual_level():
            q, bias = forward_ad.make_dual(Q, Q + 1), forward_ad.make_dual(BIAS, BIAS - 1)
            return tuple(forward_ad.unpack_dual(f(q, K, V, bias)))

    same(tangents)


def test_dropout_under_torch_func_draws_the_same() -> None:
    q = Q.clone().requires_grad_()
    loss(lambda q: op(q, dropout=0.4))(q).backward()
    expected = torch.func.grad(loss(lambda q: op(q, dropout=0.4)))(Q)
    assert torch.allclose(q.grad, expected, 1e-12, 1e-12)


def test_vmap_of_the_backward_operator() -> None:
    kwargs = {"program": PROGRAM, "scale": 0.3, "dropout": 0.0}
    args = (Q, K, V, [PADDING, BIAS], [], None)
    saved = attention(*args, **kwargs)
    grads = draw(3, B, H, T, D)

    def backward(grad: Tensor) -> Any:
        return attention_backward(grad, *args, *saved, [False, True], **kwargs)

    for i, expected in enumerate(map(backward, grads)):
        for ours, one in zip(
            tree_leaves(torch.vmap(backward)(grads)), tree_leaves(expected), strict=True
        ):
            assert torch.equal(ours[i], one)


def test_second_order_raises() -> None:
    q = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(op)(q), q, create_graph=True)
    (expected,) = torch.autograd.grad(loss(plain)(q), q)
    assert torch.allclose(first, expected, 1e-12, 1e-12)
    with pytest.raises(UnsupportedCall, match="first derivatives only"):
        first.sum().backward()


def test_forward_over_reverse_raises() -> None:
    q = Q.clone().requires_grad_()
    out = op(q)
    with forward_ad.dual_level(), pytest.raises(UnsupportedCall, match="dual level"):
        torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), out.detach()))


def test_batched_gradients_raise() -> None:
    q = Q.clone().requires_grad_()
    out = op(q)
    with pytest.raises(RuntimeError, match="attention_backward"):
        torch.autograd.grad(out, q, torch.stack([out, out]).detach(), is_grads_batched=True)


def test_lse_has_no_gradient() -> None:
    kwargs = {"program": PROGRAM, "scale": 0.3, "dropout": 0.0}
    _, lse = attention(Q.clone().requires_grad_(), K, V, [PADDING, BIAS], [], None, **kwargs)
    assert not lse.requires_grad


# ---------------------------------------------------------------- compile, export, checkpoint


class Model(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seed: Tensor, padding: Tensor
    ) -> Tensor:
        program = "score: dot + t1[0, h, q, k]; mask: (k <= q + n0) & t0[b, k]; empty: uniform"
        ints = [k.shape[2] - q.shape[2]]
        out, _ = attention(
            q, k, v, [padding, bias], ints, seed, program=program, scale=0.3, dropout=0.3
        )
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1) * 2


def inputs(batch: int, rows: int, keys: int) -> list[Tensor]:
    shapes = ((batch, H, rows, D), (batch, G, keys, D), (batch, G, keys, D), (1, H, rows, keys))
    floats = [draw(*shape, seed=rows).float().requires_grad_() for shape in shapes]
    return [*floats, SEED, draw(batch, keys) > -0.5]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_for_all_lengths(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(Model(), backend=counter, dynamic=True, fullgraph=True)
    for sizes in ((4, 11, 13), (5, 17, 19), (7, 23, 29)):
        ours, theirs = inputs(*sizes), inputs(*sizes)
        out, expected = compiled(*ours), Model()(*theirs)
        assert torch.allclose(out, expected, 1e-6, 1e-6)
        out.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert torch.allclose(a.grad, b.grad, 1e-5, 1e-6)
    assert counter.frame_count == 1


def test_export_keeps_the_operator() -> None:
    exported = torch.export.export(Model(), tuple(inputs(4, 11, 13)))
    targets = [str(n.target) for n in exported.graph.nodes]
    assert "attn_compiler.attention.default" in targets
    given = inputs(4, 11, 13)
    assert torch.equal(exported.module()(*given), Model()(*given))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    def call(q: Tensor) -> Tensor:
        seed = torch.randint(2**62, (1,))
        kwargs = {"program": PROGRAM, "scale": 0.3, "dropout": 0.3}
        return attention(q, K, V, [PADDING, BIAS], [], seed, **kwargs)[0].square().sum()

    first, second = (Q.clone().requires_grad_() for _ in range(2))
    torch.manual_seed(1)
    checkpoint(call, first, use_reentrant=reentrant).backward()
    torch.manual_seed(1)
    call(second).backward()
    assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("score", ["dot", "tanh(dot)"])
def test_autocast_does_not_reach_inside(score: str) -> None:
    program = f"score: {score}; mask: k <= q; empty: any"
    kwargs = {"program": program, "scale": 0.3, "dropout": 0.0}
    q, k, v = (x.float().requires_grad_() for x in (Q, K, V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention(q, k, v, [], [], None, **kwargs)
        out.sum().backward()
    expected, _ = reference(q, k, v, [], [], program, 0.3)
    assert out.dtype == torch.float32
    assert torch.allclose(out, expected, 1e-5, 1e-6)


def test_inference_mode_and_a_written_result() -> None:
    with torch.inference_mode():
        assert torch.equal(op(Q), op(Q.clone()))
    out = op(Q)
    assert torch.equal(out.mul_(2), 2 * op(Q))


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(loss(op)(x), x)[0] for x in [Q.clone().requires_grad_()] * 2]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    register_flops()
    with FlopCounterMode(display=False) as counter:
        op(Q.clone().requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * B * H * T * S * D * (2 + 5)
