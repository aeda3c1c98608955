"""Progress of training: a bar, nothing, or a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coterie.core.streams import error_stream

ProgressOption = bool | Callable[[int, int, dict[str, Any]], None]
"""True = bar, False = nothing, or a function of (steps done, steps in all, metrics record)."""


class Progress:
    """Shows the projected end, the loss and the gradient norm of the last step."""

    def __init__(self, option: ProgressOption, done: int, total: int) -> None:
        self.total = total
        self._call = option if callable(option) else None
        self._bar: Any = None
        if option is True:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=total, initial=done, unit="step", dynamic_ncols=True, file=error_stream()
            )

    def update(self, record: dict[str, Any]) -> None:
        if self._bar is not None:
            loss = record["loss"]
            shown = "not finite" if loss is None else f"{loss:.4g}"
            norm = record["grad_norm"]
            self._bar.set_postfix(
                loss=shown, grad_norm="-" if norm is None else f"{norm:.3g}", refresh=False
            )
            self._bar.update(1)
        if self._call is not None:
            self._call(record["step"], self.total, record)

    def say(self, line: str) -> None:
        """A line above the bar; nothing where there is none."""
        if self._bar is not None:
            self._bar.write(line, file=error_stream())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def stages(total: int, title: str, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar over named stages; call the yielded function with the name of each finished one."""
    if not shown:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit="part", dynamic_ncols=True, file=error_stream()) as bar:

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(1)

        yield done
