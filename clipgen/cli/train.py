"""``clipgen-train stage=vqgan`` and ``clipgen-train stage=transformer vqgan=PATH``."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import guarded
from clipgen.cli.output_dir import output_folder

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

logger = logging.getLogger("clipgen.train")
PACKAGES = (
    "clipgen",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "hydra-core",
)

# Of torch.set_float32_matmul_precision: "high" is TF32 on GPUs from Ampere on, "highest" is float32 everywhere
MATMUL_PRECISIONS = ("highest", "high")


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-train", run_hydra)


def run_hydra() -> None:
    """Hand over to Hydra for the configuration; errors come back here, to be told in one sentence."""
    if {"-h", "--help"} & set(sys.argv):
        print(help_text())
        return
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    from clipgen.cli.config import config_dir, explain
    from clipgen.cli.early_checks import settle
    from clipgen.cli.resume_args import refuse_other_runs, settle_resume, with_the_runs

    sys.argv[1:] = with_the_runs(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints them itself, over many lines
    errors: list[Exception] = []

    @hydra.main(config_path=config_dir(), config_name="train", version_base="1.3")
    def task(config: DictConfig) -> None:
        if sweep := HydraConfig.get().mode == RunMode.MULTIRUN:
            config.output = HydraConfig.get().runtime.output_dir
        try:
            settle_resume(config)
            settle(config)
            refuse_other_runs(config)
            train(config, sweep)
        except Exception as error:  # the other runs of a sweep go on, and need the memory
            traceback.clear_frames(error.__traceback__)
            # by name: to import Lightning's takes seconds, and most errors are known before
            ours = type(error).__name__ != "MisconfigurationException"
            errors.append(error if ours else ValueError(str(error)))

    try:
        task()
    except HydraException as error:
        raise ValueError(explain(error)) from error
    if errors:
        raise errors[0]


def help_text() -> str:
    """What --help prints; quicker than Hydra's own, which needs a stage before it answers."""
    from clipgen.cli.config import config_dir

    groups = {
        folder.name: "|".join(sorted(file.stem for file in folder.glob("*.yaml")))
        for folder in sorted(Path(config_dir()).iterdir())
        if folder.is_dir() and folder.name not in ("stage", "recipe", "trainer")
    }
    return f"""usage: clipgen-train stage=vqgan [key=value ...]
       clipgen-train stage=transformer vqgan=RUN [key=value ...]

Train the tokenizer, then the transformer on top of it. Ctrl-C saves and stops.
Without vqgan=RUN, stage=transformer takes the newest finished tokenizer below outputs/;
clipgen-sample --list shows all runs.

choices:
{chr(10).join(f"  {group}={options}" for group, options in groups.items())}

often needed:
  output=FOLDER             the run folder (default: outputs/STAGE/TIME)
  resume=RUN                go on with a run, in its folder; other arguments change its own
  resume=auto               resume the run in output=FOLDER, or start it if there is none
  data.root=FOLDER          your images, with data=folder or experiment=modern
  data.batch_size=16        images per step on each device
  trainer.max_steps=1000    any key that  clipgen-train stage=vqgan --cfg job  shows

several runs, one after another:
  clipgen-train --multirun stage=vqgan key=a,b"""


