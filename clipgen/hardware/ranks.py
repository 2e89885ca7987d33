"""The rank of this process among several, which torchrun or SLURM has started."""

from __future__ import annotations

import os

from clipgen.hardware.environment import environment_int


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as set by torchrun or SLURM; else (0, 1).

    Raises:
        ValueError: the rank is out of range, so that some part of the work would not be done by any process.
    """
    if is_set("RANK", "WORLD_SIZE"):
        return check_rank("RANK", environment_int("RANK"), environment_int("WORLD_SIZE"))
    if is_set("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        return slurm_array_rank()
    if is_set("SLURM_PROCID", "SLURM_NTASKS"):
        return check_rank("SLURM_PROCID", environment_int("SLURM_PROCID"), environment_int("SLURM_NTASKS"))
    return 0, 1


def slurm_array_rank() -> tuple[int, int]:
    """Return the rank in a SLURM array, whose task ids may start anywhere and have a step."""
    task_id = environment_int("SLURM_ARRAY_TASK_ID")
    first = environment_int("SLURM_ARRAY_TASK_MIN", 0)
    step = environment_int("SLURM_ARRAY_TASK_STEP", 1)
    # An id between two steps gets a rank that is out of range.
    rank = -1 if (task_id - first) % step else (task_id - first) // step
    return check_rank("SLURM_ARRAY_TASK_ID", rank, environment_int("SLURM_ARRAY_TASK_COUNT"))


def check_rank(name: str, rank: int, world_size: int) -> tuple[int, int]:
    """Return the rank and the number of processes, or raise ValueError if the rank is out of range."""
    if not 0 <= rank < world_size:
        raise ValueError(
            f"{name}={os.environ[name]} does not fit {world_size} processes: number them without gaps, such as "
            f"--array=0-{world_size - 1}"
        )
    return rank, world_size


def is_set(*names: str) -> bool:
    """Return whether all environment variables are set."""
    return all(name in os.environ for name in names)
