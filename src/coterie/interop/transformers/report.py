"""Who does what in a Hugging Face model while it reads a text: the usual report, and its losses.

    reading = Reading.prepare("models/olmoe", "book.txt", tokens=20_000)
    page = reading.report("out")

Everything cheap is checked by ``prepare``; weights are loaded by ``measure`` or ``report``, which
first asks :func:`.selfcheck` whether the model is understood.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.core.cost import Parameters
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.machine import commit, hardware, hardware_line
from coterie.core.routing import Routing
from coterie.inspect import ReportData, Trace, report_outputs, write_report
from coterie.interop.transformers.expert_answers import watched_answers
from coterie.interop.transformers.losses import LEVELS, Answer, Blocks, causal
from coterie.interop.transformers.moe_folder import DType, ModelFolder
from coterie.interop.transformers.selfcheck import selfcheck
from coterie.interop.transformers.sites import find_moe_layers, tap
from coterie.interop.transformers.text import Tokens, Windows, read_tokens

CONTEXT = 512
TOKENS = 8192
BATCH = 4
CHECKED = 64  # tokens of the text that the self-check reads
Advance = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Reading:
    """A model, a text cut into windows, and how many windows are read at once."""

    folder: ModelFolder
    text: Path
    windows: Windows
    batch: int
    dtype: DType = "auto"
    blocks: Blocks | None = None  # how a window is split for a block-diffusion model

    @classmethod
    def prepare(
        cls,
        path: str | Path,
        text: str | Path,
        *,
        tokens: int = TOKENS,
        batch: int = BATCH,
        context: int | None = None,
        dtype: DType = "auto",
    ) -> Reading:
        """Check the folder, the text and the sizes. ``context``: tokens per window (default: 512,
        or what the model has positions for, if that is less)."""
        for name, value in (("tokens", tokens), ("batch", batch)):
            if value < 1:
                raise ConfigError(describe(name, value, "at least 1"))
        folder = ModelFolder.open(path)
        read = read_tokens(folder, Path(text), tokens)
        size = _context(folder, read, context)
        blocks = None
        if getattr(folder.config, "canvas_length", None):
            size = min(size, len(read.ids) + len(read.prefix))
            if size < 4:
                hint = "the encoder and the canvas need two each"
                raise DataError(describe("tokens of a window", size, "4 or more", hint))
            blocks = Blocks(min(int(folder.config.canvas_length), size // 2))
        windows = Windows(read, size, whole=blocks is not None)
        return cls(folder, Path(text), windows, batch, dtype, blocks)

    @cached_property
    def model(self) -> Any:
        """The loaded model, whose layers compute what the bridge takes them to compute."""
        if note := self.too_large():
            raise ConfigError(f"{self.folder.path}: {note}")
        model = self.folder.load(self.dtype)
        _, ids, _ = next(self.windows.batches(2))
        selfcheck(model, ids[:, :CHECKED])
        return model

    def sizes(self) -> dict[str, Any]:
        """What is read; no weight is loaded for it."""
        parameters = self.parameters()
        first = self.folder.sites[0]
        return {
            "model": self.folder.kind,
            "parameters_total": parameters.total,
            "parameters_active": parameters.active,
            "weights_gib": round(self.folder.weight_bytes() / 2**30, 3),
            "routed_layers": len(self.folder.sites),
            "experts": first.num_experts,
            "top_k": first.top_k,
            "tokens": len(self.windows.tokens.ids),
            "raw_bytes": self.windows.tokens.raw,
            "context": self.windows.context,
            "windows": len(self.windows),
        }

    def parameters(self) -> Parameters:
        """Of the model, as it is loaded where it is."""
        return self.folder.parameters(self.__dict__.get("model"))

    def measure(self) -> dict[str, Any]:
        """:meth:`sizes` and the minutes that reading takes here, by reading one batch.

        ``projected_minutes`` is None, with the reason as ``note``, where the weights do not fit
        the memory of this machine.
        """
        if note := self.too_large():
            return {**self.sizes(), "projected_minutes": None, "note": note}
        _ = self.model  # loading and the first pass are not part of what is projected
        sizes = self.sizes()
        start = time.perf_counter()
        with watched_answers(find_moe_layers(self.model)):
            next(self.answers(Trace(noise_bins=LEVELS)))
        seconds = (time.perf_counter() - start) * math.ceil(len(self.windows) / self.batch)
        return {**sizes, "projected_minutes": round(seconds / 60, 2)}

    def too_large(self) -> str:
        """Why the weights cannot be held here; "" if they can, as far as their files tell."""
        here, needed = hardware()["memory_gib"], self.folder.weight_bytes() / 2**30
        if here is None or needed <= here or torch.cuda.is_available():
            return ""
        return f"its weights take {needed:,.1f} GiB, this machine has {here} GiB"

    def answers(self, trace: Trace) -> Iterator[tuple[range, Answer]]:
        """Losses of one batch of windows after the other; routings go to ``trace``."""
        model = self.model
        device = next(model.parameters()).device
        prefix = len(self.windows.tokens.prefix)
        seen: list[Routing] = []
        with tap(model, lambda routing: seen.append(routing.detach())):
            for chosen, ids, mask in self.windows.batches(self.batch):
                ids, mask = ids.to(device), mask.to(device)
                if self.blocks is None:
                    answer = causal(model, ids, mask, prefix)
                else:
                    answer = self.blocks(model, ids, chosen, prefix)
                # Only the decoder reads noise; the encoder reads the text before it as it is.
                trace.add([r.replace(noise=answer.noise) if _noised(r) else r for r in seen])
                seen.clear()
                yield chosen, answer

    def read(self, advance: Advance | None = None) -> ReportData:
        """Read all windows; ``advance(n)`` is told of every ``n`` that are done."""
        trace, totals = Trace(noise_bins=LEVELS), Totals()
        with watched_answers(find_moe_layers(self.model)) as answers:
            for chosen, answer in self.answers(trace):
                totals.add(answer)
                if advance is not None:
                    advance(len(chosen))
        return ReportData(
            title=f"{self.folder.path.resolve().name}: who does what",
            trace=trace,
            loss_bins=totals.bins(),
            loss_unit="bits per token",
            metrics=totals.metrics(),
            answers=answers.answers(),
            parameters=self.parameters(),
            config={"reading": self.sizes(), "model": self.folder.config.to_dict()},
            hardware=hardware_line(),
            commit=commit(),
            facets=("position",) if self.blocks is None else ("noise", "position"),
            notes=self.notes(),
        )

    def report(self, out: str | Path, advance: Advance | None = None) -> Path:
        """Read, and write ``index.html``, pictures and ``report.json`` to ``out``; the page."""
        report_outputs(out)
        return write_report(out, self.read(advance))

    def notes(self) -> tuple[str, ...]:
        """What a reader must know to read the numbers rightly."""
        out = []
        if self.windows.tokens.raw:
            out.append(
                "The model came without a tokenizer, so raw bytes stood for tokens: each byte of "
                "the text was taken as the token of that number. Losses and routing are those of "
                "unfamiliar input, not of the text."
            )
        if self.blocks is not None:
            before = self.windows.context - self.blocks.canvas
            out.append(
                f"Of each window the encoder read {before} tokens and the decoder restored the "
                f"next {self.blocks.canvas}, of which a share t, the noise level, had been "
                "replaced by random tokens."
            )
        return tuple(out)


def _noised(routing: Routing) -> bool:
    return routing.slot == "decoder"


def _context(folder: ModelFolder, tokens: Tokens, wanted: int | None) -> int:
    most = int(getattr(folder.text_config, "max_position_embeddings", 0) or CONTEXT)
    context = min(CONTEXT, most) if wanted is None else wanted
    least = len(tokens.prefix) + 2
    if not least <= context <= most:
        hint = "the model has no more positions" if context > most else "room to predict a token"
        raise ConfigError(describe("context", context, f"{least}..{most}", hint))
    return context


@dataclass(eq=False)
class Totals:
    """Sums over windows: every window counts its predicted tokens."""

    tokens: list[Tensor] = field(default_factory=list)  # of each window: mean nats and count
    canvas: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        self.tokens.append(_means(answer.tokens))
        if answer.canvas is not None and answer.noise is not None:
            self.canvas.append(_means(answer.canvas))
            self.noise.append(answer.noise)

    def metrics(self) -> dict[str, Any]:
        if not self.canvas:
            return _losses(torch.cat(self.tokens))
        return {
            "encoder, next token": _losses(torch.cat(self.tokens)),
            "decoder, token on the noised canvas": _losses(torch.cat(self.canvas)),
        }

    def bits(self) -> float:
        """Bits per token: of the next one, or of the noised canvas; NaN before anything is read."""
        windows = self.canvas or self.tokens
        if not windows:
            return math.nan
        mean, count = torch.cat(windows).unbind(1)
        return float((mean.nan_to_num() * count).sum() / count.sum()) / math.log(2)

    def bins(self) -> list[dict[str, Any]]:
        """Bits per token of the canvas by noise level; [] for a causal model."""
        if not self.canvas:
            return []
        nats, noise = torch.cat(self.canvas)[:, 0], torch.cat(self.noise)
        out = []
        for index in range(LEVELS):
            here = (noise * LEVELS).long() == index
            if bool(here.any()):
                row = {"bin": index, "lo": index / LEVELS, "hi": (index + 1) / LEVELS}
                loss = float(nats[here].mean()) / math.log(2)
                out.append({**row, "loss": loss, "count": int(here.sum())})
        return out


def _means(nats: Tensor) -> Tensor:
    """f64 [B, 2]: mean over what was predicted, and how much that is."""
    nats = nats.double().cpu()
    return torch.stack([nats.nanmean(dim=1), (~nats.isnan()).sum(dim=1).double()], dim=1)


def _losses(windows: Tensor) -> dict[str, Any]:
    """From means and counts [W, 2]: loss in nats and bits with its standard error, perplexity."""
    mean, count = windows.unbind(1)
    loss = float((mean * count).sum() / count.sum())
    out: dict[str, Any] = {"loss per token (nats)": {"value": loss}}
    out["bits per token"] = {"value": loss / math.log(2)}
    if len(mean) > 1:
        share = count / count.sum()
        spread = float((share**2 * (mean - loss) ** 2).sum() * len(mean) / (len(mean) - 1))
        out["loss per token (nats)"]["stderr"] = math.sqrt(spread)
        out["bits per token"]["stderr"] = math.sqrt(spread) / math.log(2)
    out["perplexity"] = math.exp(min(loss, 700.0))
    out["tokens predicted"] = int(count.sum())
    return out