def train(
    config: DictConfig,
    sweep: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    resume_by: str = "",
) -> None:
    """Train one stage as configured; KeyboardInterrupt where Ctrl-C stopped it. The run folder is ``config.output``.

    Args:
        callbacks: more of them.
        resume_by: the command that resumes the training, for the message after Ctrl-C.
    """
    from clipgen.cli.early_checks import settle
    from clipgen.cli.resume_args import settle_resume

    settle_resume(config)
    settle(config)
    import pytorch_lightning as pl

    from clipgen.cli.config import make
    from clipgen.cli.resume_args import bring_best, check_strategy, find_checkpoint, refuse_other_runs
    from clipgen.training.build import build
    from clipgen.training.summary import log_summary
    from clipgen.training.validation_interval import scale_interval, settle_interval, warn_of_few_images

    output = Path(config.output)
    settle_precision(config)
    automatic = settle_interval(config)
    trainer = make_trainer(config, output)
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    if sweep and trainer.world_size > 1:
        raise ValueError(f"--multirun needs a single device, got {trainer.world_size}: each starts its own sweep")
    check_processes(trainer.world_size)
    data = make(config.data)
    if automatic:
        scale_interval(config, trainer, data)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = build(config)
    ckpt = find_checkpoint(config.resume, model, config.trainer.max_steps or -1)
    check_strategy(ckpt, model, config.trainer.strategy)
    if not trainer.is_global_zero:
        return fit(trainer, model, data, ckpt, output, resume_by)
    log_summary(config, trainer, model, data)
    warn_of_few_images(data)
    with output_folder(output, keep_pattern="checkpoints/*.ckpt"):
        refuse_other_runs(config)  # one that ended before the folder was locked
        bring_best(ckpt, output)
        prepare(output, config, model)
        fit(trainer, model, data, ckpt, output, resume_by)


def check_processes(world_size: int) -> None:
    """Raise ValueError where torchrun has started another number of processes than the trainer counts on."""
    started = int(os.environ.get("WORLD_SIZE") or 0) if "TORCHELASTIC_RUN_ID" in os.environ else world_size
    if started != world_size:
        raise ValueError(
            f"trainer.devices times trainer.num_nodes must be {started}, the processes that torchrun "
            f"started, got {world_size}"
        )


def settle_precision(config: DictConfig) -> None:
    """Refuse bfloat16 where it is slow, and let GPUs multiply float32 matrices as ``matmul_precision`` says."""
    import torch

    from clipgen.cli.device import device_type
    from clipgen.processor import require_bf16_units

    if config.matmul_precision not in MATMUL_PRECISIONS:
        names = ", ".join(MATMUL_PRECISIONS)
        raise ValueError(f"matmul_precision must be one of {names}, got {config.matmul_precision!r}")
    device, precision = device_type(config.trainer.accelerator), str(config.trainer.precision)
    if precision.startswith("bf16"):
        require_bf16_units(device, f"trainer.precision={precision}", "trainer.precision=32-true")
    if device == "cuda":
        torch.set_float32_matmul_precision(config.matmul_precision)


def make_trainer(config: DictConfig, output: Path) -> pl.Trainer:
    """Lightning's trainer with our callbacks."""
    from clipgen.cli.config import make
    from clipgen.training.resume import AtomicCheckpointIO

    return make(
        config.trainer,
        strategy=make_strategy(config),
        default_root_dir=str(output),
        logger=make(config.logger) if "_target_" in config.logger else False,
        enable_progress_bar=False,  # ours counts steps
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(output / "checkpoints")],
        callbacks=make_callbacks(config, output),
    )


def make_strategy(config: DictConfig) -> Any:
    """Return the strategy as Lightning's Trainer takes it."""
    settings = config.trainer
    if settings.strategy == "fsdp":
        return sharded(config)
    several = settings.strategy == "auto" and (settings.devices != 1 or settings.num_nodes != 1)
    if config.stage_name == "vqgan" and (several or settings.strategy == "ddp"):
        # before discriminator_start the discriminator gets no gradients, which plain DDP refuses
        return "ddp_find_unused_parameters_true"
    return settings.strategy


def make_callbacks(config: DictConfig, output: Path) -> list[pl.Callback]:
    """What is done beside the steps, in this order."""
    from clipgen.cli.config import make
    from clipgen.data.samplers import DataPlace
    from clipgen.training.callbacks import FinalValidation, MetricPrinter
    from clipgen.training.progress import ProgressReport
    from clipgen.training.resume import OverrideOptimizerSettings, PerStepSeed

    found = [PerStepSeed(config.seed), OverrideOptimizerSettings(), DataPlace()]
    if config.trainer.strategy != "fsdp":  # one process draws them, which has a part of the weights then
        found.append(make(config.image_logger, folder=output / "pictures"))
    if "metrics" in config:
        found.append(make(config.metrics))
    found += make(config.checkpoint, folder=output / "checkpoints", monitor=config.monitor)
    return [*found, FinalValidation(), MetricPrinter(), ProgressReport(bar=sys.stderr.isatty())]


