"""The ways to compute one case: our kernels, PyTorch's, FlexAttention.

    forward(call)["triton"]()   ->   Way(call=flash_triton.forward ..., facts={"tile": ...})

Each is made when it is wanted, so that what fails to be made costs no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import KERNELS, Case
from gpu_timing import Machine, NotHere, Way
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem, Template
from attn_compiler.cost.search import choose
from attn_compiler.kernels import flash_gluon, flash_triton, flash_triton_backward
from attn_compiler.kernels.frame import Frame, Inputs
from attn_compiler.kernels.gpu_tiles import backward_tiles, forward_tile
from attn_compiler.kernels.launch import Launch, Tile

TILED = ("tiles", "tiles backward")
_ALONE: dict[str, Template] = {"queries": "queries", "keys_and_values": "keys_and_values"}
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A case with its tensors, q, k, v in the layout of a model: heads beside features."""

    case: Case
    machine: Machine
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    reads: list[Tensor]

    @staticmethod
    def of(case: Case, machine: Machine) -> Call:
        s = case.sizes

        def drawn(length: int, heads: int) -> Tensor:
            x = torch.randn(s.B, length, heads, s.d, device=machine.device, dtype=machine.dtype)
            return x.transpose(1, 2)

        reads = [read.to(machine.device) for read in case.plan.reads(s, case.density)]
        tensors = [drawn(s.T, s.H), drawn(s.S, s.G), drawn(s.S, s.G), drawn(s.T, s.H)]
        return Call(case, machine, *tensors, reads)

    @property
    def scale(self) -> float:
        return float(self.case.sizes.d**-0.5)

    @property
    def given(self) -> Inputs:
        plan, s = self.case.plan, self.case.sizes
        return Inputs.of(
            self.q, self.k, self.v, self.reads, list(plan.ints(s)), None,
            program=plan.program, scale=self.scale, dropout=0.0,
        )  # fmt: skip

    @property
    def problem(self) -> Problem | None:
        """For the cost model; None where what a row sees is no band."""
        plan, s = self.case.plan, self.case.sizes
        if plan.band is None:
            return None
        left, right = plan.band(s)
        size = self.machine.dtype.itemsize
        return Problem(
            s.B, s.H, s.G, s.T, s.S, s.d, s.d, size, left=left, right=right, extra=plan.extra
        )

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v


Maker = Callable[[Call], Way]


def makers(call: Call) -> dict[str, Callable[[], Way]]:
    """Of every way that the case names; of its numbered tiles those that there are."""
    backward, found = call.case.section.endswith("backward"), {}
    tiles = {kind: others(call, kind) for kind in KERNELS if call.case.section in TILED}
    for name in call.case.ways:
        kind, _, number = name.partition(" ")
        if not number or kind not in tiles or int(number) < len(tiles[kind]):
            found[name] = partial(_maker(name, backward), call)
    return found


def _maker(name: str, backward: bool) -> Maker:
    kind, _, number = name.partition(" ")
    if name in SDPA:
        return partial(_sdpa_backward if backward else _sdpa, name)
    if kind == "tile":
        return partial(_liked, int(number))
    if kind in _ALONE:
        return partial(_one_kernel, kind, int(number) if number else None)
    if kind == "splits":
        return partial(_split, int(number))
    return (_BACKWARD if backward else _FORWARD)[name]


# ---------------------------------------------------------------- ours


def picked(call: Call) -> Tile:
    """What `kernels.gpu` would launch."""
    return forward_tile(call.given, call.machine.family, call.machine.hardware)


def _triton(call: Call, tile: Tile | None = None) -> Way:
    given, tile = call.given, tile or picked(call)
    if not call.machine.family:
        raise NotHere("Triton uses no matrix units here")
    if reason := flash_triton.refusal(given):
        raise NotHere(reason)

    def compiled() -> Mapping[str, Any]:
        out, lse = flash_triton.forward(Frame(given), tile)
        return _takes(flash_triton.prepare(Frame(given), tile, *_parts(tile, out, lse)))

    facts = {"tile": asdict(tile), "template": "forward"}
    return Way(lambda: flash_triton.forward(Frame(given), tile), facts, compiled)


