"""The command `stepcast`; `python -m stepcast` is the same."""

import sys
from collections.abc import Sequence

from .rooms import missing


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 2 for wrong usage, 1 for a failure."""
    try:
        from .cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"stepcast: {missing(error.name, 'client')}", file=sys.stderr)
        return 1
    return run(sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    raise SystemExit(main())