def sharded(config: DictConfig) -> Any:
    """FSDP over all devices, with whole checkpoints. Lightning's ``fsdp`` is torch's first, which flattens the
    weights: weight decay and Muon must tell matrices from vectors."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    devices = config.trainer.devices
    if config.stage_name != "transformer":
        raise ValueError("trainer.strategy must not be fsdp in stage=vqgan: its weights fit anywhere; take ddp")
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices must be a number of devices with trainer.strategy=fsdp, got {devices}")
    limit = config.trainer.limit_val_batches
    if config.data.get("val_urls") and not isinstance(limit, int):  # streams end at different batches
        raise ValueError(
            "trainer.limit_val_batches must be a number that every process has with trainer.strategy=fsdp "
            f"and data.val_urls, got {limit}: they would wait for each other without end"
        )
    processes = devices * config.trainer.num_nodes
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def prepare(output: Path, config: DictConfig, model: pl.LightningModule) -> None:
    """Begin the run folder: configuration, versions, and in stage 2 the frozen models, so that it can be moved."""
    from clipgen import ConditionalTransformer
    from clipgen.cli.config import as_yaml
    from clipgen.cli.early_checks import is_encoded
    from clipgen.cli.resume_args import write_arguments
    from clipgen.files import atomic_write, write_json
    from clipgen.run_folder import copy_frozen, save_frozen

    with atomic_write(output / "config.yaml") as partial:
        partial.write_text(as_yaml(config), "utf-8")
    write_arguments(output)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    write_json(output / "versions.json", versions)
    if isinstance(model, ConditionalTransformer):
        if is_encoded(config):
            copy_frozen(Path(config.data.root).expanduser(), output)
        else:
            save_frozen(output, *model.encoders())


def fit(
    trainer: pl.Trainer,
    model: Any,
    data: Any,
    ckpt: str | None,
    output: Path,
    resume_by: str = "",
) -> None:
    """Train, then leave the finished model in the run folder."""
    from clipgen import ConditionalTransformer
    from clipgen.checkpoint.model_folder import FOLDERS, model_name_of
    from clipgen.cli.resume_args import ARGUMENTS
    from clipgen.run_folder import bind
    from clipgen.training.resume import LastCheckpoint

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    last = next(callback for callback in callbacks if isinstance(callback, LastCheckpoint))
    try:
        with last.listening():
            trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    except SystemExit as exit:  # what Lightning makes of Ctrl-C
        known = (output / ARGUMENTS).is_file()
        goes_on = f"{'clipgen-train' if known else 'the same command with'} resume={output} goes on"
        goes_on = f"{resume_by} continues" if resume_by else goes_on
        goes_on = f"; {goes_on}" if last.path.is_file() else ""
        logger.info("Stopped at step %d%s", trainer.global_step, goes_on)
        if last.requeue and trainer.is_global_zero:
            requeue()
        raise KeyboardInterrupt from exit
    trainer.save_checkpoint(last.path, weights_only=False)  # all processes have a part in it
    if trainer.is_global_zero:
        best = last.path.with_name("best.ckpt")
        final = last.path if model.last_is_best or not best.is_file() else best  # no validation, no best
        finished = type(model).load(final).save(output / FOLDERS[model_name_of(type(model))])
        if isinstance(model, ConditionalTransformer):
            bind(finished, output / "vqgan")
        logger.info("Finished %d steps: %s", trainer.global_step, output)


def requeue() -> None:
    """Ask SLURM to run this job again; with resume=auto it continues there."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("The job %s could not be requeued: %s", job, error)


if __name__ == "__main__":
    main()
