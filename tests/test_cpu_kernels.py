"""Kernels of the linear layers of small batches on CPUs, and the choice between them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.activations import ACT2FN

from clipgen.models import cpu_kernels
from clipgen.models.kv_cache import IncrementalDecoder


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("kernel", [cpu_kernels.addmm_linear, cpu_kernels.split_linear, cpu_kernels.prepacked_linear])
def test_all_kernels_compute_the_product(kernel, batch_size):
    if kernel is cpu_kernels.prepacked_linear and not cpu_kernels.has_prepacked_kernels():
        pytest.skip("this build of torch has no prepacked oneDNN kernels")
    weight, bias = torch.randn(32, 48), torch.randn(48)
    x = torch.randn(batch_size, 32)
    expected = (x.double() @ weight.double() + bias.double()).float()
    torch.testing.assert_close(kernel(weight, bias)(x), expected, atol=1e-5, rtol=1e-5)
    for name in ("gelu_pytorch_tanh", "gelu", "gelu_new", "relu"):
        activation = ACT2FN[name]
        y = kernel(weight, bias, activation)(x)
        torch.testing.assert_close(y, activation(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "inputs", "outputs", "avx2", "avx512"),
    [
        (1, 128, 512, cpu_kernels.addmm_linear, cpu_kernels.addmm_linear),
        (1, 512, 2048, cpu_kernels.split_linear, cpu_kernels.split_linear),
        (1, 512, 2049, cpu_kernels.prepacked_linear, cpu_kernels.prepacked_linear),
        (1, 2048, 512, cpu_kernels.prepacked_linear, cpu_kernels.split_linear),
        (3, 128, 512, cpu_kernels.prepacked_linear, cpu_kernels.prepacked_linear),
    ],
)
def test_usual_kernels_follow_from_shape_and_instruction_set(monkeypatch, batch_size, inputs, outputs, avx2, avx512):
    monkeypatch.setattr(cpu_kernels, "has_prepacked_kernels", lambda: True)
    for name, expected in (("AVX2", avx2), ("AVX512", avx512)):
        monkeypatch.setattr(cpu_kernels, "instruction_set", lambda name=name: name)
        assert cpu_kernels.usual_cpu_kernel(batch_size, inputs, outputs) is expected


def test_fastest_kernel_is_measured_once_and_kept(monkeypatch, kernel_cache):
    """The next process takes the choice of the first, whatever it would measure, so that samples stay the same."""
    answers = ["addmm_linear", "prepacked_linear"]
    monkeypatch.setattr(cpu_kernels, "fastest_kernel", lambda *_: answers.pop(0))
    for _ in range(2):
        assert cpu_kernels.choose_cpu_kernel(1, 512, 2048) is cpu_kernels.addmm_linear
        cpu_kernels.measured_kernel.cache_clear()  # as in another process
    assert answers == ["prepacked_linear"]
    (key,) = json.loads((kernel_cache / "kernels.json").read_text())
    assert "product 1 x 512 x 2048" in key and torch.__version__ in key
    for batch_size, inputs, outputs in ((3, 512, 2048), (1, 128, 512)):  # one kernel is known to be the best
        cpu_kernels.choose_cpu_kernel(batch_size, inputs, outputs)
    assert answers == ["prepacked_linear"]


@pytest.mark.parametrize(("advantage", "expected"), [(0.97, "usual"), (0.9, "other")])
def test_small_advantages_do_not_outweigh_the_usual_kernel(monkeypatch, advantage, expected):
    """They are within the noise of the measurement."""
    clock = [0.0]

    def kernel(seconds: float):
        def run(x):
            clock[0] += seconds

        return lambda weight, bias: run

    monkeypatch.setattr(cpu_kernels.time, "perf_counter", lambda: clock[0])
    kernels = {"usual": kernel(1.0), "other": kernel(advantage)}
    assert cpu_kernels.fastest_kernel(kernels, "usual", 1, 8, 8) == expected


class WrongOperators:
    """Operators whose product omits the bias."""

    _reorder_linear_weight = staticmethod(lambda weight, batch_size: weight)
    _linear_pointwise = staticmethod(lambda x, packed, *_: x @ packed.T)


@torch.no_grad()
@pytest.mark.parametrize("operators", [object(), WrongOperators()], ids=["none", "wrong"])
def test_missing_or_wrong_onednn_operators_are_not_used(monkeypatch, operators):
    """The operators are private, and may differ on other processors and in later versions of torch."""
    cpu_kernels.has_prepacked_kernels.cache_clear()
    monkeypatch.setattr(cpu_kernels, "onednn", operators)
    try:
        weight, bias, x = torch.randn(32, 48), torch.randn(48), torch.randn(5, 32)
        assert cpu_kernels.choose_cpu_kernel(5, 32, 48) is cpu_kernels.addmm_linear
        assert torch.equal(IncrementalDecoder.make_linear(weight, bias, 5)(x), torch.addmm(bias, x, weight))
    finally:
        cpu_kernels.has_prepacked_kernels.cache_clear()
