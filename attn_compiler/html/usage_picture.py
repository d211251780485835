"""How often each expert of a site is chosen: heads down, experts to the right.

    {"routers": {"w_s": {"shares": [[0.75, 0.25]], "evenness": [0.81]}}}

Shades are shares of the routes of a head; an expert with less than a tenth of an even share is
framed, since it hardly learns.

Source: SwitchHead (arXiv 2312.07987v3), section 5, shows the same shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attn_compiler.html.squares import outlines

SHADES = 9
_IDLE = 0.1
_MEANINGS = {"w_s": "of the keys' side", "w_d": "of the queries' side"}


@dataclass(frozen=True, slots=True)
class UsagePicture:
    """One router.

    Attributes:
        name: of its parameter.
        meaning: which side it routes, "" where it routes both.
        heads, experts: rows and columns.
        shades: path of the squares of each shade, the strongest is the most used expert.
        idle: path of the experts that are hardly used.
        count: how many these are.
        most, least: shares of the most and the least used expert.
        evenness: entropy of the shares by that of an even choice, the mean of all heads.
    """

    name: str
    meaning: str
    heads: int
    experts: int
    shades: tuple[tuple[int, str], ...]
    idle: str
    count: int
    most: float
    least: float
    evenness: float


def pictures(fact: Any) -> tuple[UsagePicture, ...]:
    """Of the routers of a site; none if nobody looked at them."""
    routers = fact.get("routers", {}) if isinstance(fact, dict) else {}
    alone = len(routers) == 1
    return tuple(_picture(name, router, alone) for name, router in routers.items())


def _picture(name: str, router: dict[str, Any], alone: bool) -> UsagePicture:
    shares: list[list[float]] = router["shares"]
    experts = len(shares[0])
    every = [share for row in shares for share in row]
    most = max(every)
    shade = [[math.ceil(SHADES * share / most) for share in row] for row in shares]
    idle = [[share < _IDLE / experts for share in row] for row in shares]
    return UsagePicture(
        name=name,
        meaning="" if alone else _MEANINGS.get(name, ""),
        heads=len(shares),
        experts=experts,
        shades=tuple(sorted((s, path) for s, path in outlines(shade).items() if s > 0)),
        idle=outlines(idle).get(True, ""),
        count=sum(map(sum, idle)),
        most=most,
        least=min(every),
        evenness=sum(router["evenness"]) / len(shares),
    )
