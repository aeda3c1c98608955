"""Hugging Face MoE models: recording, changing and comparing their routing.

Importing this loads nothing of transformers: layers are found by structure. Only loading a model
from a folder (:mod:`.moe_folder`) needs the library. Classes: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE,
DeepSeek-V2, DeepSeek-V3, DiffusionGemma, as they are in transformers 5.18 and later.
"""

from coterie.interop.transformers.experts import PoolExperts
from coterie.interop.transformers.families import KNOWN, Rule
from coterie.interop.transformers.hooks import Change
from coterie.interop.transformers.selfcheck import MismatchError, SiteCheck, selfcheck
from coterie.interop.transformers.sites import MoESite, find_moe_layers, tap

__all__ = [
    "KNOWN",
    "Change",
    "MismatchError",
    "MoESite",
    "PoolExperts",
    "Rule",
    "SiteCheck",
    "find_moe_layers",
    "selfcheck",
    "tap",
]
