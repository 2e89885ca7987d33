"""The device that is used if none is named."""

from __future__ import annotations

from clipgen.hardware.environment import environment_int


def default_device() -> str:
    """Return CUDA if available, else MPS, else CPU. torchrun and SLURM processes get one GPU each."""
    import torch

    if torch.cuda.is_available():
        local_rank = environment_int("LOCAL_RANK", environment_int("SLURM_LOCALID", 0))
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
