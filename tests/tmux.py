"""Tests in a real terminal are skipped where tmux is missing."""

from __future__ import annotations

import shutil

import pytest

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
