"""Evaluation of text models: bits per token, and accuracy on marked answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.runs.build import build_source
from coterie.runs.judges.base import Judge, batches, judges
from coterie.runs.judges.marked_answers import answer_measures, marks_answers
from coterie.runs.sample.sampling import Samples
from coterie.train.objectives.text import BITS

ANSWERS = {
    "answer_loss": "loss of answers (bits per token)",
    "answer_accuracy": "answers that are right, token by token",
}


@judges("text")
class TextJudge(Judge):
    """Masked models are averaged over mask shares."""

    scale = BITS

    def unit(self) -> str:
        return "bits per token"

    @property
    def by_noise(self) -> bool:
        return bool(self.run.config.model.masking == "masked")

    def measures(self) -> dict[str, float]:
        """``answer_loss``, ``answer_accuracy`` where the source marks answers."""
        if not marks_answers(self.run, self.run.source):
            return {}
        source = build_source(self.run.config, "held_out")
        return answer_measures(self.run, source, batches(source, 128, 512))

    def show(self, samples: Samples) -> list[str]:
        tokenizer = self.run.source.tokenizer  # type: ignore[attr-defined]
        return [tokenizer.decode(row) for row in samples.x]

    def labels(self, samples: Samples) -> None:
        return None

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        texts = self.show(samples)
        for entry, text in zip(entries, texts, strict=True):
            entry["text"] = text
        path = folder / "samples.txt"
        path.write_text("\n\n".join(texts), encoding="utf-8")
        return path
