"""SPION in a model: maps of its attention, patterns from them, and when they are put in.

    for args, kwargs in calibration: model(*args, **kwargs)   ->   a sum of maps for each site
    sum of maps   ->   pattern   ->   the site's buffer, which kept every block until then

A pattern is written into a buffer that the module has already, so nothing is traced or compiled
again. `SpionSchedule` does it in the middle of a training, when the maps have settled.

Source: SPION (arXiv 2309.12578), algorithms 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
from attn_compiler.train.criterion import SwitchCriterion
from attn_compiler.variants.spion import BLOCKS, REST, SPION, filled


@dataclass
class Layer:
    """A site that has a map of blocks.

    Attributes:
        path: of the site.
        owner: the module that holds the map.
        site: its record.
        spec: with numbers for the length of the site.
        maps: the sum of what was seen, rows that were added for each of it.
    """

    path: str
    owner: nn.Module
    site: AttentionSite
    spec: SPION
    maps: BlockMap = field(init=False)
    rows: float = 0.0

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a new sum."""
        assert self.site.length is not None and isinstance(self.spec.block, int)
        heads = tuple(self.blocks.shape[:-2])
        self.maps = BlockMap.zeros(
            self.site.length,
            block=self.spec.block,
            filter=self.spec.filter,
            heads=heads,
            device=self.blocks.device,
        )
        self.rows = 0.0

    @property
    def blocks(self) -> Tensor:
        """Its map of blocks, boolean [nb, nb] or [H, nb, nb]."""
        return self._tensor(BLOCKS)

    def _tensor(self, prefix: str) -> Tensor:
        tensors = self.site.decision.tensors
        name = next(t.name for t in tensors if t.name.startswith(prefix))
        found = getattr(self.owner, name)
        assert isinstance(found, Tensor)
        return found

    def add(self, given: Inputs) -> None:
        """Add the probabilities of one call."""
        add_blocks(
            given.q, given.k, given.reads, given.ints,
            program=given.program, scale=given.scale, into=self.maps,
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
            self._tensor(REST).copy_(rest)

    @property
    def density(self) -> float:
        return float(self.blocks.float().mean())


def layers_of(model: nn.Module, wanted: Callable[[str], Any]) -> list[Layer]:
    """The sites of a rewritten model that have a map of blocks.

    Args:
        wanted: the spec for the path of a site.
    """
    found = []
    for _, owner, site in rewritten(model):
        spec = wanted(site.path)
        if site.decision.variant == "spion" and isinstance(spec, SPION):
            assert site.length is not None
            made = filled(spec, site.length, path=site.path)
            found.append(Layer(site.path, owner, site, made))
    return found


@contextmanager
def watched(layers: list[Layer]) -> Iterator[None]:
    """Add the maps of every call to the sums of its layer."""
    by_place = {layer.blocks.data_ptr(): layer for layer in layers}

    def observe(given: Inputs) -> None:
        places = [r.data_ptr() for r in given.reads if r.data_ptr() in by_place]
        if places:
            with torch.no_grad():
                by_place[places[0]].add(given)

    with observed(observe):
        yield


def put_given(layers: list[Layer]) -> list[Layer]:
    """Put in the patterns that specs give; the layers without one are left."""
    left = []
    for layer in layers:
        pattern = layer.spec.pattern_at(layer.path)
        if pattern is None:
            left.append(layer)
        else:
            layer.put(pattern.tensor().expand_as(layer.blocks))
    return left


def calibrate(model: nn.Module, layers: list[Layer], batches: Iterable[Any]) -> dict[str, str]:
    """Run the model on data and give each layer its pattern.

    Args:
        model: rewritten, every block kept.
        layers: those that want a pattern.
        batches: pairs of args and kwargs.

    Returns:
        For each path what was done, in words.

    Raises:
        BadOption: there are no batches, or none of them reached a layer.
    """
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), watched(layers):
            for args, kwargs in batches:
                model(*args, **dict(kwargs or {}))
    finally:
        model.train(mode)
    return {layer.path: _settle(layer) for layer in layers}


