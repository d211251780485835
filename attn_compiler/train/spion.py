"""SPION in a model: maps of its attention, and patterns from them.

    for args, kwargs in calibration: model(*args, **kwargs)   ->   a sum of maps for each site
    sum of maps   ->   pattern   ->   the site's buffer, which kept every block until then

A pattern is written into a buffer that the module has already, so nothing is traced or compiled
again. It is part of the state_dict, and `spion_patterns` hands out all of a model's, for a file:

    torch.save(spion_patterns(model), "patterns.pt")
    rewrite(other, args, to=SPION(pattern=torch.load("patterns.pt")))

Source: SPION (arXiv 2309.12578), algorithms 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.errors import BadOption
from attn_compiler.installed import rewritten
from attn_compiler.ir.site import AttentionSite
from attn_compiler.kernels.devices import observed
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.maps import add_blocks
from attn_compiler.kernels.pattern import pattern_of
from attn_compiler.kernels.pooled import BlockMap
from attn_compiler.kernels.sparse import left_out
from attn_compiler.train.progress import bar
from attn_compiler.variants.spion import BLOCKS, REST, SPION, filled

Facts = dict[str, Any]
"""What the report says of a layer, as JSON can hold it: `text`, `block` (rows of one), `kept`
([nb][nb], how many patterns keep a block), `of` (how many patterns there are: 1, or one a head),
`pooled` ([nb][nb], what a row gives to a block on average, what the pattern was found in; None if
it was given), `density`, `lost_mass` (None if it was given).
"""


FINEST = 1024
"""Rows of the largest map that is kept of a layer between two looks."""


@dataclass
class Layer:
    """A site that has a map of blocks.

    Attributes:
        path: of the site.
        owner: the module that holds the map.
        site: its record.
        spec: with numbers for the length of the site.
        fine: is a map wanted that is not summed by the pattern's blocks?
        maps: the sum of what was seen by blocks, for a pattern.
        elements: the same, one by one, of all heads together; means of small squares where a
            sequence is longer than FINEST tokens. None if not wanted, and before the first call.
        rows: that were added for each of them.
    """

    path: str
    owner: nn.Module
    site: AttentionSite
    spec: SPION
    fine: bool = False
    maps: BlockMap = field(init=False)
    elements: BlockMap | None = field(init=False)
    rows: float = 0.0

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a new sum."""
        assert self.site.length is not None and isinstance(self.spec.block, int)
        assert isinstance(self.spec.filter, int)
        heads = tuple(self.blocks.shape[:-2])
        self.maps = BlockMap.zeros(
            self.site.length,
            block=self.spec.block,
            filter=self.spec.filter,
            heads=heads,
            device=self.blocks.device,
        )
        self.elements, self.rows = None, 0.0

    @property
    def blocks(self) -> Tensor:
        """Its map of blocks, boolean [nb, nb] or [H, nb, nb]."""
        return _tensor(self.owner, self.site, BLOCKS)

    def add(self, given: Inputs) -> None:
        """Add the probabilities of one call."""
        if self.rows == 0:  # the model may have been moved since
            self.forget()
            if self.fine:
                length, device = self.maps.length, self.blocks.device
                side = -(-length // FINEST)
                self.elements = BlockMap.zeros(length, block=side, filter=1, device=device)
        for into in filter(None, (self.maps, self.elements)):
            add_blocks(
                given.q, given.k, given.reads, given.ints,
                program=given.program, scale=given.scale, into=into,
            )  # fmt: skip
        heads = 1 if self.maps.plain.dim() == 3 else given.q.shape[1]
        self.rows += given.q.shape[0] * heads

    def pattern(self) -> Tensor:
        """The pattern of the maps that were seen."""
        # a causal map has nothing above its diagonal of blocks
        causal = not bool(self.maps.plain.triu(1).any())
        alpha, density = self.spec.alpha, self.spec.density
        return pattern_of(
            self.maps,
            mode=self.spec.mode,
            alpha=alpha if isinstance(alpha, float) else None,
            density=float(density) if density != "auto" else None,
            causal=causal,
        )

    def demand_fits(self) -> None:
        """Is the map of blocks the one that the spec asks for?

        Raises:
            BadOption: it is not.
        """
        assert self.site.length is not None and isinstance(self.spec.block, int)
        side = -(-self.site.length // self.spec.block)
        names = [t.name for t in self.site.decision.tensors]
        rest = any(name.startswith(REST) for name in names)
        if (
            self.blocks.shape[-1] != side
            or (self.blocks.dim() == 3) != self.spec.per_head
            or rest != (self.spec.softmax == "zero_logit")
        ):
            raise BadOption(
                "the model was rewritten with another SPION",
                where=self.path or "the root",
                why=[f"its map of blocks is {list(self.blocks.shape)}"],
                do="give the spec that `rewrite` was given",
            )

    def demand_seen(self, who: str, do: str) -> None:
        """Is there attention in the sum of maps?

        Args:
            who: whose batches these were.
            do: what to do if not.

        Raises:
            BadOption: there is none.
        """
        where = self.path or "the root"
        if self.rows == 0:
            why = ["no batch ran through it"]
            raise BadOption(f"{who} shows nothing of an attention", where=where, why=why, do=do)
        if not bool(self.maps.plain.any()):
            why = ["its mask forbids every key to every query"]
            raise BadOption(f"{who} shows nothing of an attention", where=where, why=why, do=do)

    def lost(self, pattern: Tensor) -> float:
        """The share of the attention that a pattern leaves out."""
        return float(self.maps.lost(pattern).mean())

    @torch.no_grad()
    def put(self, pattern: Tensor) -> None:
        """Attend to these blocks from now on."""
        assert self.site.length is not None and isinstance(self.spec.block, int)
        self.blocks.copy_(pattern)
        if self.spec.softmax == "zero_logit":
            rest = left_out(self.site.program, self.blocks, self.spec.block, self.site.length)
            _tensor(self.owner, self.site, REST).copy_(rest)

    def facts(self, text: str, pattern: Tensor, lost: float | None = None) -> Facts:
        """What the report says of the layer.

        Args:
            text: what was done, in words.
            pattern: that was found or given.
            lost: share of the attention that it leaves out, None if no attention was seen.
        """
        seen = None
        if lost is not None:
            seen = (self.maps.plain if self.spec.mode == "F" else self.maps.convolved) / self.rows
        heads = pattern.view(-1, *pattern.shape[-2:]).cpu()
        return {
            "text": text,
            "block": self.spec.block,
            "kept": heads.sum(0).tolist(),
            "of": len(heads),
            "pooled": None if seen is None else _numbers(seen.view(heads.shape).mean(0)),
            "density": _short(float(heads.float().mean())),
            "lost_mass": None if lost is None else _short(lost),
        }


def _tensor(owner: nn.Module, site: AttentionSite, prefix: str) -> Tensor:
    """What the module got under this name for this site."""
    name = next(t.name for t in site.decision.tensors if t.name.startswith(prefix))
    found = getattr(owner, name)
    assert isinstance(found, Tensor)
    return found


def _short(x: float) -> float:
    """Three digits: a report is looked at."""
    return float(f"{x:.3g}")


def _numbers(pool: Tensor) -> list[list[float]]:
    return [[_short(x) for x in row] for row in pool.tolist()]


def layers_of(model: nn.Module, wanted: Callable[[str], Any], *, fine: bool = False) -> list[Layer]:
    """The sites of a rewritten model that have a map of blocks.

    Args:
        wanted: the spec for the path of a site.
        fine: see `Layer`.
    """
    found = []
    for _, owner, site in rewritten(model):
        spec = wanted(site.path)
        if site.decision.variant == "spion" and isinstance(spec, SPION):
            assert site.length is not None
            made = filled(spec, site.length, path=site.path)
            found.append(Layer(site.path, owner, site, made, fine))
    return found


def spion_patterns(model: nn.Module) -> dict[str, Tensor]:
    """The patterns that stand in a model, by the paths of its attention.

    Args:
        model: rewritten with SPION.

    Returns:
        Boolean copies on the CPU: [nb, nb], which `SPION` takes as `pattern`; or [H, nb, nb] where
        each head has its own: these travel in the state_dict alone.

    Raises:
        BadOption: no attention of the model has a pattern.
    """
    found = {
        site.path: _tensor(owner, site, BLOCKS).cpu().clone()
        for _, owner, site in rewritten(model)
        if site.decision.variant == "spion"
    }
    if not found:
        raise without_maps()
    return found


def without_maps() -> BadOption:
    """The error of a model that has no site of SPION."""
    return BadOption(
        "no attention of the model has a map of blocks",
        do='rewrite it first: rewrite(model, args, to=SPION(), calibration="later")',
    )


@contextmanager
def watched(layers: list[Layer], *, training: bool = False) -> Iterator[None]:
    """Add the maps of every call to the sums of its layer; of training alone, if asked."""

    def observe(given: Inputs) -> None:
        # a model may be moved to another device meanwhile, and its maps of blocks with it
        by_place = {layer.blocks.data_ptr(): layer for layer in layers}
        layer = next(filter(None, (by_place.get(r.data_ptr()) for r in given.reads)), None)
        if layer is not None and (layer.owner.training or not training):
            with torch.no_grad():
                layer.add(given)

    with observed(observe):
        yield


def put_given(layers: list[Layer]) -> dict[str, Facts]:
    """Put in the patterns that specs give; for each path what was done."""
    done = {}
    for layer in layers:
        pattern = layer.spec.pattern_at(layer.path)
        if pattern is not None:
            layer.put(pattern.tensor().expand_as(layer.blocks))
            text = f"{pattern.density:.1%} of the blocks, as given"
            done[layer.path] = layer.facts(text, layer.blocks)
    return done


def calibrate(model: nn.Module, layers: list[Layer], batches: Iterable[Any]) -> dict[str, Facts]:
    """Run the model on data and give each layer its pattern, with a bar on standard error.

    Args:
        model: rewritten, every block kept.
        layers: those that want a pattern.
        batches: pairs of args and kwargs.

    Returns:
        For each path what was done.

    Raises:
        BadOption: there are no batches, one is no such pair, none of them reached a layer, or a
            mask forbade everything.
    """
    mode = model.training
    model.eval()
    number = len(batches) if isinstance(batches, Sized) else None
    try:
        with torch.no_grad(), watched(layers), bar("calibration", number) as advance:
            for batch in batches:
                args, kwargs = call_of(batch)
                model(*args, **kwargs)
                advance()
    finally:
        model.train(mode)
    return {layer.path: _settle(layer) for layer in layers}


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a call."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        args, kwargs = batch
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping | None):
            return tuple(args), dict(kwargs or {})
    raise BadOption(
        f"a batch of the calibration is a {type(batch).__name__} and not a pair (args, kwargs)",
        where="option calibration",
        do="give pairs like the example: [((x,), {}), ...]",
    )


def _settle(layer: Layer) -> Facts:
    layer.demand_seen("calibration", "give batches like the example, as pairs (args, kwargs)")
    pattern = layer.pattern()
    lost, share = layer.lost(pattern), float(pattern.float().mean())
    if lost > layer.spec.max_lost_mass:
        text = (
            f"dense: the pattern ({share:.1%} of the blocks) would lose {lost:.1%} of the"
            f" attention, more than {layer.spec.max_lost_mass:.1%}"
        )
        return layer.facts(text, pattern, lost)
    layer.put(pattern)
    text = f"{share:.1%} of the blocks, which lose {lost:.1%} of the attention"
    return layer.facts(text, pattern, lost)


def described(
    sites: Iterable[AttentionSite], done: Mapping[str, Facts]
) -> tuple[AttentionSite, ...]:
    """Sites with what was done to them."""
    return tuple(
        replace(s, facts={**s.facts, "spion": done[s.path]}) if s.path in done else s for s in sites
    )
