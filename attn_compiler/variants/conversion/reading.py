"""The maps of a trained layer and its rotation, out of what its ear was answered.

    zeros                               ->   biases
    unit vectors                        ->   W_Q, W_K, W_V, W_O
    one vector at all positions         ->   how queries and keys turn from position to position

A rotation turns pairs of channels, each at a speed of its own; channels are put in the order of
`kernels.switchhead.turned`, which changes no score. What was read is compared with what the layer
computes; a layer that is something else is refused.

Source: derived from RoFormer (arXiv 2104.09864), equation 15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_compiler.ir.site import Reason
from attn_compiler.kernels.switchhead import Rotate, Scores, turned
from attn_compiler.variants.conversion.ear import LARGE, Answer, Call, Ear, Question
from attn_compiler.variants.conversion.ordinary import Given, Ordinary, calls, computed

_WIDE = torch.float64
# a channel that mixes less with all others does not turn; how far turns may be from even ones, and
# the outputs of what was read from those of the layer
_STILL = 1e-4
_UNEVEN = 0.02
_MISREAD = 0.01


class Unreadable(Exception):
    """A layer that is no ordinary one, and why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Read:
    """A layer that was read.

    Attributes:
        layer: in double; what its scores read, `given` brings for each call.
        speeds: radians a position for each pair of channels, halves of the first ones.
    """

    layer: Ordinary
    speeds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Answers:
    zero: Answer
    units: Sequence[Answer]
    constant: Sequence[Answer]


def ask(ears: Sequence[Ear], run: Callable[[], object]) -> list[Read | Unreadable]:
    """Read layers, all at once.

    Args:
        ears: of layers that have heard `run` once, and nothing since.
        run: runs the model on one batch.
    """
    heard = [ear.calls[0] for ear in ears]
    zero = _answers(ears, run, Question("zero"))
    units = max(_runs(call, answer) for call, answer in zip(heard, zero, strict=True))
    asked = [_answers(ears, run, Question("units", n)) for n in range(units)]
    samples = max(_samples(answer) for answer in zero)
    even = [_answers(ears, run, Question("constant", n)) for n in range(samples)]
    found: list[Read | Unreadable] = []
    for place, (ear, call) in enumerate(zip(ears, heard, strict=True)):
        answers = _Answers(zero[place], [a[place] for a in asked], [a[place] for a in even])
        try:
            found.append(_read(ear, call, answers))
        except Unreadable as refusal:
            found.append(refusal)
    return found


def _answers(ears: Sequence[Ear], run: Callable[[], object], question: Question) -> list[Answer]:
    for ear in ears:
        ear.question, ear.answers = question, []
    try:
        run()
        return [ear.answers[0] for ear in ears]
    finally:
        for ear in ears:
            ear.question, ear.answers = None, []


