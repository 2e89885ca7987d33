"""Choices between kernels are measured once and kept."""

from __future__ import annotations

import pytest

from clipgen.hardware.measured_choices import measured_choice
from clipgen.models import cpu_kernels


def test_choices_of_another_process_are_not_overwritten(kernel_cache):
    def measure() -> str:
        assert measured_choice("product", lambda: "first") == "first"
        return "second"

    assert measured_choice("product", measure) == "first"


@pytest.mark.parametrize("content", ["{", None], ids=["damaged", "not writable"])
def test_kernels_are_not_measured_if_the_choice_cannot_be_kept(monkeypatch, kernel_cache, content):
    if content is None:
        kernel_cache.write_text("not a folder")
    else:
        kernel_cache.mkdir()
        (kernel_cache / "kernels.json").write_text(content)
    monkeypatch.setattr(cpu_kernels, "fastest_kernel", lambda *_: pytest.fail("measured"))
    assert cpu_kernels.choose_cpu_kernel(1, 512, 2048) is cpu_kernels.usual_cpu_kernel(1, 512, 2048)
