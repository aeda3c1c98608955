"""A folder with a Hugging Face MoE model: what is in it, known before its weights are touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from coterie.core.cost import Parameters, count_parameters
from coterie.interop.transformers.fields import check_shapes
from coterie.interop.transformers.safe_loading import (
    build,
    load_weights,
    read_config,
    read_tokenizer,
    tensor_shapes,
    weight_files,
)
from coterie.interop.transformers.sites import MoESite, find_moe_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model whose structure is known and whose weights are not loaded: ``skeleton`` is on the
    meta device."""

    path: Path
    config: Any
    skeleton: nn.Module
    sites: list[MoESite]

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """ConfigError for what transformers or the bridge does not know, CheckpointError for
        missing files."""
        path = Path(path)
        config = read_config(path)
        with torch.device("meta"):
            skeleton = build(config)
        sites = find_moe_layers(skeleton)
        check_shapes(path, skeleton, tensor_shapes(path))
        return cls(path, config, skeleton, sites)

    @property
    def kind(self) -> str:
        return self.sites[0].kind

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def vocabulary(self) -> int:
        return int(self.text_config.vocab_size)

    def parameters(self, model: nn.Module | None = None) -> Parameters:
        """Total, and active for one token: of the loaded ``model``, or of what the configuration
        describes. The two differ where a folder holds a head of its own and says it is tied."""
        sites = self.sites if model is None else find_moe_layers(model)
        shares = {
            site.experts: {
                name: site.top_k / site.num_experts for name, _ in site.experts.named_parameters()
            }
            for site in sites
        }
        return count_parameters(self.skeleton if model is None else model, shares)

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in weight_files(self.path))

    def load(self, dtype: DType = "auto", device: str | None = None) -> nn.Module:
        """The model in eval mode. ``dtype`` "auto": as stored. ``device`` None: CUDA where there
        is one."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return load_weights(type(self.skeleton), self.path, DTYPES.get(dtype)).to(device)

    def tokenizer(self) -> Any:
        """The model's own tokenizer, or None where none of its files are there."""
        return read_tokenizer(self.path)
