"""What a number in a configuration means, by its name, and how small it can be.

The sizes fit together: width = heads x head size everywhere, so that towers, projectors and decoders that are joined
still match. `SIZES` is read from the top; the first pattern that matches the whole name decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

WIDTH, HEADS, HEAD, INNER, VOCABULARY, POSITIONS, EXPERTS = 64, 4, 16, 96, 128, 128, 4
LAYERS = 4  # at most; two where all are of one kind
TOKENS = (4, 96)  # ids that no special token has

KEYS = "num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups"

Rule = Callable[[Any], Any]


def at_most(limit: int) -> Rule:
    return lambda value: min(value, limit) if value > 0 else value


def to(size: int) -> Rule:
    return lambda value: size if value > 0 else value


def keep(value: Any) -> Any:
    return value


def kv_heads(value: int) -> int:
    """Of grouped attention: fewer than the heads."""
    return 1 if value == 1 else 2


_TABLE: list[tuple[str, Rule]] = [
    # What is no size.
    (r".*(sampling_rate|sample_rate|seed|_idx|rope_theta|rotary_embedding_base|hop_length|num_labels)", keep),
    (r".*(num_channels|in_channels|audio_channels|input_channels|out_channels|channels|output_channels)", keep),
    (
        r"layer_group_size|.*_every_n_layers|sliding_window_pattern|no_rope_layer_interval|full_attention_interval",
        at_most(2),
    ),
    (
        r"interleave_moe_layer_step|moe_layer_interval|decoder_sparse_step|encoder_sparse_step|moe_layer_freq",
        at_most(2),
    ),
    (r"attn_layer_period|expert_layer_period", to(2)),
    (r"attn_layer_offset|expert_layer_offset|moe_layer_start_index", at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers|num_sparse_(en|de)coder_layers", at_most(1)),
    (r"moe_layer_end_index", at_most(LAYERS - 1)),
    (r"num_kv_shared_layers|num_mem_blocks|num_nextn_predict_layers|max_window_layers", at_most(1)),
    # How many.
    (r"vocab_size_per_layer_input|.*vocab_size|.*vocab|codebook_size|unpadded_vocab_size", at_most(VOCABULARY)),
    (r"ngram_vocab_size_base", to(VOCABULARY)),
    (rf".*({KEYS})", kv_heads),
    (r"mamba_n_heads|mamba_num_heads", to(2 * HEADS)),
    (r"index_n_heads|.*(num_attention_heads|attention_heads|num_heads|n_heads?|num_attn_heads)", to(HEADS)),
    (r"n_mamba_heads|heads_per_ngram", at_most(2)),
    (r"(num|n|moe_num)_(shared_experts?)|zero_expert_num", at_most(2)),
    (r".*(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", at_most(2)),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", at_most(EXPERTS)),
    (r"n_group|num_expert_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups|o_groups", at_most(2)),
    (
        r".*(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_(en|de)coder_layers|depth|num_blocks"
        r"|num_global_layers|num_residual_layers|num_adapter_layers|num_layers_per_stack)",
        at_most(LAYERS),
    ),
    # Positions and windows.
    (
        r".*(max_position_embeddings|max_(source|target|speech|text)_positions|n_positions|n_ctx|max_seq_len|context_length"
        r"|max_(en|de)coder_position_embeddings|model_max_length|max_sequence_length|max_pos_emb)",
        at_most(POSITIONS),
    ),
    (
        r"(.*_)?sliding_window(_size)?|attention_window_size|local_attention|local_attention_window_len|keep_window_size"
        r"|window_size|attention_chunk_size|local_radius|prefix_dense_sliding_window",
        at_most(8),
    ),
    (
        r"chunk_size|mamba_chunk_size|index_block_size|block_size|global_block_size"
        r"|keep_window_size|rel_extent|prompt_length",
        at_most(8),
    ),
    (r"index_topk|index_topk_blocks", at_most(8)),
    # Widths, of heads first.
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim|d_rel", at_most(8)),
    (r"v_head_dim|qk_head_dim|index_head_dim|swa_v_head_dim", at_most(HEAD)),
    (
        r"linear_(key|value)_head_dim|linear_head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_(dim|size)"
        r"|(mamba_)?head_?dim|mamba_d_head|.*head_dim",
        to(HEAD),
    ),
    (r"linear_num_key_heads", to(2)),
    (r"linear_num_(value_)?heads", to(HEADS)),
    (r"(mamba_)?d_state|state_size|ssm_state_size|(mamba_)?dt_rank|time_step_rank|mamba_d_state", at_most(8)),
    (r"mamba_d_ssm", to(2 * WIDTH)),
    (r".*(lora_rank|_rank|lowrank)", at_most(16)),
    (r"embedding_size|hidden_size_per_layer_input|hc_lowrank", at_most(32)),
    (r"ple_embed_dim", to(32)),
    (
        r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|ffn_size|d_ff|dff|dim_ff|d_inner|feed_forward_size|mlp_dim|n_inner)",
        to(INNER),
    ),
    (
        r".*(hidden_size(_global|_global)?|d_model|n_embd|emb_dim|d_embed|embed_dim|embedding_dim|(^|_)dim|lru_width|d_latents"
        r"|word_embed_proj_dim|vision_output_dim|projector_(in|out)put_dim|output_(hidden_)?(size|dim)|out_hidden_size"
        r"|input_size|adapter_(in|out)_dim|(cross|attention|backbone|projector|pooler|router)_hidden_size|codebook_dim"
        r"|hidden_dim|vector_quantization_hidden_dimension|dim_model_base|latent_size)",
        to(WIDTH),
    ),
    (
        r".*(subsampling_conv_channels|upsample_groups|upsample_initial_channel|conv_channels|num_filters|base_channels"
        r"|downsample_hidden_size|nemo_conv_channels|ext_pw_out_channel|depthwise_separable_out_channel)",
        at_most(16),
    ),
    (r"mel_bins|num_mel_bins|feature_size|input_feat_per_channel", at_most(16)),
    (r"image_size|crop_size", at_most(32)),
    (r"patch_size", at_most(8)),
]
SIZES = [(re.compile(pattern), rule) for pattern, rule in _TABLE]

COUNT_OF_KEYS = re.compile(rf".*({KEYS})")
COUNT_OF_HEADS = re.compile(r".*(num_attention_heads|attention_heads|num_heads|n_heads?)")

# Special tokens keep the lowest ids, those of pictures and sounds the highest.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3, "decoder_start_token_id": 1}
TOKEN = re.compile(r".*(_token_id|_token_index|_token_ids)")


def size(name: str, value: int) -> int:
    """How small the number `value` of the attribute `name` may be; itself where the name says no size."""
    for pattern, rule in SIZES:
        if pattern.fullmatch(name):
            return rule(value)
    return value
