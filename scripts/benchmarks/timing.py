"""Clocks, peak memory, fresh processes, and tables of the results."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from clipgen.hardware.processor import has_bf16_units, instruction_set, processor_name

# Environment that makes torch's own kernels, oneDNN and MKL do without what AVX2 does not have. The libraries read it
# when they are loaded.
IMITATE = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        # Otherwise torch.compile would reuse the kernels of the processor itself.
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), "torchinductor_avx2"),
    },
}
WARM_UP_STEPS = 3  # training steps that are not measured


def seconds(function: Callable[[], Any], device: str) -> float:
    """Return the duration of one call."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], Any], steps: int, device: str) -> float:
    """Return the median duration of a call, after two calls that are not measured."""
    durations = [seconds(function, device) for _ in range(steps + 2)]
    return statistics.median(durations[2:])


def alternating_medians(functions: dict[str, Callable[[], Any]], steps: int, device: str) -> dict[str, float]:
    """Return the median duration of each function. They take turns, so that a disturbance affects all of them."""
    durations: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(steps + 1):
        for name, function in functions.items():
            durations[name].append(seconds(function, device))
    return {name: statistics.median(values[1:]) for name, values in durations.items()}


def peak_memory(device: str) -> float:
    """Return the largest amount of memory that this process has used, in GiB; NaN on the CPU under Windows."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StepTimer(pl.Callback):
    """Time from the end of one training step to the end of the next, which includes loading the batch.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        period: number of steps after which the same work repeats, e.g. the interval of the CLIP loss.
    """

    def __init__(self, device: str, period: int):
        self.device = device
        self.period = period
        self.ends = [timestamp(device)]

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(timestamp(self.device))

    @property
    def seconds_per_step(self) -> float:
        """The median over periods."""
        ends = self.ends[WARM_UP_STEPS :: self.period]
        return statistics.median(elapsed(start, end) / self.period for start, end in itertools.pairwise(ends))


def timestamp(device: str) -> Any:
    """Return the current time; on a GPU an event between its kernels, so that the host does not wait for them."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any, end: Any) -> float:
    """Return the seconds from one timestamp to another."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def imitate_processor(name: str | None) -> None:
    """Replace this process by one whose environment imitates an instruction set, unless it has that environment."""
    wanted = IMITATE.get(name or "", {})
    if any(os.environ.get(variable) != value for variable, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def describe_machine(device: str) -> str:
    """Return device, instruction set, number of threads and build of torch."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    units = "with" if has_bf16_units("cpu") else "without"
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    description = (
        f"{name}, CPU {instruction_set()} {units} bfloat16 units, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__} (BLAS {blas[1] if blas else 'unknown'})"
    )
    if device == "cuda":
        convolutions = torch.backends.cudnn.allow_tf32
        products = torch.backends.cuda.matmul.allow_tf32
        description += f"; TF32 in fp32 convolutions {convolutions}, products {products}, products of training True"
    return description


def print_table(title: str, rows: dict[str, dict[str, float]], ratio: str) -> None:
    """Print rows as a Markdown table; the last column is the ratio of column ``ratio`` to that of the first row."""
    first = next(iter(rows.values()))
    print(f"| {title} | {' | '.join(first)} | {ratio}, ratio |")
    print("|---" * (len(first) + 2) + "|")
    for name, row in rows.items():
        values = [f"{row[column]:.4g}" for column in first]
        print(f"| {name} | {' | '.join(values)} | {row[ratio] / first[ratio]:.2f} |")
