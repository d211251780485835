"""Where F of Selective attention lives, by the cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attn_compiler.cost import subtracting
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem
from attn_compiler.cost.subtracting import Form, choose, forms

H200 = Hardware.named("h200")


def problem(length: int, dim: int = 128, batch: int = 1, heads: int = 16) -> Problem:
    return Problem(batch, heads, heads, length, length, dim, dim, right=0)


@pytest.mark.parametrize(
    ("device", "length", "dim", "backward", "kind"),
    [
        ("h200", 2048, 64, False, "tensor"),
        ("h200", 8192, 128, False, "tensor"),
        ("l4", 8192, 64, False, "tensor"),
        ("l4", 32768, 128, False, "inside"),  # no band of F fits into its cache and fills it
        ("l4", 32768, 128, True, "inside"),
        ("b200", 8192, 64, True, "inside"),
        ("b200", 8192, 128, False, "tensor"),
    ],
)
def test_bytes_of_f_against_operations(
    device: str, length: int, dim: int, backward: bool, kind: str
) -> None:
    given = problem(length, dim, heads=32 if length > 8192 else 16)
    assert choose(Hardware.named(device), given, dim, backward=backward).kind == kind


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("length", [4096, 32768, 131072, 524288])
def test_memory(length: int, backward: bool) -> None:
    """What exists for F at one time stays a small share of the device's memory, and is far from
    T x T numbers of long sequences; only where even carries are more, the least is taken.
    """
    found = choose(H200, problem(length), 128, backward=backward)
    least = min(f.bytes for f in forms(H200, problem(length), 128, backward))
    assert found.bytes <= max(H200.dram / 32, least)
    if length > 8192:
        assert found.bytes < 4 * length**2 / 16


def test_the_counts() -> None:
    """A pair costs 4 bytes written and, beyond the last cache, 4 read by every head; made inside it
    costs 2 e operations a head. With memory without end reading costs nothing, with matrix units
    without end making does.
    """
    given = problem(32768)
    rich = replace(H200, dram_rate=1e18, l2_rate=1e12)
    slow = replace(H200, dram_rate=1e11, l2_rate=100)
    for backward in (False, True):
        whole, *_ = forms(rich, given, 128, backward)
        inside = next(f for f in forms(rich, given, 128, backward) if f.kind == "inside")
        pairs, products = 32768**2 / 2 * 16, 7 if backward else 2
        rate = H200.clock * H200.sustained * H200.processors * H200.flops16
        plain = 2 * pairs * 128 * products / rate
        extra = 2 * pairs * 128 * (2 if backward else 1) / rate
        assert plain < whole.seconds < inside.seconds
        assert inside.seconds - whole.seconds > 0.9 * extra
        assert choose(rich, given, 128, backward=backward).kind == "tensor"
        assert choose(slow, given, 128, backward=backward).kind == "inside"
        assert choose(slow, given, 128, backward=backward, inside=False).kind == "tensor"
    tensor = forms(slow, given, 128, False)[0]
    assert tensor.bytes == 4 * 32768**2
    assert tensor.seconds > 4 * 17 * 32768**2 / 2 / 1e11


def test_bands_fit_into_the_last_cache_where_that_helps() -> None:
    """An L4's memory is slow beside its cache."""
    found = choose(Hardware.named("l4"), problem(8192, 64), 64, backward=False)
    assert found.rows < 8192 and 4 * found.rows * 8192 <= Hardware.named("l4").l2 / 2


@pytest.mark.parametrize("inside", [False, True])
def test_of_an_unknown_device(inside: bool) -> None:
    kind = "inside" if inside else "tensor"
    assert subtracting.unknown(5000, inside=inside) == Form(kind, 1024, 0.0, 0.0)
    assert subtracting.unknown(37, inside=inside).rows == 37
