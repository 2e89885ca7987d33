"""Describe the installation and the machine, for reports of errors."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import clipgen
from clipgen.hardware.environment import PACKAGES

# Packages of the extras and of scripts/replicate, which are named only if they are installed.
OPTIONAL_PACKAGES = ("torch-fidelity", "datasets", "gradio", "wandb", "optuna", "submitit", "cog")


def info_text() -> str:
    """Return the versions of clipgen, Python and the packages, and the processor, memory and GPUs of this machine."""
    lines = {
        "clipgen": f"{clipgen.__version__} ({Path(__file__).parents[1]})",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "packages": ", ".join(installed_packages()),
        "processor": describe_processor(),
        "memory": describe_memory(),
        "GPU": describe_gpus(),
    }
    return "\n".join(f"{name + ':':<11}{text}" for name, text in lines.items())


def installed_packages() -> list[str]:
    """Return name and version of each package; a required one that is missing is named as such."""
    texts = []
    for name in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            texts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name in PACKAGES:
                texts.append(f"{name} missing")
    return texts


def describe_processor() -> str:
    """Return the processor, its cores, the instruction set that torch uses, and whether bfloat16 is fast on it."""
    import torch

    from clipgen.hardware.processor import has_bf16_units, instruction_set, processor_name

    bfloat16 = "fast" if has_bf16_units("cpu") else "emulated"
    cores = f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}"
    return f"{processor_name()}, {cores}, instruction set {instruction_set()}, bfloat16 {bfloat16}"


def describe_memory() -> str:
    """Return the size of the main memory, if the system reports it."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def describe_gpus() -> str:
    """Return name, memory and compute capability of each GPU, and the version of CUDA that torch was built for."""
    import torch

    if torch.backends.mps.is_available():
        return "MPS"
    built_for = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        return f"none (torch is built for {f'CUDA {built_for}' if built_for else 'CPUs only'})"
    gpus = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        gpus.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    return f"{'; '.join(gpus)}; CUDA {built_for}"
