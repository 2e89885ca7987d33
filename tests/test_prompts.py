"""Prompts: mixtures, and files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgen.generation.prompts import read_prompts


def test_a_device_without_end_is_not_a_file_of_prompts():
    with pytest.raises(ValueError, match="/dev/zero must contain at most 16777216 bytes of prompts"):
        read_prompts(Path("/dev/zero"))
