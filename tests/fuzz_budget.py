"""How long property tests over hostile input run, and what they count.

In the ordinary suite a test has a fixed number of examples, the same each time. With
``COTERIE_FUZZ_SECONDS=N`` (``make fuzz``) each suite goes on with new seeds for N seconds and
writes what it counted to ``results/fuzz/NAME.json``; ``COTERIE_FUZZ_SEED`` repeats such a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

from coterie.core.errors import CoterieError
from coterie.core.machine import commit, hardware_line

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ("refused", "worked", "traceback", "wrong", "hung")
KEPT = 20  # faults described in full


def is_long() -> bool:
    return bool(os.environ.get("COTERIE_FUZZ_SECONDS"))


def seconds(default: float) -> float:
    """The time that a suite has: ``default``, or what the environment says."""
    return float(os.environ.get("COTERIE_FUZZ_SECONDS") or default)


def first_seed() -> int:
    """0 in the ordinary suite; in a long run a new one, unless the environment names it."""
    if not is_long():
        return 0
    return int(os.environ.get("COTERIE_FUZZ_SEED") or random.SystemRandom().randrange(2**32))


class Hung(BaseException):
    """What is tried did not come back in time; no code that is tried may take it for its own."""


@contextmanager
def limited(limit: float) -> Iterator[None]:
    """Raise :class:`Hung` inside the block after ``limit`` seconds (main thread only)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung(f"no answer within {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Outcomes:
    """Counts of one suite: every input is refused (a CoterieError of one line) or works; anything
    else is a fault: a traceback, a wrong answer, no answer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.seeds: list[int] = []
        self._begin = time.perf_counter()

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    def add(self, outcome: str, case: str = "") -> str:
        """Count one input; ``case`` describes it where the outcome is a fault."""
        if outcome not in COUNTED:
            raise ValueError(f"outcome {outcome!r}: one of {', '.join(COUNTED)}")
        self.counts[outcome] += 1
        if outcome not in ("refused", "worked") and len(self.faults) < KEPT:
            self.faults.append(f"{outcome}: {case}")
        return outcome

    def attempt(
        self,
        case: str,
        action: Callable[[], object],
        is_right: Callable[[object], bool] = lambda answer: True,
        limit: float = 20.0,
    ) -> str:
        """Run ``action`` and count how it ended; ``is_right`` judges what it answered."""
        try:
            with limited(limit):
                answer = action()
        except Hung as error:
            return self.add("hung", f"{case}: {error}")
        except CoterieError as error:
            text = str(error)
            if "\n" in text or not text.strip():
                return self.add("traceback", f"{case}: not one line: {text[:300]!r}")
            return self.add("refused")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            found = f"{type(error).__name__} at {place}: {str(error)[:200]}"
            return self.add("traceback", f"{case}: {found}")
        return self.add("worked" if is_right(answer) else "wrong", case)

    def repeat(
        self,
        test: Callable[..., None],
        *drawn: SearchStrategy[Any],
        examples: int,
        share: float = 1.0,
    ) -> None:
        """Call ``test`` with ``examples`` inputs that hypothesis draws; in a long run with one seed
        after another for ``share`` of the time."""
        fixed = settings(
            max_examples=examples,
            derandomize=not is_long(),
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        if not is_long():
            self.seeds = [0]
            fixed(given(*drawn)(test))()
            return
        end, number = time.perf_counter() + share * seconds(0), first_seed()
        while time.perf_counter() < end:
            self.seeds.append(number)
            seeded(number)(fixed(given(*drawn)(test)))()
            number += 1

    def report(self) -> str:
        counts = {name: self.counts[name] for name in COUNTED}
        return "\n".join([f"{self.name}: tried {self.tried}, {counts}", *self.faults])

    def assert_none_wrong(self) -> None:
        """After :meth:`write`, so that the counts are kept: fail with the faults found."""
        wrong = self.tried - self.counts["refused"] - self.counts["worked"]
        assert self.tried and not wrong, self.report()

    def absorb(self, other: Outcomes) -> dict[str, int]:
        """Add the counts of a part of this suite; they are returned for a record of it."""
        self.counts.update(other.counts)
        self.faults += other.faults[: KEPT - len(self.faults)]
        self.seeds += other.seeds
        return {"tried": other.tried, **{name: other.counts[name] for name in COUNTED}}

    def write(self, **more: Any) -> Path | None:
        """``results/fuzz/NAME.json``, in a long run only; ``more`` is what else to record."""
        if not is_long():
            return None
        path = ROOT / "results" / "fuzz" / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "name": self.name,
            "tried": self.tried,
            **{name: self.counts[name] for name in COUNTED},
            **more,
            "faults": self.faults,
            "seeds": [min(self.seeds, default=0), max(self.seeds, default=0)],
            "seconds": round(time.perf_counter() - self._begin, 1),
            "commit": commit(),
            "hardware": hardware_line(),
        }
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return path
