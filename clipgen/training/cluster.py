"""Support for torchrun and SLURM: the number of processes, restarts, and requeued jobs."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import subprocess
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch.distributed
from torch.distributed import TCPStore

from clipgen.data.handover import FOLDER_VARIABLE, share_results_in_files
from clipgen.hardware.environment import environment_int

logger = logging.getLogger(__name__)


def check_num_processes(world_size: int) -> None:
    """Raise ValueError if torchrun has started another number of processes than the trainer expects."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    started = environment_int("WORLD_SIZE", 0)
    if started != world_size:
        raise ValueError(
            f"trainer.devices times trainer.num_nodes must be {started}, the processes that torchrun "
            f"started, got {world_size}"
        )


def use_own_store() -> None:
    """Give the processes that torchrun has restarted a store of their own.

    By default, torchrun keeps one store over all restarts (pytorch/pytorch#135712). It still contains the addresses of
    the processes of the last attempt, and a new process that reads them waits for a dead one. Attempts differ in
    TORCHELASTIC_RESTART_COUNT, which is the same in all processes of one machine only.

    Raises:
        RuntimeError: the processes were restarted on several machines, with the store of torchrun.
    """
    attempt = environment_int("TORCHELASTIC_RESTART_COUNT", 0)
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        raise RuntimeError(
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE must be 1 in the environment of torchrun, so that it can restart "
            "processes on several machines"
        )
    shared = TCPStore(os.environ["MASTER_ADDR"], environment_int("MASTER_PORT"), is_master=False)
    key = f"clipgen/port/{attempt}"
    if os.environ["RANK"] == "0":
        shared.set(key, str(free_port()))
    os.environ["MASTER_PORT"] = shared.get(key).decode()
    # Now rank 0 serves the store.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def share_results(trainer: pl.Trainer) -> AbstractContextManager[None]:
    """Let the processes of a training run receive the results that ``clipgen.data.handover`` computes on rank 0.

    Processes of torchrun and SLURM, which exist already, are connected. Those of Lightning are started inside the
    ``with``, and receive the results in files.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or environment is None:
        return nullcontext()
    if environment.creates_processes_externally:
        # A process that Lightning has started finds its parent's results in its environment.
        if FOLDER_VARIABLE not in os.environ:
            connect(trainer.strategy)
        return nullcontext()
    return share_results_in_files()


def connect(strategy: Any) -> None:
    """Make the process group that Lightning would make at the start of the training."""
    strategy.accelerator.setup_device(strategy.root_device)
    # DDP and FSDP name it differently; their setup_environment also needs the model.
    setup = getattr(strategy, "setup_distributed", None) or strategy._setup_distributed
    setup()


def leave_group_at_exit() -> None:
    """Leave the process group when Python exits.

    Otherwise threads of Gloo may still run while the interpreter is finalized, which aborts the process after a
    run that has succeeded. Lightning does this for NCCL only.
    """
    atexit.register(leave_group)


def leave_group() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def requeue_slurm_job() -> None:
    """Ask SLURM to run this job again, which resumes it with resume=auto."""
    job = os.environ["SLURM_JOB_ID"]
    array_job = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array_job:
        job = f"{array_job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("The job %s could not be requeued: %s", job, error)
