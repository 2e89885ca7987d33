"""The description of installation and machine that ``--info`` prints."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clipgen.cli import info


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


def test_info_describes_installation_and_machine(call):
    result = call("--info")
    assert result.code == 0
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert list(lines) == ["clipgen", "Python", "packages", "processor", "memory", "GPU"]
    assert f"torch {torch.__version__.partition('+')[0]}" in lines["packages"]
    assert torch.backends.cpu.get_cpu_capability() in lines["processor"]


def test_info_names_the_packages_of_the_extras(monkeypatch):
    monkeypatch.setattr(info, "version", lambda name: "1.0")
    packages = info.installed_packages()
    assert {"datasets 1.0", "gradio 1.0", "optuna 1.0", "submitit 1.0", "cog 1.0"} <= set(packages)


def test_info_names_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(info, "OPTIONAL_PACKAGES", ("no-such-extra",))
    assert info.installed_packages()[1:] == ["no-such-package missing"]
