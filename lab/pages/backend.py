"""What pip calls to build a wheel (PEP 517): setuptools, with the pages written before.

setup.cfg names them as data files, so they must be there when a wheel is built.
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
