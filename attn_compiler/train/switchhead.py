"""What the experts of a rewritten model do: how often each is chosen, and how evenly.

    expert_usage(model, batches)["layers.3"]["w_s"]   ->   shares [H, E], entropy [H]
    with watch_experts(model, tell, every=100): train()      the same while it trains

`report.with_usage(expert_usage(model, batches))` puts it into a report, its text and its page.
An expert that is never chosen learns nothing; an entropy far below log E says that there are such.

Source: SwitchHead (arXiv 2312.07987v3), section 5, looks at the same shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.errors import BadOption
from attn_compiler.installed import rewritten
from attn_compiler.kernels.routing import Routes, entropy, observed

ROUTERS = ("w_s", "w_d", "w_sel")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one router.

    Attributes:
        shares: [H, E], of the routes of a head; rows sum to 1.
        entropy: [H] of the shares, in nats: log E where all experts are used alike.
        chance: [H] entropy of the mean of softmax(logits), which a regulariser sees.
    """

    shares: Tensor
    entropy: Tensor
    chance: Tensor

    def __str__(self) -> str:
        least = self.shares.min()
        return f"{self._evenness().mean():.0%} of an even choice, least used {least:.1%}"

    def _evenness(self) -> Tensor:
        """[H] entropy by that of an even choice."""
        return self.entropy / max(math.log(self.shares.shape[1]), 1e-9)

    def plain(self) -> dict[str, Any]:
        """Shares and evenness as lists, for a report."""
        return {"shares": self.shares.tolist(), "evenness": self._evenness().tolist()}


@dataclass(slots=True)
class _Sum:
    """Routes by expert, and softmax(logits), summed over tokens."""

    counts: Tensor
    choice: Tensor
    tokens: int = 0

    def add(self, routes: Routes) -> None:
        experts = self.counts.shape[1]
        chosen = nn.functional.one_hot(routes.index.long(), experts)
        self.counts += chosen.sum((0, 1, 3))
        self.choice += routes.logits.softmax(-1).double().sum((0, 1))
        self.tokens += routes.index.shape[0] * routes.index.shape[1]

    def usage(self) -> Usage:
        shares = self.counts / self.counts.sum(1, keepdim=True)
        return Usage(shares, entropy(shares), entropy(self.choice / self.tokens))


Usages = dict[str, dict[str, Usage]]


class _Watched:
    """The routers of a model, and what they chose."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[int, _Sum] = {}
        self.places: dict[str, dict[str, int]] = {}
        for _, owner, site in rewritten(model):
            for tensor in site.decision.tensors:
                name = "_".join(tensor.name.split("_")[:2])  # without a number
                if name in ROUTERS:
                    router = owner.get_parameter(tensor.path)
                    heads = 1 if name == "w_sel" else int(site.decision.spec.heads)
                    empty = torch.zeros(heads, len(router) // heads, device=router.device)
                    self.sums[router.data_ptr()] = _Sum(empty.double(), empty.double())
                    self.places.setdefault(site.path, {})[tensor.name] = router.data_ptr()

    @torch.no_grad()
    def observe(self, router: Tensor, routes: Routes) -> None:
        if router.data_ptr() in self.sums:
            self.sums[router.data_ptr()].add(routes)

    def found(self) -> Usages:
        """What each router chose that chose anything.

        Raises:
            BadOption: none did.
        """
        if not any(found.tokens for found in self.sums.values()):
            raise BadOption(
                "no router chose anything" if self.sums else "the model has no routers",
                where="option batches" if self.sums else "",
                do="rewrite the model to SwitchHead, and give batches as pairs (args, kwargs)",
            )
        return {
            path: {
                name: self.sums[at].usage() for name, at in routers.items() if self.sums[at].tokens
            }
            for path, routers in self.places.items()
        }


@contextmanager
def watch_experts(
    model: nn.Module, tell: Callable[[Usages], Any], *, every: int = 1
) -> Iterator[None]:
    """While the context lasts, tell what the routers of a model chose, as it is run and trained.

    Args:
        model: rewritten to SwitchHead; not compiled by `torch.compile`.
        tell: is given what `expert_usage` returns, of the calls since it was told last.
        every: calls of the model.

    Raises:
        BadOption: the model has no router; `every` is no number above 0.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise BadOption(f"every is {every!r}", where="option every", do="give a number of calls")
    watched, calls = _Watched(model), 0
    if not watched.sums:
        watched.found()

    def called(*_: Any) -> None:
        nonlocal watched, calls
        calls += 1
        if calls % every == 0:
            usages = watched.found()
            watched = _Watched(model)
            tell(usages)

    hook = model.register_forward_hook(called)
    try:
        with observed(lambda router, routes: watched.observe(router, routes)):
            yield
    finally:
        hook.remove()


def expert_usage(
    model: nn.Module, batches: Iterable[tuple[Sequence[Any], Mapping[str, Any] | None]]
) -> Usages:
    """Run a model on data, in evaluation mode and without gradients, and look at its routers.

    Args:
        model: rewritten to SwitchHead.
        batches: (args, kwargs) of a call.

    Returns:
        For the path of each attention, by the name of the router: `w_s` of the keys' side, `w_d`
        of the queries' side, or of both where the choice is shared; `w_sel` of the feed-forward
        net in its block, if that has experts: one row. A second attention of the same module has a
        number behind these names.

    Raises:
        BadOption: the model has no router, or no batch ran through one.
    """
    watched, mode = _Watched(model), model.training
    model.eval()
    try:
        with torch.no_grad(), observed(watched.observe):
            for args, kwargs in batches:
                model(*args, **dict(kwargs or {}))
    finally:
        model.train(mode)
    return watched.found()
