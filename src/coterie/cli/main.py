"""The command ``coterie``: loads a verb when it is called, and turns errors into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from coterie.cli.lazy import LazyGroup
from coterie.cli.output import note
from coterie.core.errors import CoterieError
from coterie.core.streams import error_stream

VERBS = {
    "demo": "Train a small mixture of experts on digits, sample it, report on it. Minutes.",
    "train": "Train a recipe (a published model), or go on with a run.",
    "upcycle": "Turn a dense model into experts that compute the same at first.",
    "island": "Train denoisers apart, each on its part of the data, and join them.",
    "adapter": "Merge adapters that were trained in runs of their own; check and export them.",
    "guide": "Guide samples by a network that was trained on clean pictures.",
    "compose": "Sample a product, average or power of trained models, without training.",
    "aggregate": "Fuse networks of one architecture: trained weights per layer and pixel.",
    "ranges": "Join denoisers of different noise levels: each answers in its range.",
    "sample": "Draw samples from a run.",
    "restore": "Restore the pictures of a folder with a run that was trained for it.",
    "rollout": "Run a trained policy in its simulator: success rate and pictures.",
    "report": "Show which experts serve what, in a run or a Hugging Face model.",
    "place": "Plan which device holds which experts, and how even the work would be.",
    "sweep": "Quality against cost when routers choose more or fewer experts. No training.",
    "verify": "Measure what the papers of recipes claim, against their baselines.",
    "bench": "Time the library beside other libraries on this machine.",
    "data": "List data sets, or get one.",
    "list": "List recipes, routers, experts, solvers and every other part.",
    "show": "Print the configuration and the size of a recipe.",
    "cite": "Print the BibTeX of the papers behind recipes.",
    "env": "Print versions, processor, threads and devices of this machine.",
    "completion": "Print the script that completes commands in your shell.",
}
"""Verb -> one line of help; ``cli/<verb>.py`` defines its ``command``."""

INTERRUPTED = 130
USER_ERROR = 2


@click.group(cls=LazyGroup, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coterie")
def cli() -> None:
    """coterie: diffusion models made of many experts.

    Start with `coterie demo`. The same command again resumes what was interrupted. Any flag with a
    dot is a path into the configuration: `coterie train dit-moe --train.steps=300`.
    """


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code."""
    try:
        code = cli.main(
            args=None if argv is None else list(argv), prog_name="coterie", standalone_mode=False
        )
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help itself
        return error.exit_code
    except click.ClickException as error:
        note(f"error: {_of_usage(error, sys.argv[1:] if argv is None else argv)}")
        return error.exit_code
    except click.Abort:
        note("interrupted; what was saved is intact")
        return INTERRUPTED
    except CoterieError as error:
        # Training that was asked to stop saves first, then says so with the signal's exit code.
        code = int(getattr(error, "exit_code", USER_ERROR))
        prefix = "error: " if code == USER_ERROR else ""
        note(prefix + " ".join(str(error).split()))
        return code
    except OSError as error:
        note(f"error: {_of_system(error)}")
        return USER_ERROR
    return code if isinstance(code, int) else 0


def _of_usage(error: click.ClickException, argv: Sequence[str]) -> str:
    """What is wrong with a command line, in one line, and where its rules are."""
    told = " ".join(error.format_message().split()).removesuffix(".")
    if not isinstance(error, click.UsageError):
        return told
    verb = next((f" {word}" for word in argv if word in VERBS), "")  # the parser does not say it
    command = f"coterie{verb}" if error.ctx is None else error.ctx.command_path
    return f"{told}; see {command} --help"


def _of_system(error: OSError) -> str:
    """A disk, a right or a device that failed, in one line."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    what = error.strerror or str(error) or type(error).__name__
    return " ".join(f"{', '.join(map(str, names))}: {what}".split() if names else what.split())


def wait_in_few_turns() -> None:
    """Threads of torch's GNU OpenMP ask some 300,000 times whether the others are ready before they
    sleep, which keeps these from the core where other work runs too. It reads this when torch is
    imported, so no verb has run before; what a user has set stays."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "2000"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script.

    Exit codes: 0, 1 (a bug, with its traceback), 2 (a user's error), 128 + n (stopped by signal n).
    """
    sys.stderr = error_stream()
    wait_in_few_turns()
    code = run(argv)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()  # what is left would fail where nobody sees it
    except OSError as error:
        note(f"error: standard output: {error.strerror or error}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or USER_ERROR
    sys.exit(code)
