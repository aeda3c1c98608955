"""A pattern that names a module without a place for an adapter: the error says which and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coterie.adapters import LoraConfig, attach
from coterie.core.errors import ConfigError


class Router(nn.Module):
    """As routers of Hugging Face: a plain parameter, read by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("field", "pattern", "said"),
    [
        ("targets", "*.gate", "mlp.gate is of class Router, and only nn.Linear and convolutions"),
        ("targets", "*embed*", "embed_tokens is of class Embedding, a table: name it in embedd"),
        ("embeddings", "*.gate", "mlp.gate is of class Router, and only nn.Embedding"),
        ("biases", "*.gate", "mlp.gate is of class Router, and it has no bias"),
        ("targets", "*mlp*", r"mlp \(and 1 more\) is of class ModuleDict, and only"),
        ("targets", "nope", "no module has such a name"),
    ],
)
def test_B1_a_module_that_takes_no_adapter_is_named_with_its_class(
    field: str, pattern: str, said: str
) -> None:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(5, 8),
            "mlp": nn.ModuleDict({"gate": Router()}),
            "out": nn.Linear(8, 8, bias=False),
        }
    )
    rows = {"rows": (1,)} if field == "embeddings" else {}
    fields = {"targets": ("out",), **rows, field: (pattern,)}
    with pytest.raises(ConfigError, match=rf"^{field}: .*; {said}"):
        attach(model, "a", LoraConfig.from_dict({**fields, "rank": 2}))
    assert not hasattr(model.out, "adapters")


def test_B1_the_router_of_a_hugging_face_model_is_named() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "vocab_size": 32}
    with torch.device("meta"):
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **more, num_experts_per_tok=2))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.gate is of class Qwen3MoeTopKR"):
        attach(model, "a", LoraConfig(targets=("*.gate",), rank=2))
