"""Models of TransformerLens 3: `HookedTransformer`, with its own weight conversion alone."""

from typing import Any

import torch


def hooked_transformer(
    hf_model: Any, tokenizer: Any, dtype: torch.dtype = torch.float32, **processing: bool
) -> Any:
    """A `HookedTransformer` of a Hugging Face Llama or GPT-2, without weight processing.

    `processing` turns on what it names (`fold_ln`, `center_writing_weights`, `center_unembed`,
    `fold_value_biases`).
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gpt2_weights,
        convert_llama_weights,
    )

    config = hf_model.config
    is_llama = config.model_type == "llama"
    options = _llama(config) if is_llama else _gpt2(config)
    cfg = HookedTransformerConfig(
        model_name="tiny", d_vocab=config.vocab_size, device="cpu", dtype=dtype, **options
    )
    convert = convert_llama_weights if is_llama else convert_gpt2_weights
    model = HookedTransformer(cfg, tokenizer)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    with torch.no_grad():
        model.load_and_process_state_dict(
            convert(hf_model, cfg), **{step: processing.get(step, False) for step in steps}
        )
    return model.eval()


def _llama(config: Any) -> dict[str, Any]:
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_ctx": config.max_position_embeddings,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": config.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": d_head,
        "rotary_base": config.rope_parameters["rope_theta"],
        "original_architecture": "LlamaForCausalLM",
    }


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "n_layers": config.n_layer,
        "d_model": config.n_embd,
        "n_ctx": config.n_positions,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": 4 * config.n_embd,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
        "eps": config.layer_norm_epsilon,
        "original_architecture": "GPT2LMHeadModel",
    }
