"""Tiny random float32 models: one of each kind of cache that matters here."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lm_ext.bench.random_model import COMMON, LLAMA, write_model

CONFIGS = {
    # KVCache
    "llama": LLAMA,
    # RotatingKVCache and KVCache
    "gemma3_text": dict(
        model_type="gemma3_text",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        sliding_window_pattern=3,
        **COMMON,
    ),
    # ArraysCache and KVCache
    "lfm2": dict(
        model_type="lfm2",
        num_hidden_layers=3,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=64,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1],
        **COMMON,
    ),
    # CacheList of ArraysCache and KVCache
    "falcon_h1": dict(
        model_type="falcon_h1",
        num_hidden_layers=2,
        head_dim=16,
        mamba_d_ssm=64,
        mamba_d_state=16,
        mamba_d_head=16,
        mamba_n_heads=4,
        **COMMON,
    ),
    # KVCache of multi-head latent attention
    "deepseek_v2": dict(
        COMMON,
        model_type="deepseek_v2",
        num_hidden_layers=2,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        rope_scaling=dict(
            type="yarn",
            factor=1.0,
            original_max_position_embeddings=4096,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
}

# ChunkedKVCache, which upstream cannot batch.
UNBATCHABLE = {
    "llama4": dict(
        model_type="llama4",
        text_config=dict(
            COMMON,
            model_type="llama4_text",
            vocab_size=259,
            attention_bias=False,
            attention_chunk_size=64,
            head_dim=16,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=128,
            num_experts_per_tok=1,
            num_hidden_layers=4,
            num_local_experts=2,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            rope_theta=10000.0,
            use_qk_norm=True,
        ),
    )
}

# Of upstream's test_models.py: their batches are wrong in mlx-lm 0.32.2.
WRONG_TOGETHER = {
    "afm7": dict(
        model_type="afm7",
        hidden_dim=256,
        num_layers=16,
        num_hidden_layers=16,
        num_kv_reuse_layers=8,
        num_heads=8,
        num_kv_heads=4,
    ),
    "bailing_moe_linear": dict(
        COMMON,
        model_type="bailing_moe_linear",
        num_hidden_layers=4,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        num_experts_per_tok=2,
        num_experts=4,
        norm_topk_prob=True,
        num_shared_experts=2,
        rms_norm_eps=1e-5,
        rope_theta=1000,
        first_k_dense_replace=0,
        layer_group_size=2,
        group_norm_size=1,
    ),
    "jamba": dict(
        COMMON,
        model_type="jamba",
        num_hidden_layers=4,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=8,
        mamba_expand=2,
        num_experts=2,
        num_experts_per_tok=1,
        rms_norm_eps=1e-5,
    ),
    "nemotron_h": dict(
        COMMON,
        model_type="nemotron_h",
        num_hidden_layers=4,
        attention_bias=False,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=3,
        n_groups=2,
        mlp_bias=False,
        layer_norm_epsilon=1e-4,
        use_bias=True,
        use_conv_bias=True,
        hybrid_override_pattern=["*", "M", "*", "M"],
    ),
    "longcat_flash_ngram": dict(
        model_type="longcat_flash_ngram",
        attention_method="MLA",
        zero_expert_type="identity",
        hidden_size=128,
        ffn_hidden_size=128,
        moe_topk=2,
        expert_ffn_hidden_size=128,
        n_routed_experts=2,
        zero_expert_num=2,
        num_layers=4,
        num_hidden_layers=4,
        max_position_embeddings=1000,
        num_attention_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        routed_scaling_factor=1.0,
        rms_norm_eps=1e-5,
        rope_theta=1000,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        attention_bias=False,
    ),
}


def in_turn(*values):
    """Parameters of a test of each architecture with each of two values: in turn, the one or the
    other is slow.

    Args:
        values (Sequence): The arguments that follow the architecture.
    """
    return [
        pytest.param(architecture, *value, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, architecture in enumerate(CONFIGS)
        for j, value in enumerate(values)
    ]


def make_model(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write the model of an architecture above."""
    config = (CONFIGS | UNBATCHABLE | WRONG_TOGETHER)[architecture]
    return write_model(folder, architecture, config, seed)


def make_adapter(folder: Path, model: Path) -> Path:
    """Write a LoRA adapter of random weights for a model."""
    config = dict(
        fine_tune_type="lora",
        num_layers=2,
        lora_parameters=dict(rank=4, scale=10.0, dropout=0.0),
    )
    loaded, _ = load(str(model))
    linear_to_lora_layers(loaded, config["num_layers"], config["lora_parameters"])
    weights = {
        name: mx.random.normal(w.shape) * 0.1
        for name, w in tree_flatten(loaded.parameters())
        if "lora" in name
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
