"""Selective attention: every token may tell those after it to ignore an earlier one.

    softmax(z)   ->   softmax(z - F),   F[i,j] = sum over r < i of relu(z*[r,j]),  0 < j < r

No parameters, another function: a model has to be trained with it. What is masked away can be
dropped from the cache, down to a budget of tokens for each layer.

Source: Selective Attention (arXiv 2410.02703), its definition and its memory claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from attn_compiler.ir.mask import Causal, classify
from attn_compiler.ir.mask import Tensor as TensorMask
from attn_compiler.ir.site import AttentionSite, Reason
from attn_compiler.variants.base import (
    ByPath,
    Fidelity,
    Lowering,
    NewModule,
    NewTensor,
    Scope,
    Variant,
    VariantSpec,
    Work,
    demand,
    demand_one_of,
    is_size,
)
from attn_compiler.variants.starts import Start, normal

if TYPE_CHECKING:
    from attn_compiler.cost.letters import Cost

# bytes that a kept token needs beside its key and value: F, float32, and its position, int32
_STATE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Selective(VariantSpec):
    """Selective attention.

    Attributes:
        head: whose logits select.
        select_from: "qk" takes them before an additive bias, "logits" after it.
        start: "direct" subtracts F at once, "gate" scales it by a number that starts at 0,
            "dedicated_head" adds a head that selects nothing at first. The last two start exact.
        budgets: tokens a layer keeps, one number for each layer or a dict by module path; None
            keeps all. At least 2: the first token and the newest always stay.

    Raises:
        BadOption: a field has a wrong value.
    """

    head: int = 0
    select_from: Literal["qk", "logits"] = "qk"
    start: Literal["direct", "gate", "dedicated_head"] = "direct"
    budgets: Sequence[int] | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        demand(self, "head", is_size(self.head, 0), "give the number of a head, from 0")
        demand_one_of(self, "select_from", "qk", "logits")
        demand_one_of(self, "start", "direct", "gate", "dedicated_head")
        given = self.budgets
        if given is None:
            return
        listed = isinstance(given, Mapping | Sequence) and not isinstance(given, str)
        do = "give one whole number for each layer, or a dict from module paths to them"
        demand(self, "budgets", listed, do)
        numbers = list(given.values() if isinstance(given, Mapping) else given)
        good = bool(numbers) and all(is_size(number, 2) for number in numbers)
        why = "the first token and the newest are never dropped"
        demand(self, "budgets", good, do + ", each at least 2", why)
        frozen = ByPath(given) if isinstance(given, Mapping) else tuple(numbers)
        object.__setattr__(self, "budgets", frozen)


def legality(site: AttentionSite, spec: Selective) -> Iterator[Reason]:
    # a cache says which keys came before the rows, and may be an obstacle of its own
    if site.length is None and not site.cached and not site.obstacles:
        text = "a row masks keys for later rows: the rows have to be those of the keys"
        yield Reason("selective.not_square", text, site.location)
    if not (_told(site) or _by_and_by(site)):
        text = "what a later token masks would be masked for earlier ones too: it is not causal"
        yield Reason("selective.not_causal", text, site.location)
    for obstacle in site.obstacles or ():
        yield Reason(f"selective.{obstacle.code}", obstacle.text, obstacle.location)
    if site.query_heads is not None and spec.head >= site.query_heads:
        text = f"there is no head {spec.head} of {site.query_heads}"
        yield Reason("selective.head", text, site.location)
    sizes = (site.width, site.query_heads, site.head_dim, site.value_dim)
    if spec.start == "dedicated_head" and None in sizes:
        text = "no one tensor is found that queries, keys and values are linear maps of"
        yield Reason("selective.dedicated_head", text, site.location)


def _told(site: AttentionSite) -> bool:
    """Does the mask say that it is causal, or a number that stands in a bias?"""
    from attn_compiler.kernels.selecting import forbidding

    said = classify(forbidding(site.program).mask)
    return any(isinstance(term, Causal) for term in (*site.mask.terms, *said.terms))


def _by_and_by(site: AttentionSite) -> bool:
    """May it be causal for what the program does not say? Behind a cache, where one row is, for a
    row alone, and with a mask that is a tensor: a living module then looks at the mask in every
    call. What a cache holds of another sequence is in no order of the rows.
    """
    from attn_compiler.kernels.selecting import added_masks

    if site.crosses and (site.cached or site.length == 1):
        return False
    tensor = any(isinstance(term, TensorMask) for term in site.mask.terms)
    tensor = tensor or bool(added_masks(site.program))
    return site.cached or site.length == 1 or (tensor and site.obstacles is not None)


# names of what a module gets; the number of the site in it follows
GATE = "attn_gate"
OWN = ("attn_select_q", "attn_select_k", "attn_select_v", "attn_select_o")
MEMORY = "attn_memory"


def lower(site: AttentionSite, spec: Selective, length: int, slots: int) -> Lowering:
    """The operator with F; a gate starts at 0, and leaves the function as it was."""
    from attn_compiler.kernels.selecting import forbidding
    from attn_compiler.kernels.selective_memory import Memory  # which loads Dynamo

    gate = NewTensor(GATE, (1,), torch.float32, 0.0, trained=True)
    own = spec.start == "dedicated_head"
    return Lowering(
        forbidding(site.program),
        operator="selective_attention",
        extra=([], gate if spec.start == "gate" else None, None),
        options=(("head", 0 if own else spec.head), ("select_from", spec.select_from)),
        own=_own_head(site) if own else (),
        memory=NewModule(MEMORY, Memory),
        remembers=spec.budgets is not None,
    )


def _own_head(site: AttentionSite) -> tuple[NewTensor, ...]:
    """Weights [D, d], [D, d], [D, dv] of a selecting head, and [dv, H dv] that adds what it finds
    to the other heads.

    Keys and outputs start at 0: nothing is selected and nothing added. Values do not, so that the
    outputs get a gradient, and through them the keys.
    """
    assert site.width and site.query_heads and site.head_dim and site.value_dim
    width, dim, value = site.width, site.head_dim, site.value_dim
    shapes = ((width, dim), (width, dim), (width, value), (value, site.query_heads * value))
    spread = width**-0.5
    return tuple(
        NewTensor(name, shape, torch.float32, Start(normal, (wide,)), trained=True)
        for name, shape, wide in zip(OWN, shapes, (spread, 0.0, spread, 0.0), strict=True)
    )


def cost(spec: Selective, work: Work, *, group: int = 1, materialise: bool = False) -> Cost:
    """What the core of one layer costs, causal, in the letters of `cost.letters`; in decoding S
    is the number of tokens that are kept.

    Args:
        spec: the spec; a dedicated head is one more head, and one more kv head.
        work: see `Work`.
        group: heads that one program computes together.
        materialise: F is written as a tensor.
    """
    from attn_compiler.variants.costs import selective

    found = selective.core(work, group=group, materialise=materialise)
    return selective.dedicated(found) if spec.start == "dedicated_head" else found


def mean_budget(length: int, ratio: float) -> float:
    """Tokens a layer keeps on average, where caches are `ratio` times smaller."""
    return length / ratio


def kept_tokens(spec: Selective, length: int) -> float:
    """Tokens that a layer keeps of so many, on average over the layers that have a budget."""
    given = spec.budgets
    if given is None:
        return float(length)
    budgets = list(given.values() if isinstance(given, Mapping) else given)
    return sum(min(budget, length) for budget in budgets) / len(budgets)


def memory_ratio(length: int, budgets: Sequence[int]) -> float:
    """Tokens of ordinary caches over those of budgets: n L / sum of budgets (the state of a kept
    token left out, see `state_share`).
    """
    return length * len(budgets) / sum(budgets)


def state_share(kv_inner: int, element_bytes: int = 2) -> float:
    """Bytes of a kept token's state over those of its key and value.

    Args:
        kv_inner: kv heads times head dim.
        element_bytes: of the cache.
    """
    return _STATE / (2 * kv_inner * element_bytes)


def break_even_length(budget: int, kv_inner: int, element_bytes: int = 2) -> float:
    """Length from which a step that keeps `budget` tokens reads less than the ordinary one."""
    return budget * (1 + state_share(kv_inner, element_bytes))


def extra_operations(heads: int, group: int = 1, materialise: bool = False) -> float:
    """Operations of a whole sequence beyond the ordinary ones, as a share of them: the scores of
    the selecting head in a pass of its own, and again in each group unless F is a tensor. Reading
    a sequence never becomes cheaper: what pays is generation.
    """
    return 1 / (2 * heads) + (0 if materialise else 1 / (2 * group))


SELECTIVE = Variant(
    name="selective",
    spec=Selective,
    scope=Scope.CORE,
    fidelity=Fidelity.CALIBRATED,
    legality=legality,
    lower=lower,
    remembers=True,
)