def _parts(tile: Tile, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    if tile.splits == 1:
        return out[None], lse[None]
    part, part_lse = (
        torch.empty((tile.splits, *x.shape), dtype=torch.float32, device=x.device)
        for x in (out, lse)
    )
    return part, part_lse


def _takes(launch: Launch) -> dict[str, Any]:
    """Registers, spilled registers and shared memory, as the driver says."""
    kernel = launch.kernel[launch.grid](*launch.args, **launch.constants)
    return {
        "registers": kernel.n_regs,
        "spills": kernel.n_spills,
        "shared": kernel.metadata.shared,
    }


def others(call: Call, kind: str = "tile") -> list[Tile]:
    """All tiles that the cost model may choose for a call, the best first, without the picked one;
    none where it knows nothing.

    Args:
        kind: of `gpu_cases.KERNELS`.
    """
    if call.problem is None or not call.machine.family:
        return []
    # without a GPU that of the family which the machine stands for
    hardware = call.machine.hardware or Hardware.named("a100")
    own = picked(call)
    template: Template = "forward"
    if kind in _ALONE:
        template, own = _ALONE[kind], _backward_tile(call, kind)
    tiles = [
        Tile(t.block_m, t.block_n, t.warps, t.stages, t.heads, t.splits, own.descriptors)
        for t, _ in choose(hardware, call.problem, template)
    ]
    return [tile for tile in tiles if tile != own]


def _backward_tile(call: Call, kind: str) -> Tile:
    """The picked one of a kernel."""
    by_key, by_row = backward_tiles(call.given, call.machine.family, call.machine.hardware)
    return by_row if kind == "queries" else by_key


def _liked(number: int, call: Call) -> Way:
    return _triton(call, others(call)[number])


def _split(number: int, call: Call) -> Way:
    return _triton(call, replace(picked(call), splits=number))


def _dense(call: Call) -> Way:
    """The same sizes without the map of blocks."""
    case = replace(call.case, rule="full", section="forward")
    way = _triton(replace(call, case=case, reads=[]))
    s = case.sizes
    facts = {**way.facts, "flops": 4.0 * s.B * s.H * s.T * s.S * s.d}
    return replace(way, facts=facts, compared=False)


def _gluon(call: Call) -> Way:
    if not call.machine.cuda:
        raise NotHere("needs a GPU")
    capability = torch.cuda.get_device_capability(call.machine.device)
    if capability != (9, 0):
        raise NotHere(f"is for capability 9.0, this is {'.'.join(map(str, capability))}")
    given = call.given
    if reason := flash_gluon.refusal(given):
        raise NotHere(reason)
    tile = flash_gluon.usual_tile(given)

    def compiled() -> Mapping[str, Any]:
        out, lse = flash_gluon.forward(Frame(given), tile)
        return _takes(flash_gluon.prepare(Frame(given), tile, out, lse))

    facts = {"tile": asdict(tile), "template": "forward_hopper"}
    return Way(lambda: flash_gluon.forward(Frame(given), tile), facts, compiled)


def _triton_backward(call: Call) -> Way:
    given, saved, tiles = _before_backward(call)
    return Way(
        lambda: flash_triton_backward.backward(Frame(given), call.grad, saved, {}, tiles),
        {"tile": asdict(tiles[0]), "opposite tile": asdict(tiles[1])},
    )


def _one_kernel(name: str, number: int | None, call: Call) -> Way:
    """A kernel of the backward by itself, after the one that prepares for it.

    Args:
        number: of its tile, None for the picked one.
    """
    given, saved, (by_key, by_row) = _before_backward(call)
    tile = _backward_tile(call, name) if number is None else others(call, name)[number]
    tiles = (by_key, tile) if name == "queries" else (tile, by_row)
    launches = flash_triton_backward.prepare_backward(
        Frame(given), call.grad, saved, {}, tiles, _gradients(call)
    )
    launches[0].run()
    launch = launches[1 if name == "queries" else 2]
    facts = {"tile": asdict(tile), "template": name}
    return Way(launch.run, facts, lambda: _takes(launch), compared=False)


# of the last call alone: many ways share it
@lru_cache(maxsize=1)
def _before_backward(call: Call) -> tuple[Inputs, tuple[Tensor, Tensor], tuple[Tile, Tile]]:
    given = call.given
    if not call.machine.family:
        raise NotHere("Triton uses no matrix units here")
    saved = flash_triton.forward(Frame(given), picked(call))
    return given, saved, backward_tiles(given, call.machine.family, call.machine.hardware)


@lru_cache(maxsize=1)
def _gradients(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Where kernels by themselves write."""
    return torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)


# ---------------------------------------------------------------- theirs


def _sdpa_out(name: str, call: Call, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    shared = call.case.sizes.H != call.case.sizes.G
    causal = call.case.rule == "causal"
    with sdpa_kernel(SDPA[name]):
        return F.scaled_dot_product_attention(
            *qkv, is_causal=causal, scale=call.scale, enable_gqa=shared
        )


def _sdpa(name: str, call: Call) -> Way:
    _expressible(call)
    return Way(lambda: _sdpa_out(name, call, (call.q, call.k, call.v)))


def _sdpa_backward(name: str, call: Call) -> Way:
    _expressible(call)
    leaves = call.leaves()
    return _derivative(_sdpa_out(name, call, leaves), leaves, call)


def _expressible(call: Call) -> None:
    if call.case.rule not in ("full", "causal"):
        raise NotHere("SDPA has no such score")


def _derivative(out: Tensor, leaves: tuple[Tensor, ...], call: Call) -> Way:
    return Way(lambda: torch.autograd.grad(out, leaves, call.grad, retain_graph=True))


def _flex_call(call: Call) -> Callable[..., Tensor]:
    """Compiled on a GPU; a CPU only shows that its rule is the same as ours."""
    plan, s = call.case.plan, call.case.sizes
    mask = plan.block_mask(s, call.reads, call.machine.device)
    attend: Any = torch.compile(flex_attention, dynamic=False) if call.machine.cuda else _plain_flex
    return partial(
        attend,
        score_mod=plan.flex_score(s, call.reads),
        block_mask=mask,
        scale=call.scale,
        enable_gqa=s.H != s.G,
    )


def _plain_flex(*qkv: Tensor, **options: Any) -> Tensor:
    # a CPU refuses gradients here, so it sees none of them
    attend: Any = flex_attention
    with torch.no_grad():
        return attend(*qkv, **options)


def _flex(call: Call) -> Way:
    attend = _flex_call(call)
    return Way(lambda: attend(call.q, call.k, call.v))


def _flex_backward(call: Call) -> Way:
    if not call.machine.cuda:
        raise NotHere("FlexAttention has no backward here")
    leaves = call.leaves()
    return _derivative(_flex_call(call)(*leaves), leaves, call)


_FORWARD: dict[str, Maker] = {"triton": _triton, "gluon": _gluon, "dense": _dense, "flex": _flex}
_BACKWARD: dict[str, Maker] = {
    "triton": _triton_backward,
    "flex": _flex_backward,
}
