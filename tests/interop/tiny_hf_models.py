"""Tiny random models of the seven classes, built from configurations: nothing is fetched."""

from __future__ import annotations

from typing import Any

import torch

TEXT = "One expert reads this sentence, and another one reads that. " * 9
WIDTH, HIDDEN, EXPERTS, LAYERS, WORDS = 16, 12, 8, 2, 300

BASE = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    "intermediate_size": 20,
    "moe_intermediate_size": HIDDEN,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
QWEN = {"moe_intermediate_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": 3}
GEMMA = {
    "intermediate_size": 20,
    "moe_intermediate_size": HIDDEN,
    "num_experts": EXPERTS,
    "top_k_experts": 3,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

KINDS = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "diffusion_gemma",
)


def make_config(kind: str, **changes: Any) -> Any:
    """A tiny configuration; every feature of the class's rule is switched on."""
    import transformers as hf

    if kind == "mixtral":
        own: dict[str, Any] = {"intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
        return hf.MixtralConfig(**BASE | own | {"num_experts_per_tok": 3} | changes)
    if kind == "olmoe":
        own = {"intermediate_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": 3}
        return hf.OlmoeConfig(**BASE | own | changes)
    if kind == "qwen2_moe":
        own = QWEN | {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}
        return hf.Qwen2MoeConfig(**BASE | own | {"norm_topk_prob": True} | changes)
    if kind == "qwen3_moe":
        own = QWEN | {"norm_topk_prob": True, "decoder_sparse_step": 1, "head_dim": 8}
        return hf.Qwen3MoeConfig(**BASE | own | changes)
    if kind == "deepseek_v2":
        own = DEEPSEEK | {"topk_method": "group_limited_greedy"}
        return hf.DeepseekV2Config(**BASE | own | changes)
    if kind == "deepseek_v3":
        return hf.DeepseekV3Config(**BASE | DEEPSEEK | {"norm_topk_prob": True} | changes)
    text = hf.DiffusionGemmaTextConfig(**BASE | GEMMA | changes)
    vision = hf.AutoConfig.for_model(**VISION)
    return hf.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)


def make_model(kind: str, seed: int = 0, std: float = 0.4, **changes: Any) -> Any:
    """A model with all tensors drawn anew, so that no bias, scale or norm is trivial."""
    import transformers as hf

    classes = {"diffusion_gemma": "DiffusionGemmaForBlockDiffusion"}
    config = make_config(kind, **changes)
    if kind in classes:
        model = getattr(hf, classes[kind])(config)
    else:
        model = hf.AutoModelForCausalLM.from_config(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                value.normal_(0.0, 0.1, generator=rng)
            elif isinstance(value, torch.nn.Parameter) and value.dim() > 1:
                value.normal_(0.0, std, generator=rng)
            elif isinstance(value, torch.nn.Parameter):
                value.uniform_(0.5, 1.5, generator=rng)
    return model.eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))
