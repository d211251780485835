"""Attention by torch's own modules: nn.MultiheadAttention, nn.Transformer, SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import FULL, WIDTH, B, Entry, G, H, S, T, hidden, normal, site

Generator = torch.Generator
WEIGHTS = "the caller reads the probabilities"


def _causal(t: int = T, s: int = T) -> Tensor:
    return torch.ones(t, s, dtype=torch.bool).triu(1)


def _padding(s: int = T) -> Tensor:
    return torch.arange(s)[None, :] >= torch.tensor([s, s - 3])[:, None]


# ---------------------------------------------------------------- nn.MultiheadAttention


class Multihead(nn.Module):
    """nn.MultiheadAttention with fixed arguments; masks are handed in by name."""

    def __init__(
        self, cross: bool = False, call: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.cross, self.call = cross, {"need_weights": False} | (call or {})
        self.mha = nn.MultiheadAttention(WIDTH, H, **options)
        for p in self.mha.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, masks: dict[str, Tensor] | None = None
    ) -> Any:
        first = self.mha.batch_first or x.dim() == 2
        x = x if first else x.transpose(0, 1)
        key = x if memory is None else memory if first else memory.transpose(0, 1)
        value = key if self.mha.vdim == self.mha.kdim else key[..., : self.mha.vdim]
        out, weights = self.mha(x, key, value, **self.call, **(masks or {}))
        out = out if first else out.transpose(0, 1)
        return out if weights is None else (out, weights)


def _multihead(
    name: str,
    masks: Callable[[], dict[str, Tensor]] = dict,
    *,
    call: dict[str, Any] | None = None,
    memory: int = 0,
    mask: str | None = FULL,
    flat: bool = False,
    **options: Any,
) -> Entry:
    def inputs(g: Generator) -> tuple[Any, ...]:
        x = torch.randn(*(() if flat else (B,)), T, WIDTH, generator=g).requires_grad_()
        other = torch.randn(B, S, memory, generator=g) if memory else None
        return x, other, masks()

    returned = bool((call or {}).get("need_weights"))
    return Entry(
        f"multihead_{name}",
        lambda: Multihead(bool(memory), call, **options),
        inputs,
        mask,
        refused=("",) if returned else (),
        why=WEIGHTS if returned else "",
    )


def _additive() -> Tensor:
    return torch.full((T, T), float("-inf")).triu(1)


def _per_head() -> Tensor:
    return torch.rand(B * H, T, T, generator=torch.Generator().manual_seed(3)) - 0.5


_MULTIHEAD = (
    _multihead("plain"),
    _multihead("batch_first", batch_first=True),
    _multihead("no_bias", bias=False, batch_first=True),
    _multihead("flat", flat=True),
    _multihead("weights", call={"need_weights": True}, batch_first=True),
    _multihead("weights_each_head", call={"need_weights": True, "average_attn_weights": False}),
    _multihead("bool_mask", lambda: {"attn_mask": _causal()}, mask=None),
    _multihead("float_mask", lambda: {"attn_mask": _additive()}, batch_first=True, mask=None),
    _multihead("mask_each_head", lambda: {"attn_mask": _per_head()}, mask=None),
    _multihead(
        "causal",
        lambda: {"attn_mask": _causal()},
        call={"is_causal": True},
        batch_first=True,
        mask="causal",
    ),
    _multihead(
        "padding", lambda: {"key_padding_mask": _padding()}, batch_first=True, mask="padding("
    ),
    _multihead("padding_float", lambda: {"key_padding_mask": _padding() * -3.0}, mask=None),
    _multihead("both", lambda: {"attn_mask": _causal(), "key_padding_mask": _padding()}, mask=None),
    _multihead(
        "causal_padding",
        lambda: {"attn_mask": _causal(), "key_padding_mask": _padding()},
        call={"is_causal": True},
        mask=None,
    ),
    _multihead(
        "weights_both",
        lambda: {"attn_mask": _causal(), "key_padding_mask": _padding()},
        call={"need_weights": True},
        batch_first=True,
        mask=None,
    ),
    _multihead("cross", memory=WIDTH),
    _multihead("cross_sizes", memory=20, kdim=20, vdim=12, batch_first=True),
    _multihead(
        "cross_padding", lambda: {"key_padding_mask": _padding(S)}, memory=WIDTH, mask="padding("
    ),
    _multihead("bias_kv", add_bias_kv=True, batch_first=True, mask=None),
    _multihead("zero_attn", add_zero_attn=True, mask=None),
    _multihead(
        "bias_kv_zero_attn",
        lambda: {"attn_mask": _causal(), "key_padding_mask": _padding()},
        add_bias_kv=True,
        add_zero_attn=True,
        mask=None,
    ),
)


class Functional(nn.Module):
    """F.multi_head_attention_forward, called directly, with separate or static projections."""

    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        self.separate = separate
        self.packed, self.bias = (
            nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * 0.3),
            nn.Parameter(torch.randn(3 * WIDTH)),
        )
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.packed.chunk(3)
        extra: dict[str, Any] = {}
        if self.separate:
            extra = {
                "use_separate_proj_weight": True,
                "q_proj_weight": q,
                "k_proj_weight": k,
                "v_proj_weight": v,
            }
        x = x.transpose(0, 1)
        packed = None if self.separate else self.packed
        given = (
            x,
            x,
            x,
            WIDTH,
            H,
            packed,
            self.bias,
            None,
            None,
            False,
            0.0,
            self.out.weight,
            self.out.bias,
        )
        return F.multi_head_attention_forward(
            *given, training=self.training, need_weights=False, **extra
        )[0]


# ---------------------------------------------------------------- nn.Transformer


def _layer(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(WIDTH, H, 37, dropout=0.0, **options)


class Masked(nn.Module):
    """Hands fixed keyword arguments to a layer."""

    def __init__(self, layer: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.layer, self.fixed = layer, fixed

    def forward(self, *args: Tensor) -> Tensor:
        return self.layer(*args, **self.fixed)  # type: ignore[no-any-return]


def _encoder_layer(**options: Any) -> nn.Module:
    return _layer(nn.TransformerEncoderLayer, batch_first=True, **options)()


def _stack() -> nn.Module:
    # with nested tensors eager writes zeros where padding was and torch.compile does not
    return Masked(
        nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False),
        src_key_padding_mask=_padding(),
    )


def _decoder(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = _layer(nn.TransformerDecoderLayer, batch_first=True, **options)()
        return Masked(
            layer, tgt_mask=nn.Transformer.generate_square_subsequent_mask(T), tgt_is_causal=True
        )

    return build


def _whole() -> nn.Module:
    return nn.Transformer(WIDTH, H, 1, 1, 37, dropout=0.0, batch_first=True)


MEMORY = normal(B, S, WIDTH)

# without gradients torch itself runs these layers in one native call
NATIVE, NATIVELY = ("region.native",), "it is fused already, in one native call of PyTorch"

_TRANSFORMER = (
    Entry("encoder_layer", _encoder_layer, hidden(), refused=NATIVE, why=NATIVELY),
    Entry(
        "encoder_layer_norm_first",
        lambda: _encoder_layer(norm_first=True, activation="gelu"),
        hidden(),
        refused=NATIVE,
        why=NATIVELY,
    ),
    Entry("encoder_layer_no_bias", lambda: _encoder_layer(bias=False), hidden()),
    Entry(
        "encoder_layer_padding",
        lambda: Masked(_encoder_layer(), src_key_padding_mask=_padding()),
        hidden(),
        mask=None,
        refused=NATIVE,
        why=NATIVELY,
    ),
    Entry(
        "encoder_layer_causal",
        lambda: Masked(
            _encoder_layer(),
            src_mask=nn.Transformer.generate_square_subsequent_mask(T),
            is_causal=True,
        ),
        hidden(),
        mask=None,
        refused=NATIVE,
        why=NATIVELY,
    ),
    Entry("encoder_stack", _stack, hidden(), mask=None, sites=2, refused=NATIVE, why=NATIVELY),
    Entry("decoder_layer", _decoder(), hidden(MEMORY), mask=None, sites=2),
    Entry(
        "decoder_layer_norm_first", _decoder(norm_first=True), hidden(MEMORY), mask=None, sites=2
    ),
    Entry("transformer", _whole, hidden(MEMORY), sites=3, refused=NATIVE, why=NATIVELY),
)


# ---------------------------------------------------------------- scaled_dot_product_attention


def _sdpa(**options: Any) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    return attend


def _folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).unflatten(0, (b, h))


def _five_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, t, d = q.shape
    q, k, v = q.view(b, G, H // G, t, d), k.unsqueeze(2), v.unsqueeze(2)
    k, v = (x.expand(-1, -1, H // G, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v).reshape(b, H, t, -1)


def _unbatched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([F.scaled_dot_product_attention(*x) for x in zip(q, k, v, strict=True)])


def _allowed(*shape: int) -> Callable[[Generator], Tensor]:
    return lambda g: (torch.rand(*shape, generator=g) < 0.7) | (torch.arange(shape[-1]) == 0)


def _empty_rows(g: Generator) -> Tensor:
    return torch.arange(T)[None, :] < torch.arange(T)[:, None]


_SDPA = (
    site("sdpa", _sdpa()),
    site("sdpa_causal", _sdpa(is_causal=True), mask="causal"),
    site(
        "sdpa_causal_long", _sdpa(is_causal=True), normal(B, 17, WIDTH), cross=True, mask="causal"
    ),
    site(
        "sdpa_causal_short", _sdpa(is_causal=True), normal(B, S, WIDTH), cross=True, mask="causal"
    ),
    site("sdpa_scale", _sdpa(scale=0.2)),
    site("sdpa_dropout_zero", _sdpa(dropout_p=0.0)),
    site("sdpa_bool", _sdpa(), _allowed(T, T), mask="tensor("),
    site("sdpa_bool_padding", _sdpa(), _allowed(B, 1, 1, T), mask="padding("),
    site("sdpa_bool_heads", _sdpa(), _allowed(1, H, T, T), mask="tensor("),
    site("sdpa_float", _sdpa(), normal(B, 1, T, T), mask=None),
    site("sdpa_float_heads", _sdpa(), normal(H, T, T), mask=None),
    site("sdpa_empty_rows", _sdpa(), _empty_rows, mask="tensor("),
    site("sdpa_groups", _sdpa(enable_gqa=True), kv=G),
    site("sdpa_groups_causal", _sdpa(enable_gqa=True, is_causal=True), kv=G, mask="causal"),
    site("sdpa_one_group", _sdpa(enable_gqa=True), kv=1),
    site("sdpa_values", _sdpa(), value_dim=12),
    site("sdpa_cross", _sdpa(), normal(B, S, WIDTH), cross=True),
    Entry(
        "sdpa_folded",
        lambda: site("", _folded).build(),
        hidden(),
        mask="causal",
        heads=None,
        kv_heads=None,
    ),
    site("sdpa_five_axes", _five_axes, kv=G, found=None),
    Entry("sdpa_unbatched", lambda: site("", _unbatched).build(), hidden(), sites=B),
)


ENTRIES: tuple[Entry, ...] = (
    *_MULTIHEAD,
    Entry("functional_packed", Functional, hidden()),
    Entry("functional_separate", lambda: Functional(separate=True), hidden()),
    *_TRANSFORMER,
    *_SDPA,
)
