"""The PEP 517 build backend: writes the pages, then calls setuptools.

setup.cfg lists the pages as data files, so the pages must exist before a wheel is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from lab.pages.build import DIRECTORY, REPOSITORY, write_pages

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def build_wheel(directory: str, settings: Any = None, metadata: Any = None) -> str:
    """See PEP 517."""
    write_pages(Path(REPOSITORY, DIRECTORY))
    return str(build_meta.build_wheel(directory, settings, metadata))


def build_editable(directory: str, settings: Any = None, metadata: Any = None) -> str:
    """See PEP 660."""
    write_pages(Path(REPOSITORY, DIRECTORY))
    return str(build_meta.build_editable(directory, settings, metadata))
