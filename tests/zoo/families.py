"""The library models of the zoo: tiny random configurations, no network.

A family is a configuration class, a model class, the inputs it takes and how many attentions one
forward holds. Sizes are distinct wherever a family lets us (batch 5, length 13, heads 4, kv heads
2, head dim 8 or 16, width 32), so that an axis mistaken for another is a wrong shape or a wrong
number, never luck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.family import Family
from zoo.inputs import (
    IMAGE,
    PATCH,
    VOCAB,
    image,
    image_and_pixel_mask,
    image_and_text,
    sound,
    spectrogram,
    text_pair,
)


def _decoder(**more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return sizes | more


def _encoder(**more: Any) -> dict[str, Any]:
    sizes = _decoder(**more)
    del sizes["num_key_value_heads"]
    return sizes


def _seq2seq(**more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 37,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    return sizes | more


def _t5(**more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 6,
        "relative_attention_max_distance": 10,
        "decoder_start_token_id": 0,
    }
    return sizes | more


def _vision(**more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    return sizes | more


def _audio(**more: Any) -> dict[str, Any]:
    sizes = _encoder(
        conv_dim=(16,),
        conv_kernel=(3,),
        conv_stride=(2,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
    )
    return sizes | more


def _gpt_j() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
    }


def _two_towers(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        towers = {
            "text_config": _encoder(projection_dim=24) | {"eos_token_id": 96},
            "vision_config": _vision(projection_dim=24),
        }
        return getattr(transformers, f"{kind}Config")(**towers)

    return build


def _detr() -> Any:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    sizes = _seq2seq(num_queries=7, backbone_config=backbone, encoder_ffn_dim=37)
    return transformers.DetrConfig(
        **{k: v for k, v in sizes.items() if not k.startswith(("vocab", "max_pos"))}
    )


def _deepseek() -> dict[str, Any]:
    return _decoder(
        num_key_value_heads=4,
        moe_intermediate_size=11,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=20,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )


_ROUTER = "the router's softmax over experts"

# Experts are gathered by index: the default loops over those that were hit, which breaks the graph.
_EXPERTS = {"experts_implementation": "batched_mm"}

_EAGER = ("eager",)
_ANY_INFINITE = "in training the encoder branches on whether a hidden state is infinite: 5 graphs"
_REQUIRES_GRAD = (
    "in training the feature extractor assigns requires_grad, which Dynamo cannot trace: 3 graphs"
)

FAMILIES: dict[str, Family] = {
    "bert": Family(_encoder(), "Bert"),
    "roberta": Family(_encoder(), "Roberta"),
    "distilbert": Family(
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 37,
            "max_position_embeddings": 64,
        },
        "DistilBert",
    ),
    "albert": Family(_encoder(embedding_size=24), "Albert"),
    "electra": Family(_encoder(embedding_size=24), "Electra"),
    "deberta-v2": Family(
        _encoder(
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=6,
            norm_rel_ebd="layer_norm",
        ),
        "DebertaV2",
        attns=_EAGER,
    ),
    "mpnet": Family(_encoder(), "MPNet", attns=_EAGER),
    "modernbert": Family(
        _encoder(
            num_hidden_layers=3,
            local_attention=6,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        "ModernBert",
        sites=3,
    ),
    "gpt2": Family(
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "GPT2"
    ),
    "gpt_neo": Family(
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
        },
        "GPTNeo",
        attns=_EAGER,
    ),
    "gpt_neox": Family(_encoder(), "GPTNeoX"),
    "gptj": Family(_gpt_j(), "GPTJ", attns=_EAGER),
    "opt": Family(
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 37,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 24,
        },
        "OPT",
    ),
    "bloom": Family(
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "Bloom", attns=_EAGER
    ),
    "falcon": Family(
        _encoder(num_kv_heads=2, new_decoder_architecture=True),
        "Falcon",
    ),
    "falcon_alibi": Family(_encoder(alibi=True, multi_query=True), "Falcon"),
    "mpt": Family(
        {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "Mpt",
        attns=_EAGER,
    ),
    "llama": Family(_decoder(), "Llama"),
    "mistral": Family(_decoder(head_dim=16, sliding_window=5), "Mistral"),
    "mixtral": Family(
        _decoder(num_local_experts=3),
        "Mixtral",
        options=_EXPERTS,
        refused={"not_attention.no_value_product": _ROUTER},
    ),
    "qwen2": Family(
        _decoder(use_sliding_window=True, sliding_window=5, max_window_layers=1), "Qwen2"
    ),
    "qwen3": Family(_decoder(head_dim=16), "Qwen3"),
    "gemma": Family(_decoder(head_dim=16, num_key_value_heads=1), "Gemma"),
    "gemma2": Family(
        _decoder(
            head_dim=16, sliding_window=5, attn_logit_softcapping=3.0, query_pre_attn_scalar=10
        ),
        "Gemma2",
        attns=_EAGER,
    ),
    "gemma3": Family(
        _decoder(
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=10,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "Gemma3Text",
    ),
    "phi3": Family(_decoder(sliding_window=6, original_max_position_embeddings=64), "Phi3"),
    "olmo2": Family(_decoder(), "Olmo2"),
    "cohere": Family(_decoder(use_qk_norm=True), "Cohere"),
    "granite": Family(_decoder(attention_multiplier=0.3), "Granite"),
    "starcoder2": Family(_decoder(sliding_window=5), "Starcoder2"),
    "gpt_oss": Family(
        _decoder(head_dim=16, sliding_window=5, num_local_experts=3, num_experts_per_tok=2),
        "GptOss",
        attns=_EAGER,
        options=_EXPERTS,
        refused={"not_attention.no_scores": _ROUTER, "not_attention.no_value_product": _ROUTER},
    ),
    "deepseek_v3": Family(_deepseek(), "DeepseekV3", options=_EXPERTS),
    "t5": Family(_t5(), "T5", text_pair, sites=6),
    "mt5": Family(_t5(feed_forward_proj="gated-gelu"), "MT5", text_pair, sites=6),
    "bart": Family(_seq2seq(), "Bart", text_pair, sites=6),
    "mbart": Family(_seq2seq(), "MBart", text_pair, sites=6),
    "pegasus": Family(_seq2seq(), "Pegasus", text_pair, sites=6),
    "whisper": Family(
        _seq2seq(num_mel_bins=8, max_source_positions=11, max_target_positions=64),
        "Whisper",
        spectrogram,
        sites=6,
    ),
    "vit": Family(_vision(), "ViT", image, masks=False, lengths=False),
    "deit": Family(_vision(), "DeiT", image, masks=False, lengths=False),
    "beit": Family(
        _vision(use_relative_position_bias=True), "Beit", image, masks=False, lengths=False
    ),
    "swin": Family(
        {
            "image_size": IMAGE,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": 3,
        },
        "Swin",
        image,
        sites=4,
        masks=False,
        lengths=False,
    ),
    "clip": Family(_two_towers("CLIP"), "CLIP", image_and_text, sites=4),
    "siglip": Family(_two_towers("Siglip"), "Siglip", image_and_text, sites=5),
    "dinov2": Family(_vision(mlp_ratio=2), "Dinov2", image, masks=False, lengths=False),
    "wav2vec2": Family(_audio(), "Wav2Vec2", sound, stock=_REQUIRES_GRAD),
    "hubert": Family(_audio(), "Hubert", sound, stock=_REQUIRES_GRAD),
    "detr": Family(
        _detr, "Detr", image_and_pixel_mask, sites=6, lengths=False, stock=_ANY_INFINITE
    ),
}
