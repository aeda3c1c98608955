"""Dynamic routing: as many experts as it takes until their probabilities exceed p."""

from __future__ import annotations

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny, text_paper, text_tiny
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    authors="Huang, Quzhe and An, Zhenwei and Zhuang, Nan and others",
    year=2024,
    venue="ACL 2024",
    arxiv="2403.07652",
    key="huang2024dynamicmoe",
    url="https://github.com/ZhenweiAn/Dynamic_MoE",
)
SUMMARY = "Top-p: experts are added until the router is sure enough; hard tokens get more."


def slot(
    num_experts: int = 16,
    hidden: int = 2816,
    p: float = 0.4,
    k: int | None = None,
    entropy: float = 1e-4,
    balance: float = 1e-2,
    layers: str = "all",
) -> SlotConfig:
    """Raw probabilities as gates; the balance loss counts rows per expert, the entropy loss makes
    the router decisive. ``k``: the fixed top-k of the same pool instead, without that loss."""
    switch = {"kind": "switch", "weight": balance, "per_choice": False}
    decisive = {"kind": "entropy", "weight": entropy}
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "swiglu", "hidden": hidden},
        router=RouterConfig(select={"kind": "top_k", "k": k} if k else {"kind": "top_p", "p": p}),
        balance=(switch,) if k else (switch, decisive),
    )
    return SlotConfig.from_dict({"slot": "ffn", "layers": layers, "expert": expert})


def _text(part: SlotConfig) -> RunConfig:
    """Windows of easy lines, of arithmetic or of help pages, told apart by their label."""
    data = {"kind": "mixed-difficulty", "largest": 4}
    return text_tiny("dynamic-routing", part, data=data, steps=380)


def _image(part: SlotConfig) -> RunConfig:
    return image_tiny("dynamic-routing", part, steps=300)


def text() -> RunConfig:
    return _text(slot(8, 128, p=0.3))


def tiny() -> RunConfig:
    """The same layer in a denoiser of digits."""
    return _image(slot(8, 64, p=0.3))


def paper() -> RunConfig:
    """The released model: 24 layers of 16 experts, 3.5B parameters; top-2 would use 581M."""
    return text_paper(
        "dynamic-routing",
        slot(),
        trunk={"depth": 24, "width": 1024, "heads": 16},
        context=2048,
        vocabulary=32_000,
        steps=100_000,
        batch=512,
        lr=3e-4,
        warmup=2000,
    )


def gpu() -> RunConfig:
    """12 layers of 16 experts, half as wide, on the standard library's bytes, for one GPU."""
    config = text_paper(
        "dynamic-routing",
        slot(hidden=1408),
        trunk={"depth": 12, "width": 512, "heads": 8},
        context=512,
        steps=2000,
        batch=64,
        lr=3e-4,
        warmup=200,
    )
    return config.replace(preset="gpu", data={"kind": "stdlib", "context": 512})


def arms() -> dict[str, RunConfig]:
    return {
        "text-top-p": text(),
        "text-top-2": _text(slot(8, 128, k=2)),
        "text-top-1": _text(slot(8, 128, k=1)),
        "image-top-p": tiny(),
        "image-top-2": _image(slot(8, 64, k=2)),
    }


CLAIMS = (
    Claim(
        "nine tenths of the active parameters of top-2 are enough",
        "active_parameters",
        "text-top-p",
        "text-top-2",
        factor=0.9,
    ),
    Claim(
        "with them the loss is no worse than that of top-2 (1%)",
        "held_out_loss",
        "text-top-p",
        "text-top-2",
        tolerance=0.01,
    ),
    Claim(
        "harder tasks get more experts",
        "experts_per_row/hard",
        "text-top-p",
        against="experts_per_row/easy",
        better="higher",
    ),
    Claim(
        "lower layers use more experts than upper ones",
        "experts_per_row_first",
        "text-top-p",
        against="experts_per_row_last",
        better="higher",
    ),
)
DEPARTURES = (
    "experts in every layer, as the released model has them; the code's default is every second "
    "one (layers=even)",
    "paper: learning rate, batch and warm-up are assumptions, the weights of the two losses are "
    "recalled; bytes of a dictionary stand where the paper has RedPajama",
    "text, tiny: p = 0.3, chosen with a seed of its own so that a row uses fewer than 1.8 experts; "
    "numbers in the arithmetic are 0..4, or no arm would learn it in these steps",
    "top-1 and top-2 arms: raw gates and the balance loss of the top-p arm, no entropy loss",
)
