"""The page of the command line, filled by mkdocs-click at build."""

from __future__ import annotations

from coterie.cli.main import VERBS


def page() -> str:
    said = [
        "# Verbs of the command line",
        "`coterie VERB --help` prints the same. The same command again resumes what was "
        "interrupted; any flag with a dot is a path into the [configuration]"
        "(parts/configuration.md).",
        "\n".join(
            [
                "| verb | does |",
                "| --- | --- |",
                *(f"| [`{verb}`](#coterie-{verb}) | {line} |" for verb, line in VERBS.items()),
            ]
        ),
    ]
    for verb in VERBS:
        lines = [
            "::: mkdocs-click",
            f"    :module: coterie.cli.{verb}",
            "    :command: command",
            f"    :prog_name: coterie {verb}",
            "    :depth: 1",
            "    :style: table",
        ]
        said.append("\n".join(lines))
    return "\n\n".join(said) + "\n"


def pages() -> dict[str, str]:
    """Path below ``docs`` -> text."""
    return {"reference/verbs.md": page()}
