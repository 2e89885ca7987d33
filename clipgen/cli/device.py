"""Where a command runs: on which device, and as which of several processes."""

from __future__ import annotations

import os


def default_device() -> str:
    """The fastest device of this machine; of several GPUs one for each process that torchrun or SLURM started."""
    import torch

    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        return f"cuda:{number % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def rank_and_world_size() -> tuple[int, int]:
    """Which of how many processes this is, by torchrun, or by a SLURM array or step.

    Raises:
        ValueError: it is none of them, so nobody would do the work of some: an array with gaps.
    """
    for rank, size, first, step in (
        ("RANK", "WORLD_SIZE", "", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
        ("SLURM_PROCID", "SLURM_NTASKS", "", ""),
    ):
        if rank in os.environ and size in os.environ:
            place = int(os.environ[rank]) - int(os.environ.get(first, 0))
            number, rest = divmod(place, int(os.environ.get(step, 1)))
            if rest or not 0 <= number < (count := int(os.environ[size])):
                raise ValueError(f"{rank}={os.environ[rank]} is none of {os.environ[size]} in a row: leave no gaps")
            return number, count
    return 0, 1
