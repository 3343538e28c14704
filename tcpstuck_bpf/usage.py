"""Usage errors in three lines: what is wrong, why, and what to write instead.

argparse would print twelve lines of usage before its error. This parser raises UsageError instead,
and `cli.main` prints it like every other error.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn

from tcpstuck_bpf.errors import UsageError

SEE_HELP = "--help lists every option"
_ALIKE = 0.7
"""Smallest similarity for a "did you mean" question; 1 means equal words."""


class WrongValueError(argparse.ArgumentTypeError):
    """A value that an option does not accept: what, why and remedy, as in `UsageError`.

    The parser puts the option's name before `what`.
    """

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(what)
        self.why = why
        self.remedy = remedy


def nearest(word: str, known: Iterable[str], remedy: str, before: str = "") -> str:
    """A "did you mean" question with the most similar known word; else the remedy."""
    near = difflib.get_close_matches(word.lower(), [*known], n=1, cutoff=_ALIKE)
    return f"did you mean {before}{near[0]}?" if near else remedy


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as UsageError."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError for an error of argparse."""
        cause = sys.exc_info()[1]
        if isinstance(cause, argparse.ArgumentError):
            raise self._about_option(cause) from None
        _, found, words = message.partition("unrecognized arguments: ")
        if found:
            raise self._about_words(words)
        raise UsageError(message, "the command line is not complete", SEE_HELP)

    def _about_option(self, cause: argparse.ArgumentError) -> UsageError:
        name, wrong = cause.argument_name or "an option", cause.__context__
        what = f"{name}: {cause.message}"
        if isinstance(wrong, WrongValueError):
            return UsageError(what, wrong.why, wrong.remedy)
        option, _, _ = name.partition("/")
        _, excluded, other = cause.message.partition("not allowed with argument ")
        if excluded:
            what = f"{name} cannot be combined with {other}"
            return UsageError(what, "they exclude each other", "leave out one of the two")
        _, surplus, value = cause.message.partition("ignored explicit argument ")
        if surplus:
            return UsageError(f"{name} takes no value", f"{value} was given", f"write {option}")
        takes = [one.metavar for one in self._actions if "/".join(one.option_strings) == name]
        words = takes[0] if takes and takes[0] else "VALUE"
        metavar = words if isinstance(words, str) else " ".join(words)
        if "expected one argument" in what:
            what = f"{name}: its value is missing, or begins with -"
        return UsageError(what, f"it needs a value, {metavar}", f"write {option} {metavar}")

    def _about_words(self, words: str) -> UsageError:
        first, *_ = words.split(" ")
        if first.startswith("-"):
            option, _, _ = first.partition("=")
            known = [text for action in self._actions for text in action.option_strings]
            # Compared without the dashes, which would make any two options similar.
            long_names = [text[2:] for text in known if text.startswith("--")]
            guess = nearest(option.lstrip("-"), long_names, SEE_HELP, "--")
            return UsageError(f"no option {option}", "tcpstuck-trace does not know it", guess)
        is_port = first.replace("-", "").replace(",", "").isdecimal()
        return UsageError(
            f"{first or repr(first)} belongs to no option",
            "every word is an option or the value of the option before it",
            f"to watch a port, write -p {first}" if is_port else SEE_HELP,
        )

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program. The output of --help and --version is flushed first; that may fail."""
        sys.stdout.flush()
        super().exit(status, message)
