"""Times of PyTorch's own attention kernels on a GPU: the share of the peak that they are known for.

    H200, head dim 128, long sequences:   cuDNN 0.70 x 989 TFLOP/s,   FlashAttention 0.37 x 989

Only kernels that are really called are given (`kernels.sdpa_gpu`, `kernels.gpu`): cuDNN's on Hopper
and Blackwell, neither for a short query.

Source of the shares: NVIDIA's benchmark files of cuDNN 9.19 on an H200; the FlashAttention-2 and -3
papers' figures on an A100 and an H100; PyTorch's issue tracker for cuDNN on Ampere and Ada. They
are of long sequences on one machine each: good for a ranking, not for a promise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from attn_compiler.cost.calibration import Calibration
from attn_compiler.cost.hardware import Hardware
from attn_compiler.cost.problem import SHORT, Problem, Template, TileConfig, blocks, visible
from attn_compiler.cost.roofline import Time
from attn_compiler.cost.search import choose

Peer = Literal["cudnn", "flash"]
# by architecture: head dims up to 64, up to 128, above
_FORWARD: dict[Peer, dict[str, tuple[float, float, float]]] = {
    "cudnn": {"sm_90": (0.42, 0.70, 0.0), "sm_100": (0.45, 0.65, 0.0)},
    "flash": {"sm_80": (0.6, 0.64, 0.55), "sm_90": (0.33, 0.375, 0.3), "sm_100": (0.2, 0.25, 0.2)},
}
_NONE = (0.0, 0.0, 0.0)
# of the forward's share
_BACKWARD = 0.85
_ROWS = 128
# the widest head, and what its width is a multiple of
_WIDEST, _ALIGNED = 256, 8
# by how much a share from one device may be off on another (assumed)
_DOUBT = 1.4


def peers(hardware: Hardware, problem: Problem, backward: bool = False) -> dict[Peer, Time]:
    """The kernels that can express a call on a device, with their times.

    Args:
        backward: of the backward pass, five products for the forward's two.
    """
    if hardware.kind != "nvidia" or not _plain(problem):
        return {}
    # consumer and inference parts run the code of Ampere
    arch = hardware.arch if hardware.arch in _FORWARD["flash"] else "sm_80"
    if int(hardware.arch.removeprefix("sm_")) < 80:
        return {}
    row = 0 if problem.head_dim <= 64 else 1 if problem.head_dim <= 128 else 2
    found: dict[Peer, Time] = {}
    for name, shares in _FORWARD.items():
        share = shares.get(arch, _NONE)[row] * (_BACKWARD if backward else 1.0)
        if share > 0:
            found[name] = _time(hardware, problem, share, backward)
    return found


def predicted(hardware: Hardware, problem: Problem, work: str = "forward") -> dict[str, float]:
    """Seconds of PyTorch's kernels that can express a call, and of the generated ones ("triton").

    Args:
        work: "forward" or "backward".
    """
    found: dict[str, float] = {
        name: time.seconds for name, time in peers(hardware, problem, work == "backward").items()
    }
    templates: tuple[Template, ...] = (
        ("forward",) if work == "forward" else ("queries", "keys_and_values")
    )
    tiles = [choose(hardware, problem, template) for template in templates]
    if all(tiles):
        found["triton"] = sum(each[0][1].seconds for each in tiles)
    return found


@lru_cache(maxsize=1024)
def order(
    hardware: Hardware, problem: Problem, names: tuple[str, ...], work: str = "forward"
) -> tuple[str, ...]:
    """Implementations by the predicted seconds of a class of shapes.

    Nobody shall get something slower than before, and these shares are other machines': until its
    device is calibrated a generated kernel goes behind PyTorch's unless it is predicted faster by
    more than such shares are off.

    Args:
        problem: as `Problem.bucketed` gives it.
    """
    seconds = {n: s for n, s in predicted(hardware, problem, work).items() if n in names}
    if hardware.mark != "measured" and "triton" in seconds:
        seconds["triton"] *= _DOUBT
    unknown = 2 * max(seconds.values(), default=0.0)
    return tuple(sorted(names, key=lambda name: seconds.get(name, unknown)))


def _plain(problem: Problem) -> bool:
    """Is it what `scaled_dot_product_attention` can say without a mask tensor, and fast kernels
    take?
    """
    banded = problem.right is not None or problem.left is not None
    causal = problem.right == 0 and problem.left is None and problem.shift == 0
    square = problem.rows == problem.keys
    width = problem.head_dim
    fits = width == problem.value_dim and width <= _WIDEST and width % _ALIGNED == 0
    known = problem.itemsize == 2 and fits and problem.rows > SHORT
    return known and not problem.extra and (not banded or (causal and square))


def _time(hardware: Hardware, problem: Problem, share: float, backward: bool) -> Time:
    fit = Calibration()
    pairs = problem.batch * problem.heads * visible(problem)
    flops = (5 if backward else 2) * 2 * pairs * problem.head_dim
    queries = problem.batch * problem.heads * problem.rows * problem.head_dim
    keys = problem.batch * problem.kv_heads * problem.keys * problem.head_dim
    moved = problem.itemsize * 2 * (queries + keys) * (2 if backward else 1)
    # programs of one block of rows; a device that they do not fill waits
    tile = TileConfig(_ROWS, _ROWS, 4, 2)
    work = blocks(problem, "forward", tile)
    programs, tiles = sum(n for n, _ in work), sum(n * t for n, t in work)
    longest = max(t for _, t in work) if work else 1.0
    even = tiles / hardware.processors
    wait = max(1.0, longest / even) if programs and even else 1.0
    tensor = flops / (hardware.peak16 * share) * wait
    dram = moved / (hardware.dram_rate * fit.dram)
    launch = (3 if backward else 1) * fit.launch
    limit = "dram" if dram > tensor else "waves" if wait > 1.25 else "tensor"
    parts = (("tensor", tensor), ("dram", dram), ("launch", launch))
    return Time(launch + max(tensor, dram), limit, parts)