def _settle(layer: Layer) -> str:
    if layer.rows == 0:
        raise BadOption(
            "calibration shows nothing of an attention",
            where=layer.path or "the root",
            why=["no batch ran through it"],
            do="give batches like the example, as pairs (args, kwargs)",
        )
    pattern = layer.pattern()
    lost = layer.lost(pattern)
    share = float(pattern.float().mean())
    if lost > layer.spec.max_lost_mass:
        return (
            f"dense: the pattern ({share:.1%} of the blocks) would lose {lost:.1%} of the"
            f" attention, more than {layer.spec.max_lost_mass:.1%}"
        )
    layer.put(pattern)
    return f"{share:.1%} of the blocks, which lose {lost:.1%} of the attention"


# ---------------------------------------------------------------- in a training


class SpionSchedule:
    """Dense at first; every so often it looks at the maps of a batch, and when they have settled it
    gives every layer its pattern. Call `step` after each batch of an ordinary training loop.

        schedule = SpionSchedule(model, SPION(), args)
        for index, batch in enumerate(batches):
            ...
            schedule.step(index)

    The model is rewritten in place; its optimiser keeps its parameters. A map is taken from the
    forward passes of the step after which `step` is due, in whatever mode they run.

    Attributes:
        sparse: have the patterns been put in?
        criterion: when they are.
        layers: the sites.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SPION,
        *,
        every: int = 100,
        percent: float = 15.0,
        most: int | None = None,
    ) -> None:
        """
        Args:
            model: rewritten with SPION, every block kept (`rewrite(model, args, to=spec,
                calibration="later")`).
            spec: the spec it was rewritten with.
            every: batches between two looks.
            percent: change of the maps' distances that counts as settled.
            most: batches after which the patterns are put in, settled or not.

        Raises:
            BadOption: the model has no such site, or an option has a wrong value.
        """
        if every < 1:
            raise BadOption(f"every={every}", where="option every", do="give a number from 1")
        self.layers = layers_of(model, lambda path: spec)
        if not self.layers:
            raise BadOption(
                "no attention of the model has a map of blocks",
                do='rewrite it first: rewrite(model, args, to=SPION(), calibration="later")',
            )
        self.criterion = SwitchCriterion(percent)
        self.every, self.most = every, most
        self.sparse = False
        self._watch: Any = None
        self._listen()

    def step(self, batch_index: int) -> bool:
        """Tell that a batch is done; True if the patterns were put in now."""
        if self.sparse:
            return False
        due = (batch_index + 1) % self.every == 0
        settled = False
        if self._watch is not None and all(layer.rows for layer in self.layers):
            self._stop()
            maps = {x.path: x.maps.convolved / x.rows for x in self.layers}
            settled = self.criterion.look(maps)
        late = self.most is not None and batch_index + 1 >= self.most and self.criterion.looks > 0
        if settled or late:
            self._put()
            return True
        if due:
            self._listen()
        return False

    def _listen(self) -> None:
        if self._watch is None:
            for layer in self.layers:
                layer.forget()
            self._watch = watched(self.layers)
            self._watch.__enter__()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def _put(self) -> None:
        self._stop()
        for layer in self.layers:
            layer.put(layer.pattern())
        self.sparse = True

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside the model's own state, which holds the
        patterns.
        """
        return {"criterion": self.criterion.state_dict(), "sparse": self.sparse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; load the model's state as well.

        Raises:
            BadOption: it is not such a state.
        """
        if set(state) != {"criterion", "sparse"}:
            raise BadOption("this is not the state of a SpionSchedule", where="option state")
        self.criterion.load_state_dict(state["criterion"])
        self.sparse = bool(state["sparse"])
        if self.sparse:
            self._stop()

    def callback(self) -> Any:
        """The same as a callback of transformers' Trainer."""
        from transformers import TrainerCallback

        schedule = self

        class Switch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                schedule.step(state.global_step - 1)

        return Switch()


def described(
    sites: Iterable[AttentionSite], words: Mapping[str, str]
) -> tuple[AttentionSite, ...]:
    """Sites with what was done to them."""
    return tuple(
        replace(s, facts={**s.facts, "spion": words[s.path]}) if s.path in words else s
        for s in sites
    )
