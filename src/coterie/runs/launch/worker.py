"""One of the processes that a supervisor starts, configured by a file.

The file says what to train and how it is laid out. What goes wrong is written beside it, and the
exit code is that of the command line.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.core.errors import CoterieError
from coterie.core.folder import write_text
from coterie.core.json_reader import read_object
from coterie.core.streams import error_stream
from coterie.runs.launch.child_processes import stop_with_parent
from coterie.train.parallel.config import ParallelConfig
from coterie.train.parallel.processes import joined
from coterie.train.parallel.spread import Spread

USER_ERROR = 2
"""Exit code of errors that another attempt would meet again."""
LOST = 1
_LOST = re.compile(r"gloo|nccl|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)
"""What the libraries that carry messages say when a process is gone."""


def train(work: dict[str, Any]) -> None:
    """Join the others and train; every process of the layout calls this."""
    from coterie.runs.config import RunConfig
    from coterie.runs.training import start

    config = RunConfig.model_validate(work["config"])
    with joined(ParallelConfig.model_validate(work["parallel"]), work["timeout"]) as processes:
        start(config, work["out"], work["progress"], Spread(processes))


def main(path: Path, do: Callable[[dict[str, Any]], None] = train) -> int:
    """``do`` with what the file says; the exit code."""
    stop_with_parent()
    try:
        do(read_object(path))
    except CoterieError as error:
        write_text(path.with_name(f"error-{os.environ['RANK']}"), str(error))
        return int(getattr(error, "exit_code", USER_ERROR))
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        # Where it was met says nothing; who died and how, the supervisor does.
        rank, text = os.environ.get("RANK", "?"), " ".join(str(error).split())
        error_stream().write(f"process {rank}: lost another process ({text[:120]})\n")
        return LOST
    return 0


def run(do: Callable[[dict[str, Any]], None] = train) -> None:
    """The whole life of the process."""
    code = main(Path(sys.argv[1]), do)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a clean exit would wait for connections that others may still hold
