"""The selection of tests, as pytest options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """A selection of tests; the default is all tests except slow ones."""

    slow: bool = False
    """Include slow tests."""
    core: bool = False
    """Only the most important kernel tests, marked `core`."""
    mode: str | None = None
    """Only the kernel tests with this mode in their ids."""
    matching: str | None = None
    """An expression for pytest's -k."""
    last_failed: bool = False
    """Only tests that failed in the last run; all tests if none failed."""
    stop_early: bool = False
    """Stop each guest after its first failure."""

    @property
    def narrowed(self) -> bool:
        """Whether the selection may leave a group without tests."""
        return self.matching is not None or self.last_failed

    def words(self) -> list[str]:
        """Pytest's options for tests without modes and without a `core` mark."""
        return _options([] if self.slow else ["not slow"], self.matching)

    def kernel_words(self) -> list[str]:
        """Pytest's options for the kernel tests."""
        marks = [*(["core"] if self.core else []), *([] if self.slow else ["not slow"])]
        matching = self.matching
        if self.mode is not None:
            matching = f"({matching}) and {self.mode}" if matching else self.mode
        return _options(marks, matching)


def _options(marks: list[str], matching: str | None) -> list[str]:
    words = ["-m", " and ".join(marks)] if marks else []
    return [*words, "-k", matching] if matching else words
