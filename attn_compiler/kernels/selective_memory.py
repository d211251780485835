"""What a site of Selective attention remembers beside its weights.

    memory.budget = 40      tokens that stay when it prunes, None for all
    memory.seen             logits of the last training pass, for the memory loss

It is a module, so that copies and pickles of the model have their own. The last pass holds on to
its graph and is left out of both. A budget is one more entry of the state_dict while there is one:
without budgets a model's state is what it was, and may be loaded either way.

Source: Selective Attention (arXiv 2410.02703).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.kernels.selecting import selecting
from attn_compiler.kernels.selective_need import selective_need
from attn_compiler.kernels.slots import Rule


@dataclass(frozen=True, slots=True)
class Seen:
    """The selecting head of one pass: q* [B, 1, T, e], k* [B, 1, S, e], and what its program reads.

    The program is that of the head alone.
    """

    q: Tensor
    k: Tensor
    program: str
    scale: float
    reads: Sequence[Tensor]
    ints: Sequence[int]

    def need(self, tau: float) -> Tensor:
        """The most tokens that any row still needs, [B]."""
        found: Tensor = selective_need(
            self.q, self.k, list(self.reads), list(self.ints), [],
            program=self.program, scale=self.scale, head=0, select_from="logits", tau=tau,
        )[0]  # fmt: skip
        return found


@torch.compiler.assume_constant_result
def _alone(program: str, head: int, heads: int, select_from: str) -> str:
    """The program of the selecting head; a compiler need not look into it."""
    return selecting(program, head, heads, select_from)


class Memory(nn.Module):
    """See the file.

    Attributes:
        budget: tokens that a layer keeps in evaluation; None for all.
        asked: has anybody asked for the memory loss?
        seen: of the last training pass with gradients.
        rows: query rows of the longest pass since somebody set it to 0; None if nobody counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.budget: int | None = None
        self.asked = False
        self.seen: Seen | None = None
        self.rows: int | None = None

    @property
    def prunes(self) -> bool:
        return self.budget is not None and not self.training

    def note(self, q: Tensor, k: Tensor, selector: Sequence[Tensor], rule: Rule) -> None:
        """Remember the selecting head of a pass in training, and nothing of another one.

        A copy of one head is kept, not all of them. While a graph is compiled nothing is kept
        before somebody has asked, as it would be one more output.
        """
        wanted = self.asked or not torch.compiler.is_compiling()
        if not (self.training and torch.is_grad_enabled() and wanted):
            self.seen = None
            return
        heads, groups = q.shape[1], k.shape[1]
        if selector:
            q, k = selector[:2]
        else:
            group = rule.head // (heads // groups)
            q, k = q[:, rule.head : rule.head + 1].clone(), k[:, group : group + 1].clone()
        program = _alone(rule.program, rule.head, heads, rule.select_from)
        self.seen = Seen(q, k, program, rule.scale, rule.reads, rule.ints)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.budget is not None:
            destination[f"{prefix}budget"] = torch.tensor(self.budget)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # a state that says nothing of budgets leaves those of the model
        found = state.get(f"{prefix}budget")
        if found is not None:
            self.budget = int(found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}

    def extra_repr(self) -> str:
        return "" if self.budget is None else f"budget={self.budget}"
