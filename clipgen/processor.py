"""Describe what the processor at hand multiplies fast."""

from __future__ import annotations

import os

import torch

# oneDNN may be told to leave out what a processor has: of these only AVX-512 without bfloat16 is not below AVX-512
WITHOUT_BF16 = ("AVX512_CORE", "AVX512_CORE_VNNI")


def instruction_set() -> str:
    """Return the widest instruction set that torch's CPU kernels use, such as ``"AVX2"`` or ``"AVX512"``.

    ``ATEN_CPU_CAPABILITY`` in the environment lowers it.
    """
    return torch.backends.cpu.get_cpu_capability()


def has_bf16_units(device: torch.device | str = "cpu") -> bool:
    """Return True if a device multiplies matrices in bfloat16 faster than in float32.

    Other devices accept bfloat16 as well, and are many times slower than in float32. ``ATEN_CPU_CAPABILITY`` and
    ``ONEDNN_MAX_CPU_ISA``, which imitate an older processor, are honored.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    return device.type == "cpu" and _cpu_has_bf16_units()


def _cpu_has_bf16_units() -> bool:
    try:
        # False below AVX-512 and on ARM without bfloat16, and True on AVX-512 that emulates bfloat16
        accepted = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False
    if not accepted or instruction_set() in ("DEFAULT", "AVX2"):
        return False
    if "AVX512" not in instruction_set():  # ARM, where oneDNN asks the processor itself
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return limit not in WITHOUT_BF16 and (_cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported"))


def _cpu_has(name: str) -> bool:
    """Ask torch for a feature of the CPU; the functions are private, and may be missing in another version."""
    ask = getattr(torch.cpu, name, None)
    return bool(ask()) if ask else False


def require_bf16_units(device: torch.device | str, option: str, override: str) -> None:
    """Raise ValueError if bfloat16, asked for by ``option``, would be many times slower than float32.

    What Apple's GPUs do is not known, and accepted.

    Args:
        device: where the matrix products would run.
        option: the option with its value. override: what to give instead.
    """
    kind = torch.device(device).type
    # That there is no GPU is reported where it would be used
    known = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    if known and not has_bf16_units(device):
        name = f"{kind} with {instruction_set()}" if kind == "cpu" else kind
        raise ValueError(
            f"{option} must run on a device that multiplies in bfloat16, got {name}, "
            f"where it would be many times slower than float32: give {override}"
        )
