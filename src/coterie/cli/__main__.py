"""``python -m coterie.cli``: the command ``coterie``, for launchers that start modules."""

from coterie.cli.main import main

main()