def _runs(call: Call, answer: Answer) -> int:
    """Runs until every unit vector was asked."""
    sides = [(x.shape[2], x.shape[0] * x.shape[1]) for x in (call.x_q, call.x_k, call.x_v)]
    batch, heads, rows, _ = answer.q.shape
    sides.append((heads * answer.v.shape[3], batch * rows))
    return max(-(-width // number) for width, number in sides)


def _samples(answer: Answer) -> int:
    """Runs until there are twice as many vectors as channels."""
    batch, _, _, width = answer.q.shape
    return -(-2 * width // (batch * min(answer.q.shape[1], answer.k.shape[1])))


# ---------------------------------------------------------------- one layer


def given(call: Call, ear: Ear) -> Given:
    """A call as conversions read it."""
    scores = Scores(ear.program, call.reads, call.ints, ear.scale)
    return Given(call.x_q, call.x_k, scores)


def _read(ear: Ear, call: Call, answers: _Answers) -> Read:
    if call.cached:
        raise Unreadable(
            Reason("switchhead.convert_cache", "calibration was run with a cache that held tokens")
        )
    if call.x_v is not call.x_k:
        raise Unreadable(
            Reason("switchhead.convert_sources", "keys and values are made of two tensors")
        )
    order, speeds = _rotation_of(answers, ear.turns)
    rotate = (_rotation(speeds), _rotation(speeds)) if speeds else None
    w_q, w_k, w_v = (_units(answers, name) for name in "qkv")
    w_q, w_k = (_unturned(w[..., order], speeds) for w in (w_q, w_k))
    b_q, b_k, b_v = (getattr(answers.zero, name)[0, :, 0].to(_WIDE) for name in "qkv")
    w_q, w_k, w_v = (_rows(w, x) for w, x in ((w_q, call.x_q), (w_k, call.x_k), (w_v, call.x_v)))
    layer = Ordinary(
        w_q, w_k, w_v, _outputs(answers), _bias(b_q[:, order]), _bias(b_k[:, order]), _bias(b_v),
        _bias(answers.zero.y[0, 0].to(_WIDE)), Scores(ear.program, scale=ear.scale), rotate,
    )  # fmt: skip
    _check(layer, call, ear)
    return Read(layer, speeds)


def _bias(x: Tensor) -> Tensor | None:
    return x if bool(x.any()) else None


def _units(answers: _Answers, name: str) -> Tensor:
    """What unit vectors became, wherever they stood: [runs, B, heads, T, d]."""
    zero = getattr(answers.zero, name).to(_WIDE)
    found = torch.stack([getattr(a, name).to(_WIDE) for a in answers.units])
    return torch.div(found - zero, LARGE)


def _rows(found: Tensor, x: Tensor) -> Tensor:
    """[heads, D, d] of [runs, B, heads, T, d], in the order in which they were asked."""
    rows = found.permute(2, 0, 1, 3, 4).flatten(1, 3)
    return rows[:, : x.shape[2]].contiguous()


def _outputs(answers: _Answers) -> Tensor:
    """W_O [H, dv, D]."""
    found = torch.stack([a.y.to(_WIDE) for a in answers.units]) - answers.zero.y.to(_WIDE)
    heads, width = answers.zero.q.shape[1], answers.zero.v.shape[3]
    rows = torch.div(found, LARGE).flatten(0, 2)[: heads * width]
    return rows.view(heads, width, -1)


def _check(layer: Ordinary, call: Call, ear: Ear) -> None:
    """Does it compute what the layer does?"""
    ((wide, found),) = calls(layer, [given(call, ear)])
    ours, theirs = computed(wide, found), call.y.to(_WIDE)
    sound = ours.isfinite() & theirs.isfinite()
    missed = (ours - theirs)[sound].norm() / theirs[sound].norm().clamp_min(1e-30)
    if not bool(sound.any()) or float(missed) > _MISREAD:
        text = "its maps, as they were read, do not give what the layer gives"
        raise Unreadable(Reason("switchhead.convert_unread", text))


# ---------------------------------------------------------------- rotation


def _rotation_of(answers: _Answers, turns: bool) -> tuple[list[int], tuple[float, ...]]:
    """An order of the channels of queries and keys, and the speeds of the pairs in front."""
    sides = {name: _constants(answers, name) for name in "qkv"}
    moved = {name: _moves(x) for name, x in sides.items()}
    if moved["v"] or moved["q"] != moved["k"]:
        text = "values, or one of queries and keys, depend on the position"
        raise Unreadable(Reason("switchhead.convert_rotation", text))
    if turns and sides["q"].shape[0] == 1:
        text = "a rotation cannot be seen in calls of one token"
        raise Unreadable(Reason("switchhead.convert_rotation", text))
    if not moved["q"]:
        return list(range(sides["q"].shape[2])), ()
    return _pairs([torch.linalg.pinv(x[0]) @ x for x in (sides["q"], sides["k"])])


def _constants(answers: _Answers, name: str) -> Tensor:
    """What random vectors became at each position: [T, samples, d]."""
    zero = getattr(answers.zero, name).to(_WIDE)
    found = torch.cat([getattr(a, name).to(_WIDE) - zero for a in answers.constant])
    return found.permute(2, 0, 1, 3).flatten(1, 2)


def _moves(x: Tensor) -> bool:
    return float((x - x[0]).abs().max()) > _STILL * float(x.abs().max())


def _pairs(turns: Sequence[Tensor]) -> tuple[list[int], tuple[float, ...]]:
    """The same, out of what leads from the first position to each: [T, d, d] of queries and keys,
    multiplied from the right.
    """
    mean = torch.stack(list(turns)).mean(0)
    width = mean.shape[1]
    apart = 1 - torch.eye(width).to(mean)
    most, partner = (mean.abs().amax(0) * apart).max(1)
    speeds: dict[tuple[int, int], float] = {}
    for a, b in enumerate(partner.tolist()):
        if float(most[a]) > _STILL and a < b:
            speed = _speed(mean, a, b)
            speeds[(a, b) if speed > 0 else (b, a)] = abs(speed)
    order = [a for a, _ in speeds] + [b for _, b in speeds]
    order += [c for c in range(width) if c not in order]
    found = tuple(float(f"{speed:.8g}") for speed in speeds.values())
    unit = torch.eye(width).to(mean)[None, :, None].expand(1, -1, len(mean), -1)
    even = _rotation(found)(unit)[0].transpose(0, 1)
    if sorted(order) != list(range(width)) or any(
        float((turn[:, order][..., order] - even).abs().max()) > _UNEVEN for turn in turns
    ):
        text = "queries and keys are not turned in pairs of channels, each at one speed"
        raise Unreadable(Reason("switchhead.convert_rotation", text))
    return order, found


def _speed(turn: Tensor, a: int, b: int) -> float:
    """Radians a position, ever more exactly over longer ways."""
    sines, cosines = turn[:, a, b] - turn[:, b, a], turn[:, a, a] + turn[:, b, b]
    angles = torch.atan2(sines, cosines).tolist()
    last, speed, way = len(angles) - 1, 0.0, 1
    while True:
        rest = angles[way] - angles[0] - speed * way
        speed += math.remainder(rest, 2 * math.pi) / way
        if way == last:
            return speed
        way = min(2 * way, last)


def _rotation(speeds: Sequence[float]) -> Rotate:
    def rotate(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2], device=x.device)
        return turned(x, positions, torch.tensor(speeds, dtype=_WIDE, device=x.device))

    return rotate


def _unturned(found: Tensor, speeds: Sequence[float]) -> Tensor:
    """[runs, B, heads, T, d] as they would be at the first position."""
    if not speeds:
        return found
    back = _rotation([-speed for speed in speeds])
    return back(found.flatten(0, 1)).view_as(found)
