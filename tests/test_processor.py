"""Instruction sets and bfloat16: which dtype, precision and strategy follow from the processor."""

from __future__ import annotations

import math
import platform

import pytest
import torch
from torch import nn

from clipgen import muon
from clipgen.cli.config import compose_config
from clipgen.cli.train import to_training_config
from clipgen.hardware import processor
from clipgen.hardware.processor import has_bf16_units, require_bf16_units
from clipgen.models.config import TransformerOptimizerConfig
from clipgen.optim import has_fused_kernels, make_optimizer
from clipgen.training.run import set_precision


def test_muon_iterates_in_the_native_dtype(monkeypatch):
    for has_units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(muon, "has_bf16_units", lambda device, has_units=has_units: has_units)
        assert muon.native_dtype(torch.device("cpu")) == dtype


def test_imitated_older_processors_have_no_bf16_units(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with monkeypatch.context() as patch:
        patch.setattr(processor, "instruction_set", lambda: "AVX2")
        assert not has_bf16_units("cpu") and not has_bf16_units("mps")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not has_bf16_units("cpu")


@pytest.mark.parametrize(
    ("machine", "supported", "expected"),
    [
        ("aarch64", True, True),
        ("arm64", False, False),
        ("x86_64", True, False),
        ("AMD64", True, False),
    ],
)
def test_processors_without_a_named_instruction_set(monkeypatch, machine, supported, expected):
    """ARM is one to torch, where oneDNN knows whether it has bfloat16 units; an x86 processor is too old for them."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "instruction_set", lambda: "DEFAULT")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert has_bf16_units("cpu") == expected


def test_bfloat16_without_units_is_refused(monkeypatch):
    monkeypatch.setattr(processor, "_cpu_has_bf16_units", lambda: False)
    monkeypatch.setattr(processor, "instruction_set", lambda: "AVX2")
    with pytest.raises(ValueError, match=r"bfloat16, got cpu with AVX2, .*: use trainer.precision=32-true"):
        require_bf16_units("cpu", "trainer.precision=bf16-mixed", "trainer.precision=32-true")
    monkeypatch.setattr(processor, "_cpu_has_bf16_units", lambda: True)
    require_bf16_units("cpu", "trainer.precision=bf16-mixed", "trainer.precision=32-true")


@pytest.mark.parametrize("command", ["clipgen-train", "clipgen-sample"])
def test_commands_refuse_bfloat16_without_units(call, monkeypatch, command):
    monkeypatch.setattr(processor, "_cpu_has_bf16_units", lambda: False)
    arguments, override = {
        "clipgen-train": (
            ["stage=vqgan", "trainer.precision=bf16-mixed", "trainer.accelerator=cpu", "output=run"],
            "trainer.precision=32-true",
        ),
        "clipgen-sample": (["--prompt", "a red star", "--dtype", "bfloat16", "--device", "cpu"], "--dtype float32"),
    }[command]
    result = call(command, *arguments)
    assert result.code == 1 and result.stderr.strip().endswith(f"use {override}"), result.stderr
    assert "must run on a device that multiplies in bfloat16" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.accelerator=cuda"], ["high"]),
        (["trainer.accelerator=cuda", "matmul_precision=highest"], ["highest"]),
        (["trainer.accelerator=cpu"], []),
    ],
)
def test_gpus_train_in_tf32_by_default(monkeypatch, overrides, expected):
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    set_precision(to_training_config(compose_config("stage=vqgan", *overrides)))
    assert seen == expected


def test_other_matmul_precisions_are_refused():
    with pytest.raises(ValueError, match="matmul_precision must be one of highest, high, got 'low'"):
        set_precision(to_training_config(compose_config("stage=vqgan", "matmul_precision=low")))


def test_optimizers_are_fused_if_torch_has_the_kernels():
    module = nn.Linear(2, 2)
    assert has_fused_kernels(module.parameters())
    assert not has_fused_kernels(nn.Linear(2, 2, device="meta").parameters())
    for name in ("adamw", "muon"):
        groups = make_optimizer(module, module, TransformerOptimizerConfig(name=name)).param_groups
        assert all(group["fused"] for group in groups if "fused" in group)
    assert math.isclose(muon.adjusted_lr(1.0, None, (8, 2)), 2.0)
