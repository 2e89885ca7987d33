"""The device that is used if none is named, and whether it should compile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipgen.hardware.environment import environment_int

if TYPE_CHECKING:
    import torch

COMPILE_OPTIONS = (True, False, "auto")


def default_device() -> str:
    """Return CUDA if available, else MPS, else CPU. torchrun and SLURM processes get one GPU each."""
    import torch

    if torch.cuda.is_available():
        local_rank = environment_int("LOCAL_RANK", environment_int("SLURM_LOCALID", 0))
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_compile(option: bool | str) -> bool | str:
    """Return the option ``compile`` of a model. Raise ValueError if it is not true, false or "auto"."""
    if option not in COMPILE_OPTIONS:
        raise ValueError(f"compile must be true, false or auto, got {option!r}")
    return option


def should_compile(option: bool | str, device: torch.device) -> bool:
    """Return whether to train with torch.compile; "auto" compiles on a GPU, where it soon saves what it took."""
    if option == "auto":
        return device.type == "cuda" and can_compile()
    return bool(option)


def can_compile() -> bool:
    """Return whether torch.compile has what it needs on a GPU: Triton, in a version that supports the GPU."""
    from torch.utils._triton import has_triton

    return has_triton()
