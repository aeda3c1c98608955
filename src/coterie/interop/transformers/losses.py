"""Loss of a language model on a text: nats per token, causal or by masked blocks.

Legend: B windows, C tokens each, P of them before the canvas, N = C - P on it, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.core.rng import generator

LEVELS = 10  # noise levels that windows take in turn


@dataclass(frozen=True, eq=False)
class Answer:
    """Losses in nats of a batch of windows, NaN where nothing was predicted.

    ``tokens`` [B, C']: of each next token. ``canvas`` [B, N] and ``noise`` [B]: of each token on a
    noised canvas and how much of it was noise (block diffusion only).
    """

    tokens: Tensor
    canvas: Tensor | None = None
    noise: Tensor | None = None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """f32 [B, N] from logits [B, N, V]; one window at a time, since V is large."""
    rows = [F.cross_entropy(a.float(), b, reduction="none") for a, b in zip(logits, targets)]
    return torch.stack(rows)


@torch.no_grad()
def causal(model: Any, ids: Tensor, mask: Tensor, prefix: int) -> Answer:
    """Each token of the text given those before it in its window."""
    padded = None if bool(mask.all()) else mask.long()
    logits = model(input_ids=ids, attention_mask=padded, use_cache=False).logits
    return Answer(_next_tokens(logits, ids, mask, prefix))


def _next_tokens(logits: Tensor, ids: Tensor, mask: Tensor, prefix: int) -> Tensor:
    nats = cross_entropy(logits[:, :-1], ids[:, 1:])
    counted = mask[:, 1:].clone()
    counted[:, : max(prefix - 1, 0)] = False  # what the tokenizer puts there is no text
    return nats.masked_fill(~counted, float("nan"))


@dataclass(frozen=True)
class Blocks:
    """How windows are split for a block-diffusion model."""

    canvas: int  # N

    def levels(self, windows: range) -> Tensor:
        """f32 [B] in (0, 1): each window's share of noise."""
        return torch.tensor([(index % LEVELS + 0.5) / LEVELS for index in windows])

    def noised(self, canvas: Tensor, windows: range, vocabulary: int) -> Tensor:
        """Each token replaced by a uniformly random one with the window's probability."""
        out = []
        for row, index, level in zip(canvas.cpu(), windows, self.levels(windows)):
            rng = generator(0, "canvas", index)  # of its own, whatever the batch
            random = torch.randint(0, vocabulary, row.shape, generator=rng)
            out.append(torch.where(torch.rand(row.shape, generator=rng) < level, random, row))
        return torch.stack(out).to(canvas.device)

    @torch.no_grad()
    def __call__(self, model: Any, ids: Tensor, windows: range, prefix: int) -> Answer:
        """The encoder reads the beginning of each window, the decoder restores the rest of it.

        The canvas starts from random tokens in this family, so noise is random tokens here too.
        """
        before, canvas = ids[:, : -self.canvas], ids[:, -self.canvas :]
        vocabulary = int(model.config.get_text_config().vocab_size)
        out = model(input_ids=before, decoder_input_ids=self.noised(canvas, windows, vocabulary))
        encoder = _softcapped(model, out.encoder_last_hidden_state)
        every = torch.ones_like(before, dtype=torch.bool)
        return Answer(
            _next_tokens(encoder, before, every, prefix),
            cross_entropy(out.logits, canvas),
            self.levels(windows),
        )


def _softcapped(model: Any, hidden: Tensor) -> Tensor:
    cap = model.final_logit_softcapping
    logits: Tensor = model.lm_head(hidden).float()
    return torch.tanh(logits / cap) * cap
