"""The console script `indexer`, and `python -m indexer`: a Ctrl-C while the rooms are still being imported is no traceback."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    try:
        from indexer.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
