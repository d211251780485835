"""Where F of Selective attention should live: in a tensor that its heads read, or nowhere at all.

    tensor   4 bytes a pair, written once and read by every head: from the last cache where a band
             of rows fits into it, from memory otherwise; each band costs its launches
    inside   every head multiplies the selecting query and key again and sums up, 2 e operations of
             the matrix units and a scan a pair; only one number for a key and some rows is kept

Backward, both read or make F twice and have its gradient as a tensor of a band of rows. What both
forms do alike beside attention itself is left out. The fastest form that leaves memory alone wins;
of forms that are nearly as fast the one that needs least.

Source: the roofline of `cost.roofline`; the counts are those of the two passes of Selective
Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import Problem
from attn_compiler.cost.roofline import together
from attn_compiler.cost.work import matrix_rate

Kind = Literal["tensor", "inside"]
# a band has whole tiles of so many rows
TILE = 128
# rows of a program, and of a number that is kept for each key
_ROWS, _CARRY = 64, 32
# operations beside products: of a score, of a place of F that is read, of one that is made
_OTHER, _READ, _MADE = 5, 1, 12
# of the device's memory that F and its gradient may take beside the model
_SHARE = 1 / 32
# rows of a band where no device says
_USUAL = 1024
# forms this near to the fastest are as fast, as far as a model knows
_NEAR = 1.05


@dataclass(frozen=True, slots=True)
class Form:
    """One way.

    Attributes:
        kind: see above.
        rows: of a band; inside, of a band of the gradient.
        seconds: predicted for one pass, without what all forms do alike beside attention.
        bytes: that exist for F and its gradient at one time.
    """

    kind: Kind
    rows: int
    seconds: float
    bytes: float


@lru_cache(maxsize=1024)
def choose(
    hardware: Hardware, problem: Problem, width: int, *, backward: bool, inside: bool = True
) -> Form:
    """The form of a call.

    Args:
        problem: the attention without F.
        width: head dim of the selecting head.
        backward: of the backward pass.
        inside: whether there are kernels that make F inside.
    """
    found = [f for f in forms(hardware, problem, width, backward) if inside or f.kind == "tensor"]
    fitting = [f for f in found if f.bytes <= _SHARE * hardware.dram]
    if not fitting:
        return min(found, key=lambda f: f.bytes)
    fastest = min(f.seconds for f in fitting)
    near = [f for f in fitting if f.seconds <= _NEAR * fastest]
    return min(near, key=lambda f: (f.bytes, f.seconds))


def unknown(rows: int, *, inside: bool) -> Form:
    """The form of a device that nothing is known about: what needs least memory."""
    return Form("inside" if inside else "tensor", min(rows, _USUAL), 0.0, 0.0)


def forms(hardware: Hardware, problem: Problem, width: int, backward: bool) -> list[Form]:
    """Every form with its time and its bytes; bands are of powers of two of tiles."""
    sizes = [problem.rows]
    band = TILE
    while band < problem.rows:
        sizes.append(band)
        band *= 2
    kinds: tuple[Kind, ...] = ("tensor", "inside")
    found = [_form(hardware, problem, width, kind, n, backward) for kind in kinds for n in sizes]
    if backward:
        return found
    # there inside has no bands
    return [f for f in found if f.kind == "tensor" or f.rows == problem.rows]


def _form(
    hardware: Hardware, problem: Problem, width: int, kind: Kind, rows: int, backward: bool
) -> Form:
    p, fit = problem, Calibration()
    pairs = p.batch * p.rows * p.keys / 2
    scores, passes = pairs * p.heads, 2 if backward else 1
    flops = (
        2.0 * scores * (4 * p.head_dim + 3 * p.value_dim if backward else p.head_dim + p.value_dim)
    )
    other, exps, near, far = _OTHER * passes * scores, float(passes * scores), 0.0, 0.0
    bands = -(-p.rows // rows)
    band = 4.0 * p.batch * rows * p.keys
    held = 0.0
    if kind == "tensor":
        flops += 2 * pairs * width
        other += _READ * passes * scores
        near += 4 * passes * scores
        held += band
        far += 4 * pairs + (0 if band <= hardware.l2 / 2 else 4 * passes * scores)
        launches = (6 if backward else 4) * bands
    else:
        flops += 2 * passes * scores * width
        other += _MADE * passes * scores
        carries = 4.0 * p.batch * p.rows * p.keys / _CARRY
        held += carries
        far += carries
        launches = 4 * bands if backward else 1
    if backward:
        # the gradient of F is added up by every head, summed up and multiplied
        near += 4 * scores
        far += 8 * pairs + (0 if band <= hardware.l2 / 2 else 4 * scores)
        held += band + p.itemsize * p.batch * rows * p.keys
    programs = p.batch * p.heads * -(-rows // _ROWS)
    waves = programs / hardware.processors
    idle = -(-waves // 1) / waves
    clock = hardware.clock * hardware.sustained * hardware.processors
    tensor = flops / (clock * matrix_rate(hardware, p.itemsize, p.tf32))
    special = exps / (clock * hardware.exps) + 2 * other / (clock * hardware.flops32)
    busy = max(tensor, special) + (1 - fit.hidden) * min(tensor, special)
    seconds = together(
        busy * idle,
        near / (hardware.l2_rate * hardware.clock * fit.l2),
        far / (hardware.dram_rate * fit.dram),
    )
    return Form(kind, rows, seconds + launches * fit.launch, held)
