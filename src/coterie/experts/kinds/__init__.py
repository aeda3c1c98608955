"""Kinds of experts: what one expert computes and the layout of its weights."""

from coterie.experts.kinds.base import EXPERTS, ExpertKind, Weights
from coterie.experts.kinds.conv import Conv
from coterie.experts.kinds.masks import Affine, ChannelWindow
from coterie.experts.kinds.mlp import GeluMLP, SwiGLU
from coterie.experts.kinds.modulation import Modulation
from coterie.experts.kinds.norm_mlp import NormMLP
from coterie.experts.kinds.pool import ExpertPool

__all__ = [
    "EXPERTS",
    "Affine",
    "ChannelWindow",
    "Conv",
    "ExpertKind",
    "ExpertPool",
    "GeluMLP",
    "Modulation",
    "NormMLP",
    "SwiGLU",
    "Weights",
]
