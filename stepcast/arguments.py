"""Command lines of the service and the trainer: argparse that says in one line what is wrong and what is nearest."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn

CLIENT_VARIABLES: Final = {"STEPCAST_URL", "STEPCAST_KEY"}
"""What commands that talk to a server read; to the server itself they mean nothing."""


def nearest(word: str, known: Sequence[str]) -> str:
    """The sentence that names the known word nearest to `word`; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" The nearest is {near[0]!r}." if near else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. Abbreviated options are refused: a script keeps its meaning."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an option that is none of this command's is refused here, where its own options are known."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(f"unrecognized argument {rest[0]!r}.{nearest(rest[0].partition('=')[0], known)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """One line on stderr, status 2."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if choice:
            message += "." + nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"{self.prog}: {message} See {self.prog} --help.\n")
