"""What no rule can say: configurations whose numbers are bound to one another in a way of their own.

Keys are model types, or names of configuration classes that have none.
"""

from __future__ import annotations

from typing import Any

HEAD_DIM = {"head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
CONVOLUTIONS = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 5),
    "conv_kernel": (10, 5),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
STAGES = {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]}

# By the name of the model's class.
CLASSES: dict[str, dict[str, Any]] = {"ReformerModelWithLMHead": {"is_decoder": True}}

# What a configuration cannot be made without.
NEEDED: dict[str, dict[str, Any]] = {
    "reformer": {"axial_pos_shape": (16, 8), "axial_pos_embds_dim": (16, 48)},
}

# What takes the place of what the rules say.
GIVEN: dict[str, dict[str, Any]] = {
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    "audio-spectrogram-transformer": {"max_length": 64},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "data2vec-audio": CONVOLUTIONS,
    "deepseek_v2": {**EXPERTS, "topk_method": "greedy"},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {**EXPERTS, "n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "granite_speech_encoder": {"context_size": 8},
    "granite_speech_plus_encoder": {"context_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "hubert": CONVOLUTIONS,
    "hunyuan_v1_dense": HEAD_DIM,
    "hunyuan_v1_moe": HEAD_DIM,
    "led": {"attention_window": [8, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": [8, 8]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": HEAD_DIM,
    "mobilebert": {"intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {**HEAD_DIM, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "speecht5": CONVOLUTIONS,
    "squeezebert": {"embedding_size": 64},
    "swin": {
        "embed_dim": 32,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 2,
        "image_size": 32,
        "patch_size": 2,
    },
    "unispeech": CONVOLUTIONS,
    "vibevoice_acoustic_tokenizer": STAGES,
    "vibevoice_acoustic_tokenizer_decoder": STAGES,
    "vibevoice_acoustic_tokenizer_encoder": STAGES,
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "wav2vec2": {"vocab_size": 32, **CONVOLUTIONS},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32, **CONVOLUTIONS},
    "wavlm": CONVOLUTIONS,
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 8, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
    },
}


def given(config_class: type[Any]) -> dict[str, Any]:
    """What the numbers of a configuration of that class must be."""
    return GIVEN.get(config_class.__name__) or GIVEN.get(getattr(config_class, "model_type", ""), {})


def needed(config_class: type[Any]) -> dict[str, Any]:
    """What a configuration of that class cannot be made without."""
    return NEEDED.get(getattr(config_class, "model_type", ""), {})
