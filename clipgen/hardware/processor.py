"""Query a processor's instruction set and its support for fast bfloat16 matrix products."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch

# Limits of oneDNN's instruction set (ONEDNN_MAX_CPU_ISA) that include AVX-512 but exclude its bfloat16 instructions.
WITHOUT_BF16 = ("AVX512_CORE", "AVX512_CORE_VNNI")
X86 = ("x86_64", "AMD64", "i386", "i686")


def instruction_set() -> str:
    """Return the widest instruction set that torch's CPU kernels use, such as ``"AVX2"`` or ``"AVX512"``.

    The environment variable ``ATEN_CPU_CAPABILITY`` can lower it.
    """
    return torch.backends.cpu.get_cpu_capability()


@cache
def processor_name() -> str:
    """Return the model of the processor; its architecture if the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def has_bf16_units(device: torch.device | str = "cpu") -> bool:
    """Return whether a device multiplies matrices in bfloat16 faster than in float32.

    Other devices also accept bfloat16, but are many times slower in it than in float32. The environment variables
    ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA``, which imitate an older processor, are respected.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    return device.type == "cpu" and _cpu_has_bf16_units()


def _cpu_has_bf16_units() -> bool:
    try:
        # False below AVX-512 and on ARM without bfloat16, but True on AVX-512 that only emulates bfloat16.
        accepted = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False  # a build of torch without oneDNN
    # torch has the name DEFAULT also for ARM.
    if not accepted or (platform.machine() in X86 and instruction_set() in ("DEFAULT", "AVX2")):
        return False
    if "AVX512" not in instruction_set():
        return True  # ARM, where the answer of oneDNN is reliable
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return limit not in WITHOUT_BF16 and (_cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported"))


def _cpu_has(name: str) -> bool:
    """Return the result of a private function of torch.cpu, or False if this version of torch lacks it."""
    feature_test = getattr(torch.cpu, name, None)
    return bool(feature_test()) if feature_test else False


def require_bf16_units(device: torch.device | str, option: str, override: str) -> None:
    """Raise ValueError if bfloat16 would be many times slower than float32 on a device.

    Apple's GPUs are accepted, because their speed in bfloat16 is unknown.

    Args:
        device: device of the matrix products.
        option: the option that requests bfloat16, with its value.
        override: the option to use instead.
    """
    device_type = torch.device(device).type
    # A missing GPU is reported elsewhere, when it is used.
    known = device_type == "cpu" or (device_type == "cuda" and torch.cuda.is_available())
    if known and not has_bf16_units(device):
        name = f"cpu with {instruction_set()}" if device_type == "cpu" else device_type
        raise ValueError(
            f"{option} must run on a device that multiplies in bfloat16, got {name}, "
            f"where it would be many times slower than float32: use {override}"
        )
