"""What the verbs say: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from coterie.core.errors import ConfigError
from coterie.core.outputs import writable
from coterie.core.streams import error_stream


def say(text: str = "") -> None:
    click.echo(printable(text))


def printable(text: str) -> str:
    """``text`` with control characters written out: names of others may hold what a terminal would
    obey."""
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in text
    )


class OutFolder(click.Path):
    """A folder to write: where nothing can be written is refused before any work is done."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("empty; name a folder, or . for this one", param, ctx)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        self.check(path)
        return path

    def check(self, path: Path) -> None:
        writable(path)


class OutName(OutFolder):
    """A folder that is sometimes read only."""

    def check(self, path: Path) -> None:
        pass


class OutFile(OutFolder):
    """A file to write, likewise."""

    def check(self, path: Path) -> None:
        if path.is_dir():
            raise ConfigError(f"{path}: a folder; --out is a file here")
        writable(path.parent)


OUT, OUT_NAME, OUT_FILE = OutFolder(), OutName(), OutFile()


def _note_above_bar(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(printable(text), file=error_stream())


def threads_option(
    otherwise: str = "the fastest, by timing the work",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--threads N``: holds for all that the command does; ``otherwise`` the number is the work's
    own choice, which is said where that makes one, but for ``--quiet``, or torch's."""

    def ask(ctx: click.Context, _: click.Parameter, count: int | None) -> None:
        if ctx.resilient_parsing:  # a shell completes the line: no work follows
            return
        from coterie.core.threads import asking

        def tell(line: str) -> None:
            if not ctx.params.get("quiet"):
                _note_above_bar(f"threads  {line}")

        ctx.with_resource(asking(count, tell))

    return click.option(
        "--threads",
        type=click.IntRange(1),
        expose_value=False,
        callback=ask,
        help=f"Fix the number of threads. [{otherwise}]",
    )


def note(text: str) -> None:
    """A line on standard error, dropped where that takes none: nothing depends on it."""
    click.echo(printable(text), file=error_stream())


def say_json(value: Any) -> None:
    """Print ``value`` as JSON; paths and records become strings and objects."""
    click.echo(json.dumps(value, indent=2, default=_plain))


@contextmanager
def progress_bar(total: int, label: str, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields the function that moves it on by some units."""
    from tqdm.auto import tqdm

    with tqdm(
        total=total, desc=label, unit="", disable=quiet, dynamic_ncols=True, file=error_stream()
    ) as bar:
        yield bar.update


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of equal keys as aligned text; numbers to the right."""
    if not rows:
        return "(none)"
    names = list(columns or rows[0])
    cells = [[human(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    right = [all(_is_number(row.get(name)) for row in rows) for name in names]

    def join(line: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([join(names), join(["-" * width for width in widths]), *map(join, cells)])


def human(value: Any) -> str:
    """A value for reading: thousands separated, four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(human(item) for item in value)
    return str(value)


def facts(values: Mapping[str, Any], indent: str = "") -> str:
    """``name  value`` lines; nested mappings indented below their name."""
    width = max((len(name) for name in values), default=0)
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", facts(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name.ljust(width)}  {human(value)}")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
