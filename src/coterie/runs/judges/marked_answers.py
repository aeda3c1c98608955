"""How well a language model answers where its data mark answers (``source.answer_mask``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.runs.trained_run import LoadedRun
from coterie.train.objectives.text import BITS, token_nats


def marks_answers(run: LoadedRun, source: Source) -> bool:
    """Whether answers can be judged: marked by the source, predicted token by token."""
    return hasattr(source, "answer_mask") and run.config.model.masking == "next_token"


@torch.no_grad()
def answer_measures(run: LoadedRun, source: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """``answer_loss``: bits per token of the answers. ``answer_accuracy``: share of answers whose
    every token is the likeliest one, given the true tokens before it. {} without answers."""
    bits, tokens, right, answers = 0.0, 0, 0, 0
    for batch in batches:
        ids = batch.x
        t = torch.zeros(len(ids), device=ids.device)
        logits = run.model(ids[:, :-1], t, batch.cond, sample_ids=batch.ids).value
        mask, wanted = source.answer_mask(ids)[:, 1:], ids[:, 1:]
        bits += float(token_nats(logits, wanted)[mask].double().sum()) * BITS
        tokens += int(mask.sum())
        correct = whole_answers(mask, logits.argmax(-1) == wanted)
        right, answers = right + int(correct.sum()), answers + len(correct)
    if not answers:
        return {}
    return {"answer_loss": bits / tokens, "answer_accuracy": right / answers}


def whole_answers(mask: Tensor, hits: Tensor) -> Tensor:
    """bool [A]: for each stretch of True in ``mask`` [B, N], whether all of ``hits`` there are."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    number = (mask & ~before).flatten().cumsum(0) - 1
    inside = mask.flatten()
    count = int(number[-1]) + 1 if number.numel() else 0
    missed = torch.bincount(number[inside], (~hits.flatten()[inside]).double(), minlength=count)
    return missed == 0
