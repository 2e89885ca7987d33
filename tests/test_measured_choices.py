"""Choices between kernels are measured once and kept."""

from __future__ import annotations

import logging
import os

import pytest

from clipgen.hardware.measured_choices import measured_choice
from clipgen.models import cpu_kernels


def test_choices_of_another_process_are_not_overwritten(kernel_cache):
    def measure() -> str:
        assert measured_choice("product", lambda: "first") == "first"
        return "second"

    assert measured_choice("product", measure) == "first"


@pytest.mark.parametrize("content", ["{", None], ids=["damaged", "not writable"])
def test_kernels_are_not_measured_if_the_choice_cannot_be_kept(monkeypatch, caplog, kernel_cache, content):
    caplog.set_level(logging.INFO)
    if content is None:
        kernel_cache.write_text("not a folder")
    else:
        kernel_cache.mkdir()
        (kernel_cache / "kernels.json").write_text(content)
    monkeypatch.setattr(cpu_kernels, "fastest_kernel", lambda *_: pytest.fail("measured"))
    for outputs in (2048, 1024):
        assert cpu_kernels.choose_cpu_kernel(1, 512, outputs) is cpu_kernels.usual_cpu_kernel(1, 512, outputs)
    (line,) = caplog.messages  # one per process, not one per shape
    assert f"{kernel_cache / 'kernels.json'} cannot keep them" in line


def test_null_device_as_cache_turns_measurements_off_without_a_word(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("CLIPGEN_CACHE", os.devnull)
    assert measured_choice("product", lambda: pytest.fail("measured")) == "" and not caplog.messages
