"""Upcycling language models of Hugging Face: their dense networks become our expert layers.

    model = upcycle_transformers(model, UpcycleConfig(copies=2, slices=2))
    save_upcycled(model, "folder")
    model = load_upcycled("folder")

Any causal model whose blocks have a gated network (``gate_proj``, ``up_proj``, ``down_proj``:
Llama, Qwen, Mistral, Gemma ...) or a biased two-layer one with tanh GELU (GPT-2, Phi, GPT-NeoX).
They are found by structure and checked by their numbers; what computes anything else is refused.
Importing this loads nothing of transformers.
"""

from coterie.interop.upcycled.folder import (
    load_upcycled,
    plan_directory,
    save_upcycled,
    upcycle_directory,
)
from coterie.interop.upcycled.model import (
    UpcycledNetwork,
    aux_losses,
    tapped,
    upcycle_transformers,
    upcycled_networks,
)
from coterie.interop.upcycled.networks import DenseNetwork, find_networks

__all__ = [
    "DenseNetwork",
    "UpcycledNetwork",
    "aux_losses",
    "find_networks",
    "load_upcycled",
    "plan_directory",
    "save_upcycled",
    "tapped",
    "upcycle_directory",
    "upcycle_transformers",
    "upcycled_networks",
]
