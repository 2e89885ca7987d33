"""Run the commands as a user does, on networks so small that a step takes milliseconds."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipgen.cli import baseline, convert, demo, encode, evaluate, sample, train

MAINS = {
    "clipgen-train": train.main,
    "clipgen-sample": sample.main,
    "clipgen-demo": demo.main,
    "clipgen-convert": convert.main,
    "clipgen-encode": encode.main,
    "clipgen-eval": evaluate.main,
    "clipgen-baseline": baseline.main,
}
SHAPES = ["data.train_size=64", "data.val_size=8"]
STEPS = [
    "data.batch_size=8",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=2",
    "image_logger.num_images=4",
]
TINY_VQGAN = [
    "stage=vqgan",
    "model.autoencoder.ch=32",
    "model.autoencoder.ch_mult=[1]",
    "model.autoencoder.num_res_blocks=1",
    "model.autoencoder.z_channels=32",
    "model.quantizer.codebook_size=16",
    "model.quantizer.codebook_dim=8",
    "model.autoencoder.patch_size=8",
    "model.optimizer.warmup_steps=1",
]
VQGAN = [*TINY_VQGAN, *STEPS]
TRANSFORMER = [
    "stage=transformer",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.optimizer.warmup_steps=1",
    *STEPS,
]
PROMPT = "a large blue ring on a white background"
# It changes the title of a terminal's window.
ESCAPE = "\x1b]0;owned\x07"


def command(name: str, *arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run an installed command in its own process, in a folder."""
    program = Path(sys.executable).parent / name
    if not program.is_file():
        pytest.skip(f"{name} is not installed beside this Python: pip install -e .")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [program, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, **options
    )


def torchrun(folder: Path, options: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with torchrun on this machine."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, stderr = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        # SIGTERM lets torchrun stop the processes that it has started, SIGKILL would leave them
        process.terminate()
        _, stderr = process.communicate()
    return subprocess.CompletedProcess(program, process.returncode, "", stderr)


class Call:
    """Output and exit code of a command that is called within this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, *arguments: object):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            patch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; this puts it back
            capsys.readouterr()
            MAINS[name]()
        self.code = end.value.code
        self.stdout, self.stderr = capsys.readouterr()


@functools.cache
def trained(base: Path) -> tuple[Path, Path]:
    """Train both stages once per session; return the folder and the run folder of stage 2."""
    folder = base / "trained"
    folder.mkdir()
    adversary = ["model.gan.weight=0.8", "model.gan.start_step=1", "model.gan.channels=8", "model.gan.num_layers=1"]
    for arguments in ([*VQGAN, *adversary], [*TRANSFORMER, "model.conditioning.drop_prob=0.5", "vqgan=vqgan_run"]):
        done = command("clipgen-train", *arguments, *SHAPES, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "Finished 4 steps: outputs/" in done.stderr and "Traceback" not in done.stderr
        if not (folder / "vqgan_run").exists():
            (folder / "vqgan_run").symlink_to(only(folder / "outputs" / "vqgan"))
    return folder, only(folder / "outputs" / "transformer")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, model: type, method: str, when: int) -> None:
    """Send Ctrl-C in the middle of the n-th call of a model's method."""
    original, calls = getattr(model, method), iter(range(1, 1000))

    def interrupted(self, *arguments):
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(model, method, interrupted)


def only(folder: Path) -> Path:
    """Return the only entry of a folder."""
    (path,) = folder.iterdir()
    return path


def everything(folder: Path) -> set[str]:
    """Return the relative paths of all files and folders below a folder, including hidden ones."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
