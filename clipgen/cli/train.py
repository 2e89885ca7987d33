"""``clipgen-train stage=vqgan`` and ``clipgen-train stage=transformer vqgan=PATH``."""

from __future__ import annotations

import logging
import os
import platform
import sys
import traceback
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
    from clipgen.cli.resume_args import refuse_other_runs, with_the_runs

    sys.argv[1:] = with_the_runs(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints them itself, over many lines
    errors: list[Exception] = []

    @hydra.main(config_path=config_dir(), config_name="train", version_base="1.3")
    def task(config: DictConfig) -> None:
        from lightning_fabric.utilities.exceptions import MisconfigurationException

        if sweep := HydraConfig.get().mode == RunMode.MULTIRUN:
            config.output = HydraConfig.get().runtime.output_dir
        try:
            refuse_other_runs(config)
            train(config, sweep)
        except MisconfigurationException as error:
            errors.append(ValueError(str(error)))
        except Exception as error:  # the other runs of a sweep go on, and need the memory
            traceback.clear_frames(error.__traceback__)
            errors.append(error)

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

choices:
{chr(10).join(f"  {group}={options}" for group, options in groups.items())}

often needed:
  output=FOLDER             the run folder (default: outputs/STAGE/TIME)
  resume=RUN                go on with a run, in its folder; other arguments change its own
  trainer.max_steps=1000    any key that  clipgen-train stage=vqgan --cfg job  shows

several runs, one after another:
  clipgen-train --multirun stage=vqgan key=a,b"""


def train(config: DictConfig, sweep: bool = False) -> None:
    """Train one stage as configured; KeyboardInterrupt where Ctrl-C stopped it. The run folder is ``config.output``."""
    import pytorch_lightning as pl
    from omegaconf import OmegaConf

    from clipgen.cli.config import make
    from clipgen.cli.resume_args import find_checkpoint
    from clipgen.training.build import build, is_encoded, settle_encoded

    if is_encoded(config):
        settle_encoded(config)
    if missing := OmegaConf.missing_keys(config):
        names = ", ".join(sorted(missing))
        raise ValueError(f"stage={config.stage_name} needs a value for {names}: give {min(missing)}=...")
    OmegaConf.resolve(config)
    for key in ("output", "resume", "vqgan"):  # YAML's numbers, null and lists
        value = config.get(key)
        if not isinstance(value, str) and (key == "output" or value is not None):
            raise TypeError(f"{key} must be a path, got {value!r}: put quotes around it, {key}=\\'...\\'")
    output = Path(config.output)
    trainer = make_trainer(config, output)
    if sweep and trainer.world_size > 1:
        raise ValueError(f"--multirun needs a single device, got {trainer.world_size}: each starts its own sweep")
    data = make(config.data)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = build(config)
    ckpt = find_checkpoint(config.resume, model, config.trainer.max_steps or -1)
    if not trainer.is_global_zero:
        return fit(trainer, model, data, ckpt, output)
    with output_folder(output, keep="checkpoints/*.ckpt"):
        prepare(output, config, model)
        fit(trainer, model, data, ckpt, output)


def make_trainer(config: DictConfig, output: Path) -> pl.Trainer:
    """Lightning's trainer with our callbacks."""
    from clipgen.cli.config import make
    from clipgen.training.resume import AtomicCheckpointIO

    strategy = config.trainer.strategy
    # before discriminator_start the discriminator gets no gradients, which plain DDP refuses
    if strategy == "auto" and config.trainer.devices != 1:
        strategy = "ddp_find_unused_parameters_true"
    return make(
        config.trainer,
        strategy=sharded(config) if strategy == "fsdp" else strategy,
        default_root_dir=str(output),
        logger=make(config.logger) if "_target_" in config.logger else False,
        enable_progress_bar=False,  # ours counts steps
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=make_callbacks(config, output),
    )


def make_callbacks(config: DictConfig, output: Path) -> list[pl.Callback]:
    """What is done beside the steps, in this order."""
    from clipgen.cli.config import make
    from clipgen.training.callbacks import MetricPrinter
    from clipgen.training.progress import ProgressReport
    from clipgen.training.resume import OverrideOptimizerSettings, PerStepSeed

    found = [PerStepSeed(config.seed), OverrideOptimizerSettings()]
    if config.trainer.strategy != "fsdp":  # one process draws them, which has a part of the weights then
        found.append(make(config.image_logger, folder=output / "pictures"))
    if "metrics" in config:
        found.append(make(config.metrics))
    found += make(config.checkpoint, folder=output / "checkpoints", monitor=config.monitor)
    return [*found, MetricPrinter(), ProgressReport(bar=sys.stderr.isatty())]


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
    from clipgen.cli.resume_args import write_arguments
    from clipgen.files import write_json
    from clipgen.run_folder import copy_frozen, save_frozen
    from clipgen.training.build import is_encoded

    (output / "config.yaml").write_text(as_yaml(config), "utf-8")
    write_arguments(output)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    write_json(output / "versions.json", versions)
    if isinstance(model, ConditionalTransformer):
        if is_encoded(config):
            copy_frozen(Path(config.data.root).expanduser(), output)
        else:
            save_frozen(output, *model.encoders())


def fit(trainer: pl.Trainer, model: Any, data: Any, ckpt: str | None, output: Path) -> None:
    """Train, then leave the finished model in the run folder."""
    from clipgen.checkpoint.model_folder import FOLDERS, kind
    from clipgen.cli.resume_args import ARGUMENTS
    from clipgen.training.resume import LastCheckpoint

    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    last = next(callback for callback in callbacks if isinstance(callback, LastCheckpoint))
    try:
        with last.listening():
            trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    except SystemExit as exit:  # what Lightning makes of Ctrl-C
        known = (output / ARGUMENTS).is_file()
        goes_on = f"{'clipgen-train' if known else 'the same command with'} resume={output} goes on"
        goes_on = f"; {goes_on}" if last.path.is_file() else ""
        logger.info("Stopped at step %d%s", trainer.global_step, goes_on)
        raise KeyboardInterrupt from exit
    trainer.save_checkpoint(last.path, weights_only=False)  # all processes have a part in it
    if trainer.is_global_zero:
        best = next(callback.best_model_path for callback in callbacks if getattr(callback, "monitor", None))
        final = last.path if model.last_is_best or not Path(best).is_file() else best  # no validation, no best
        type(model).load(final).save(output / FOLDERS[kind(type(model))])
        logger.info("Finished %d steps: %s", trainer.global_step, output)


if __name__ == "__main__":
    main()
