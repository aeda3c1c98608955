"""A router's configuration: score -> edits -> probability -> select -> weight."""

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
    """Run a check of a part; its errors name the field relative to ``path``'s owner."""
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


class RouterConfig(Config):
    """What decides which experts a row uses and with what gate. All arithmetic is float32.

    ``probability``: softmax or sigmoid of the logits, or the logits themselves (``identity``);
    ``softmax_tokens``: for each expert, softmax over the tokens of a sample (expert choice only).
    ``when``: ``before`` = probabilities of all candidates, then select; ``after`` = select by
    logits, then the softmax over the selected ones only. ``weight``: gates are the selected
    probabilities (``raw``), these divided by their sum + ``renorm_eps`` (``renorm``), 1 (``one``),
    or 1 with the gradient of the probability (``straight_through``: the router learns, though one
    expert alone answers in full); always times ``scale``. ``selection_bias`` adds a buffer [E] to
    what is selected by, never to the gates (DeepSeek-V3); ``expert_scale`` multiplies each gate by
    a learned number of its expert, 1 at the start (DiffusionGemma). ``partition`` ``null_label``:
    unconditional samples go with gate 1 to one more expert at the end of the pool and are masked
    in the Routing (ProMoE).
    """

    score: Annotated[SerializeAsAny[Part], SCORES.validator] = LinearScore()
    edits: tuple[Annotated[SerializeAsAny[Part], EDITS.validator], ...] = ()
    probability: Literal["softmax", "sigmoid", "identity", "softmax_tokens"] = "softmax"
    when: Literal["before", "after"] = "before"
    select: Annotated[SerializeAsAny[Part], SELECTS.validator] = TopK()
    weight: Literal["raw", "renorm", "one", "straight_through"] = "raw"
    renorm_eps: NonNegativeFloat = 1e-20
    scale: float = 1.0
    selection_bias: bool = False
    expert_scale: bool = False
    partition: Literal["none", "null_label"] = "none"
    unit: Literal["token", "sample"] = "token"

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
        """What one row is."""
        return self.score_part.unit or self.unit

    @property
    def num_reserved(self) -> int:
        """Experts at the end of the pool that are never scored."""
        return 0 if self.partition == "none" else 1

    @property
    def batchwide(self) -> bool:
        """Whether a row's choice depends on other rows (of its own sample)."""
        return self.select_part.needs_tokens

    @property
    def draws(self) -> bool:
        """Whether any part draws while training."""
        edits = (cast(EditPart, edit) for edit in self.edits)
        return any(part.draws for part in (self.score_part, *edits, self.select_part))

    @property
    def reads(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """(field of this configuration, its kind, fields of the Context that it needs)."""
        label = () if self.partition == "none" else ("label",)
        edits = [cast(EditPart, edit) for edit in self.edits]
        parts = [
            ("score", self.score.kind, self.score_part.reads),
            *((f"edits.{place}", edit.kind, edit.reads) for place, edit in enumerate(edits)),
            ("partition", self.partition, label),
        ]
        return [part for part in parts if part[2]]

    def check(self, num_experts: int, width: int | None = None) -> None:
        """Raise ConfigError unless the parts fit ``num_experts`` candidates (and the width)."""
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
        """A router over ``num_experts`` candidates (the reserved expert not counted)."""
        self.check(num_experts, width)
        return Router(self, width, num_experts, time_width)
