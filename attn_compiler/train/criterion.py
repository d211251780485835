"""When the attention maps of a model have settled.

    d_m = |reference - a_m|,   change_m = 100 |d_m - d_(m-1)| / d_(m-1) < 15 in every layer

It compares successive distances and not the maps with a fixed distance, so the third look is the
first that can say yes. Maps of a model that has learned nothing are settled in this sense, too:
batches differ, by as much each time. `skewness` asks in addition that the map of some layer is
concentrated; of maps near uniform it is 0. The authors' later method asks that of every layer,
before it turns sparse; here some layers may attend evenly for good.

Source: SPION (arXiv 2309.12578), as its authors' code has it ("code"): the reference of the third
look is still the first map, from then on it is the map before. "clean" always takes the map before.
Skewness: SAT, by the same authors (IEEE Access 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from attn_compiler.errors import BadOption


class SwitchCriterion:
    """Looks at one map of each layer at a time and says when all of them have settled.

    Attributes:
        percent: largest change that counts as settled.
        transition: "code" or "clean", see above.
        skewness: that the map of some layer must reach; None asks for none.
        looks: how many there were.
        settled: has it said yes? Then it stays so, and looks at nothing more.
        changes: the last change of each layer in percent; empty before the third look.

    Raises:
        BadOption: an option has a wrong value.
    """

    def __init__(
        self,
        percent: float = 15.0,
        transition: Literal["code", "clean"] = "code",
        skewness: float | None = None,
    ) -> None:
        if not percent > 0:
            raise BadOption(
                f"percent={percent}", where="option percent", do="give a number above 0"
            )
        if transition not in ("code", "clean"):
            raise BadOption(
                f"transition={transition!r}", where="option transition", do='give "code" or "clean"'
            )
        self.percent, self.transition, self.skewness = percent, transition, skewness
        self.looks, self.settled = 0, False
        self.changes: dict[str, float] = {}
        self._distances: dict[str, float] = {}
        self._references: dict[str, Tensor] = {}

    def look(self, maps: Mapping[str, Tensor]) -> bool:
        """Take the next map of each layer.

        Args:
            maps: by layer, of any one shape, on any device; mean probabilities of one batch.

        Returns:
            Have all layers settled, now or before?

        Raises:
            BadOption: no maps, other layers than before, or other shapes.
        """
        if self.settled:
            return True
        self._check(maps)
        self.looks += 1
        if self.looks > 1:
            before = self._distances
            self._distances = {name: self._distance(name, a) for name, a in maps.items()}
            if self.looks > 2:
                pairs = {name: (before[name], d) for name, d in self._distances.items()}
                self.changes = {name: _change(*pair) for name, pair in pairs.items()}
                still = all(c < self.percent for c in self.changes.values())
                self.settled = still and self._concentrated(maps)
        if self.settled:
            self._references = {}
        elif self.looks != 2 or self.transition == "clean":
            self._references = {name: a.detach().clone() for name, a in maps.items()}
        return self.settled

    def _check(self, maps: Mapping[str, Tensor]) -> None:
        if not maps:
            raise BadOption(
                "there is no map to look at", where="option maps", do="give one a layer"
            )
        known = {name: a.shape for name, a in self._references.items()}
        if known and known != {name: a.shape for name, a in maps.items()}:
            raise BadOption(
                "the maps are not those of the layers and lengths seen before",
                where="option maps",
                do="give the same layers, at the same length, each time",
            )

    def _concentrated(self, maps: Mapping[str, Tensor]) -> bool:
        level = self.skewness
        return level is None or any(skewness(a) >= level for a in maps.values())

    def _distance(self, name: str, a: Tensor) -> float:
        reference = self._references[name].to(a.device)
        return float(torch.linalg.vector_norm(reference - a.detach(), dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "looks": self.looks,
            "settled": self.settled,
            "changes": dict(self.changes),
            "distances": dict(self._distances),
            "references": dict(self._references),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            BadOption: it is not such a state.
        """
        if set(state) != set(self.state_dict()):
            raise BadOption(
                "this is not the state of a switch criterion",
                where="option state",
                why=[f"it holds {', '.join(sorted(map(str, state))) or 'nothing'}"],
                do="give what state_dict() returned",
            )
        self.looks, self.settled = int(state["looks"]), bool(state["settled"])
        self.changes, self._distances = dict(state["changes"]), dict(state["distances"])
        self._references = dict(state["references"])


def skewness(attention_map: Tensor) -> float:
    """How lopsided the probabilities of a map are that are not 0:  mean of ((p - mean) / std)^3.

    Each row counts as if it had as many keys as any other, so that a causal mask by itself makes
    none.

    Args:
        attention_map: [..., queries, keys], not negative.

    Returns:
        0 where all are equal, a number above 1 where few keys get most.
    """
    a = attention_map.detach().double()
    seen = a > 0
    p = (a * seen.sum(-1, keepdim=True))[seen]
    if not len(p):
        return 0.0
    from_mean = p - p.mean()
    spread = float(from_mean.square().mean().sqrt())
    # what rounding alone has made is no spread
    return float(from_mean.pow(3).mean()) / spread**3 if spread > 1e-6 * float(p.mean()) else 0.0


def _change(before: float, now: float) -> float:
    """In percent; maps that did not move at all have settled."""
    return 0.0 if before == 0 else 100 * abs(now - before) / before
