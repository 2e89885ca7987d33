"""Both stages, encoding and evaluation on two hosts; one of them is killed, and the run ends like an undisturbed one.

The hosts are two network namespaces of this machine that are joined by a virtual link, which needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import TINY_VQGAN
from test_resume import state

SUBNET = "10.213.7"
PORT = 29471

# What a job script does on each host, one command after another, in two folders. It can be repeated.
JOB = """
import os, sys, time
from itertools import product
from pathlib import Path
from clipgen.cli import encode, evaluate, train
from clipgen.transformer import ConditionalTransformer

rank = os.environ["RANK"]
original, mark = ConditionalTransformer.training_step, Path("reached")

def step(self, *arguments):
    # the place at which host 1 is killed
    if folder == "disturbed" and self.global_step == 3 and rank == "1" and not mark.exists():
        mark.touch()
        time.sleep(1000)
    return original(self, *arguments)

ConditionalTransformer.training_step = step

for folder, (number, (name, *arguments)) in product(("undisturbed", "disturbed"), enumerate({commands!r})):
    finished = [Path(folder, f"finished-{{number}}-{{other}}") for other in range(2)]
    sys.argv = [name, *(argument.replace("FOLDER", folder) for argument in arguments)]
    try:
        if not all(path.exists() for path in finished):
            {{"clipgen-train": train, "clipgen-encode": encode, "clipgen-eval": evaluate}}[name].main()
    except SystemExit as exit:
        if exit.code:
            raise
    finished[int(rank)].touch()
    # as the next job of a queue, the next command starts when this one has ended on all hosts
    while not all(path.exists() for path in finished):
        time.sleep(0.05)
"""
DEVICES = [
    "trainer.num_nodes=2",
    "trainer.accelerator=cpu",
    "data.batch_size=2",
    "logger=none",
    "image_logger.num_images=1",
]
TRAINING = [
    "trainer.max_steps=5",
    "trainer.val_check_interval=3",
    "model.optimizer.schedule=constant",
    "checkpoint.every_n_steps=1",
    "trainer.num_sanity_val_steps=0",
    "resume=auto",
]
SHAPES = ["data.train_size=24", "data.val_size=4"]
COMMANDS = [
    ["clipgen-train", *TINY_VQGAN, *DEVICES, *TRAINING, *SHAPES, "output=FOLDER/vqgan_run"],
    ["clipgen-encode", "vqgan=FOLDER/vqgan_run", "output=FOLDER/cache", *SHAPES, "shard_size=6", "device=cpu"],
    [
        "clipgen-train",
        "stage=transformer",
        "model.n_layer=1",
        "model.n_head=2",
        "model.n_embd=32",
        *DEVICES,
        *TRAINING,
        "data=cached",
        "data.root=FOLDER/cache",
        "vqgan=FOLDER/vqgan_run",
        "output=FOLDER/transformer_run",
    ],
    [
        "clipgen-eval",
        "--checkpoint=FOLDER/transformer_run",
        "--captions=shapes",
        "--num-images=8",
        "--features=none",
        "--clip=shapes",
        "--device=cpu",
        "--output=FOLDER/evaluation",
    ],
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Return the names of two network namespaces with the addresses SUBNET.1 and SUBNET.2, which reach each other."""
    names = [f"clipgen-{os.getpid()}-{number}" for number in range(2)]
    links = ["clipgen-a", "clipgen-b"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", links[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links), start=1):
            ip("-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove_namespaces(names)
        pytest.skip(f"network namespaces need root and the command ip: {error}")
    yield names
    remove_namespaces(names)


def remove_namespaces(names: list[str]) -> None:
    if shutil.which("ip"):
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_host(hosts: list[str], number: int, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start torchrun on one of the hosts, as on a cluster: the same command on each, with the address of the first."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-id=job",
        f"--rdzv-endpoint={SUBNET}.1:{PORT}",
        f"--local-addr={SUBNET}.{number + 1}",
        # torchrun cannot tell by the name of the machine, which both hosts have. By default, a host is given up after
        # three missed heartbeats of five seconds.
        f"--rdzv-conf=is_host={int(number == 0)},keep_alive_interval=1,keep_alive_max_attempt=5",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": ("clipgen-a", "clipgen-b")[number],
    }
    with (folder / f"host{number}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", hosts[number], *torchrun, *arguments],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def processes_on(host: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def kill_host(host: str) -> None:
    """Kill all processes of a host at once."""
    for pid in processes_on(host):
        os.kill(pid, signal.SIGKILL)


def run_job(hosts: list[str], folder: Path) -> None:
    """Run the job on both hosts; kill the second one where it stops, and start it again."""
    processes = [start_host(hosts, number, folder, "job.py") for number in range(2)]
    deadline = time.monotonic() + 280
    try:
        wait_for(lambda: (folder / "reached").exists() or processes[0].poll() is not None, deadline, folder)
        kill_host(hosts[1])
        processes[1].wait()
        processes[1] = start_host(hosts, 1, folder, "job.py")
        wait_for(lambda: all(process.poll() is not None for process in processes), deadline, folder)
    finally:
        for host in hosts:
            kill_host(host)
    assert [process.returncode for process in processes] == [0, 0], logs(folder)


def wait_for(condition, deadline: float, folder: Path) -> None:
    while not condition():
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.05)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(folder.glob("host*.log")))


@pytest.mark.slow
def test_killed_host_is_restarted_and_the_run_ends_like_an_undisturbed_one(hosts, tmp_path):
    (tmp_path / "job.py").write_text(JOB.format(commands=COMMANDS))
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    run_job(hosts, tmp_path)
    assert (tmp_path / "reached").exists()
    for stage in ("vqgan_run", "transformer_run"):
        expected, resumed = state(undisturbed / stage), state(disturbed / stage)
        assert expected["step"] == 5 and expected.keys() == resumed.keys()
        assert not [name for name, tensor in expected.items() if not tensor.equal(resumed[name])]
    for shard in (undisturbed / "cache").rglob("shard-*.npy"):
        assert shard.read_bytes() == (disturbed / shard.relative_to(undisturbed)).read_bytes()
    results = [json.loads((folder / "evaluation/metrics.json").read_text()) for folder in (undisturbed, disturbed)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["protocol"]["images"] == 8
