"""Linear layers of small batches on a CPU, which are memory-bound, and the choice of the fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.activations import GELUActivation, GELUTanh

from clipgen.hardware.measured_choices import measured_choice
from clipgen.hardware.processor import instruction_set

Linear = Callable[[Tensor], Tensor]  # (B, in) -> (B, out)
Activation = Callable[[Tensor], Tensor]
# Takes a weight (in, out), a bias, and (optionally) an activation of the outputs.
LinearFactory = Callable[..., Linear]

# Activations that oneDNN computes within the product, and its name of their approximation.
FUSED_GELUS = {GELUTanh: "tanh", GELUActivation: "none"}

# The code of torch.compile uses these operators on a CPU.
onednn: Any = torch.ops.mkldnn

# Number of rows that the memory layout is made for. It is also the fastest layout for fewer and for more rows: for 8
# rows it is 5 to 12 % faster than the layout for 8.
PACKED_ROWS = 16
# A weight with at most this many elements stays in the processor's cache, where torch's own product is fastest.
MAX_CACHED_ELEMENTS = 2**17
# Memory of the weights of a measurement, larger than the caches of most processors.
MEASURED_BYTES = 2**26
MAX_COPIES = 16
MEASUREMENTS = 7
# A kernel replaces the usual one if it takes at most this fraction of its time.
MIN_ADVANTAGE = 0.95


def addmm_linear(weight: Tensor, bias: Tensor, activation: Activation | None = None) -> Linear:
    """Return a linear layer, (B, in) -> (B, out), that uses torch's own product.

    Args:
        weight: (in, out).
        bias: (out,).
        activation: function of the outputs; None applies none.
    """
    return with_activation(lambda x: torch.addmm(bias, x, weight), activation)


def split_linear(weight: Tensor, bias: Tensor, activation: Activation | None = None) -> Linear:
    """Return a linear layer that reads the two halves of the transposed weight in parallel, as a batch of products.

    Args:
        weight: (in, out), with an even number of outputs.
        bias: (out,).
        activation: function of the outputs; None applies none.
    """
    inputs = weight.shape[0]
    halves = weight.T.contiguous().view(2, -1, inputs)
    column = bias.view(2, -1, 1)
    return with_activation(
        lambda x: torch.baddbmm(column, halves, x.T.expand(2, -1, -1)).flatten(0, 1).T,
        activation,
    )


def prepacked_linear(weight: Tensor, bias: Tensor, activation: Activation | None = None) -> Linear:
    """Return a linear layer that uses oneDNN's product, with the weight in oneDNN's own memory layout.

    A GELU is computed within the product: on its own, torch computes it by one thread for small batches.

    Args:
        weight: (in, out).
        bias: (out,).
        activation: function of the outputs; None applies none.
    """
    packed = onednn._reorder_linear_weight(weight.T.contiguous(), PACKED_ROWS)
    approximation = FUSED_GELUS.get(type(activation))  # type: ignore[arg-type]
    if approximation:
        return lambda x: onednn._linear_pointwise(x, packed, bias, "gelu", [], approximation)
    return with_activation(lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], ""), activation)


def with_activation(linear: Linear, activation: Activation | None) -> Linear:
    """Return a linear layer followed by an activation."""
    return linear if activation is None else lambda x: activation(linear(x))


def choose_cpu_kernel(batch_size: int, inputs: int, outputs: int) -> LinearFactory:
    """Choose the linear layer for a float32 weight (inputs, outputs) on a CPU.

    The fastest kernel for one or two rows depends on the shape and on the processor, so it is measured once and stored
    in a file. Kernels differ by floating-point rounding, so a different choice could sample another index from the same
    seed. The choice is therefore read from a file; a process that cannot write the file uses the rule instead of
    measuring.
    """
    usual = usual_cpu_kernel(batch_size, inputs, outputs)
    if batch_size > 2 or inputs * outputs <= MAX_CACHED_ELEMENTS:
        return usual
    name = measured_kernel(usual.__name__, batch_size, inputs, outputs, torch.get_num_threads())
    return cpu_kernels(outputs).get(name, usual)


@cache
def measured_kernel(usual: str, batch_size: int, inputs: int, outputs: int, threads: int) -> str:
    """Return the name of the kernel that is stored for a shape, or "" if none can be stored."""
    measure = partial(fastest_kernel, cpu_kernels(outputs), usual, batch_size, inputs, outputs)
    return measured_choice(f"product {batch_size} x {inputs} x {outputs}", measure)


def usual_cpu_kernel(batch_size: int, inputs: int, outputs: int) -> LinearFactory:
    """Return the kernel that was the fastest on the processors that were tried, by shape and instruction set."""
    if batch_size <= 2:
        if inputs * outputs <= MAX_CACHED_ELEMENTS:
            return addmm_linear
        tall_on_avx2 = inputs > outputs and instruction_set() == "AVX2"
        if outputs % 2 == 0 and not (tall_on_avx2 and has_prepacked_kernels()):
            return split_linear
    return prepacked_linear if has_prepacked_kernels() else addmm_linear


def cpu_kernels(outputs: int) -> dict[str, LinearFactory]:
    """Return the kernels that can compute a number of outputs, by name."""
    kernels: list[LinearFactory] = [addmm_linear]
    if outputs % 2 == 0:
        kernels.append(split_linear)
    if has_prepacked_kernels():
        kernels.append(prepacked_linear)
    return {kernel.__name__: kernel for kernel in kernels}


@torch.inference_mode(False)
@torch.no_grad()
def fastest_kernel(
    kernels: Mapping[str, LinearFactory],
    usual: str,
    batch_size: int,
    inputs: int,
    outputs: int,
) -> str:
    """Measure kernels, and return the name of the fastest; a small advantage does not outweigh the usual one."""
    generator = torch.Generator().manual_seed(0)
    copies = min(max(MEASURED_BYTES // (4 * inputs * outputs), 1), MAX_COPIES)
    # A decoding step reads many weights, so that none is in the processor's cache when its turn comes.
    weights = torch.rand(copies, inputs, outputs, generator=generator)
    bias = torch.zeros(outputs)
    x = torch.rand(batch_size, inputs, generator=generator)
    layers = {}
    for name, kernel in kernels.items():
        layers[name] = [kernel(weight, bias) for weight in weights]
    seconds = dict.fromkeys(kernels, math.inf)
    for _ in range(MEASUREMENTS):
        for name, functions in layers.items():
            start = time.perf_counter()
            for function in functions:
                function(x)
            # Disturbances only ever add to the time.
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < MIN_ADVANTAGE * seconds[usual] else usual


@cache
def has_prepacked_kernels() -> bool:
    """Return whether this build of torch has oneDNN's private operators and they compute the correct product."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.linspace(-1, 1, 32, device="cpu").view(8, 4)
    bias = torch.ones(4, device="cpu")
    x = torch.linspace(-1, 2, 24, device="cpu").view(3, 8)
    gelu = GELUTanh()
    try:
        y = prepacked_linear(weight, bias)(x)
        activated = prepacked_linear(weight, bias, gelu)(x)
    # The operators may be missing, not support this processor, or take other arguments.
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = torch.addmm(bias, x, weight)
    return all_close(y, expected) and all_close(activated, gelu(expected))


def all_close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have one shape and equal values up to rounding."""
    return actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-4)
