"""A router's configuration: score -> edits -> probability -> selection -> gate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated, Literal, Self, cast

from pydantic import NonNegativeFloat, SerializeAsAny, model_validator

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.experts.routers.base import EDITS, SCORES, SELECTS, EditPart, ScorePart, SelectPart
from coterie.experts.routers.router import Router
from coterie.experts.routers.scores import LinearScore
from coterie.experts.routers.selections import TopK


def within(path: str, check: Callable[[], None]) -> None:
    """Run a check of a part; its errors name the field under ``path``."""
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


class RouterConfig(Config):
    """How a router chooses experts for each row, and their gates. All arithmetic is float32."""

    score: Annotated[SerializeAsAny[Part], SCORES.validator] = LinearScore()
    """how logits are computed, one per expert"""
    edits: tuple[Annotated[SerializeAsAny[Part], EDITS.validator], ...] = ()
    """changes of the logits, in this order"""
    probability: Literal["softmax", "sigmoid", "identity", "softmax_tokens"] = "softmax"
    """Function of the logits; ``softmax_tokens``: for each expert, softmax over the tokens of a
    sample (expert choice only)."""
    when: Literal["before", "after"] = "before"
    """``before``: probabilities of all experts, then selection. ``after``: selection by logits,
    then softmax over the selected experts."""
    select: Annotated[SerializeAsAny[Part], SELECTS.validator] = TopK()
    """which experts are used, and how many"""
    weight: Literal["raw", "renorm", "one", "straight_through"] = "raw"
    """The gates: the selected probabilities (``raw``), these divided by their sum (``renorm``), 1
    (``one``), or 1 with the gradient of the probability (``straight_through``)."""
    renorm_eps: NonNegativeFloat = 1e-20  # added to the sum in renorm
    scale: float = 1.0  # factor of every gate
    selection_bias: bool = False  # a bias per expert, for the selection only (DeepSeek-V3)
    expert_scale: bool = False  # a learned factor per expert on its gate (DiffusionGemma)
    partition: Literal["none", "null_label"] = "none"
    """``null_label``: unconditional samples go to one more expert, with gate 1, and are masked in
    the Routing (ProMoE)."""
    unit: Literal["token", "sample"] = "token"
    """what is routed: each token, or each sample as a whole"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        score, select = self.score_part, self.select_part
        if select.needs_tokens and self.routed_unit == "sample":
            hint = "experts choose among the tokens of a sample"
            raise ConfigError(describe("select", select.kind, "a row-wise selection", hint))
        if select.needs_tokens and self.when == "after":
            hint = "an expert compares its tokens by probability"
            raise ConfigError(describe("when", self.when, "before", hint))
        if self.probability == "softmax_tokens" and not select.needs_tokens:
            hint = "no row knows the other tokens of its sample"
            raise ConfigError(describe("probability", self.probability, "softmax", hint))
        if self.probability == "identity" and self.weight == "renorm":
            hint = "raw scores may be negative or sum to 0"
            raise ConfigError(describe("weight", self.weight, "raw or one", hint))
        if self.probability != "softmax" and self.when == "after":
            hint = "gates are a softmax over the selected with when=after"
            raise ConfigError(describe("probability", self.probability, "softmax", hint))
        if select.by_probability and self.probability == "identity":
            hint = f"{select.kind} selects by probability"
            raise ConfigError(describe("probability", "identity", "softmax or sigmoid", hint))
        if select.by_probability and self.when == "after":
            hint = f"{select.kind} selects by probability"
            raise ConfigError(describe("when", self.when, "before", hint))
        for place, edit in enumerate(self.edits):
            if select.ignores_scores and cast(EditPart, edit).closes:
                hint = f"edits.{place} ({edit.kind}) may close what {select.kind} always takes"
                raise ConfigError(describe("select", select.kind, "a selection by score", hint))
        if score.learned and self._gate_is_constant():
            warnings.warn(
                "router: one expert per row with a renormalised gate is always 1, so the task "
                "loss gives the router no gradient; use weight=raw or straight_through",
                UserWarning,
                stacklevel=2,
            )
        return self

    def _gate_is_constant(self) -> bool:
        select = self.select_part
        one = not select.needs_tokens and select.expected(2) == 1
        return one and (self.weight == "renorm" or self.when == "after")

    @property
    def score_part(self) -> ScorePart:
        return cast(ScorePart, self.score)

    @property
    def select_part(self) -> SelectPart:
        return cast(SelectPart, self.select)

    @property
    def routed_unit(self) -> Literal["token", "sample"]:
        """The unit that is routed: the score's, if it fixes one."""
        return self.score_part.unit or self.unit

    @property
    def num_reserved(self) -> int:
        """Number of experts at the end of the pool that the router does not score."""
        return 0 if self.partition == "none" else 1

    @property
    def batchwide(self) -> bool:
        """Whether a row's choice depends on other rows of its sample."""
        return self.select_part.needs_tokens

    @property
    def draws(self) -> bool:
        """Whether any part draws random numbers in training."""
        edits = (cast(EditPart, edit) for edit in self.edits)
        return any(part.draws for part in (self.score_part, *edits, self.select_part))

    @property
    def reads(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Context fields that the parts need: (configuration field, its kind, Context fields)."""
        label = () if self.partition == "none" else ("label",)
        edits = [cast(EditPart, edit) for edit in self.edits]
        parts = [
            ("score", self.score.kind, self.score_part.reads),
            *((f"edits.{place}", edit.kind, edit.reads) for place, edit in enumerate(edits)),
            ("partition", self.partition, label),
        ]
        return [part for part in parts if part[2]]

    def check(self, num_experts: int, width: int | None = None) -> None:
        """ConfigError if the parts do not fit ``num_experts`` experts (and the width)."""
        if width is not None:
            within("score", lambda: self.score_part.check(num_experts, width))
        within("select", lambda: self.select_part.check(num_experts))
        for place, edit in enumerate(self.edits):
            part = cast(EditPart, edit)
            within(f"edits.{place}", lambda part=part: part.check(num_experts))  # type: ignore[misc]
            need, left = self.select_part.least, part.fewest(num_experts)
            if need > left:
                hint = f"edits.{place} ({part.kind}) leaves {left} candidates open"
                allowed = f"one that needs at most {left}, not {need}"
                raise ConfigError(describe("select", self.select.kind, allowed, hint))

    def build(self, width: int, num_experts: int, time_width: int | None = None) -> Router:
        """A router over ``num_experts`` experts, the reserved one not counted."""
        self.check(num_experts, width)
        return Router(self, width, num_experts, time_width)
