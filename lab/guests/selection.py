"""Which tests are run, in the words that pytest understands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """Which tests of those that there are; by default all but the slow ones."""

    slow: bool = False
    """The slow ones too."""
    core: bool = False
    """Only the kernel tests that are marked so, as what matters most."""
    mode: str | None = None
    """Only the kernel tests of this mode, by their ids."""
    matching: str | None = None
    """An expression as pytest's -k has it."""
    last_failed: bool = False
    """Only those that failed when they were run last; all where none did."""
    stop_early: bool = False
    """Nothing more after the first failure, in each guest."""

    @property
    def narrowed(self) -> bool:
        """Whether a group may be left without any test."""
        return self.matching is not None or self.last_failed

    def words(self) -> list[str]:
        """Pytest's options for tests that know neither modes nor a core."""
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
