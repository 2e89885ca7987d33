"""Train one stage in a run folder, and export the finished model there."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.strategies import ModelParallelStrategy

import clipgen
from clipgen.checkpoint.model_folder import model_name_of
from clipgen.data.handover import compute_on_rank_zero
from clipgen.data.samplers import DataPositionCallback
from clipgen.frozen_models import copy_frozen, save_frozen
from clipgen.generation.default_params import params_of, save_params
from clipgen.generation.modality_gap import PROJECTOR_FILE
from clipgen.hardware.environment import package_versions
from clipgen.hardware.processor import require_bf16_units
from clipgen.model_kinds import MODEL_FOLDER_NAMES
from clipgen.models.config import GANConfig
from clipgen.storage.files import atomic_write, one_line, write_json
from clipgen.storage.links import refuse_links
from clipgen.storage.output_folder import output_folder
from clipgen.tokenizer_identity import record_tokenizer
from clipgen.training.callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    FinalValidation,
    LastCheckpoint,
    MetricPrinter,
    OverrideOptimizerSettings,
    PerStepSeed,
    ProgressReport,
    TimeForecast,
)
from clipgen.training.cluster import (
    check_num_processes,
    leave_group_at_exit,
    requeue_slurm_job,
    share_results,
    use_own_store,
)
from clipgen.training.config import TrainingConfig
from clipgen.training.instantiate import instantiate
from clipgen.training.loggers import ContinueLog, close_log, forget_old_log, make_logger, remove_log_links, store_run_id
from clipgen.training.model_builder import build
from clipgen.training.resume import (
    check_strategy,
    copy_best_checkpoint,
    find_checkpoint,
    refuse_other_runs,
)
from clipgen.training.summary import log_summary
from clipgen.training.validation_interval import (
    convert_interval,
    scale_interval,
    set_default_interval,
    warn_of_few_images,
)
from clipgen.transformer import ConditionalTransformer

logger = logging.getLogger(__name__)
# Arguments of torch.set_float32_matmul_precision: "high" is TF32 on GPUs from Ampere on, "highest" is float32.
MATMUL_PRECISIONS = ("highest", "high")


def train(
    config: TrainingConfig,
    callbacks: Sequence[pl.Callback] = (),
    run_files: Mapping[str, str] | None = None,
    resume_command: str = "",
) -> float | None:
    """Train one stage into the run folder ``config.output``; return the best value of ``config.monitor``, or None.

    Args:
        config: what to train, on which data, and how.
        callbacks: further callbacks; a ``ProgressReport`` or ``TimeForecast`` among them replaces the default one.
        run_files: further files of the run folder, by name, with their text.
        resume_command: the command that resumes the training, for the message after Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C or a signal stopped the training, after it wrote a checkpoint.
        ValueError, TypeError, FileNotFoundError: the configuration is wrong.
        FileExistsError: the run folder contains another run, or another process writes to it.
    """
    # Open values are filled in below, but not in the caller's configuration.
    config = deepcopy(config)
    output = Path(config.output)
    refuse_other_runs(output, config.resume)
    if config.resume:
        remove_log_links(output)
        refuse_links(output)
    set_precision(config)
    automatic_interval = set_default_interval(config)
    trainer = make_trainer(config, output, callbacks)
    check_num_processes(trainer.world_size)
    config.divide_batch(trainer.world_size)
    use_own_store()
    leave_group_at_exit()
    with share_results(trainer):
        with compute_on_rank_zero():
            data = instantiate(config.data, "data")
        if automatic_interval:
            scale_interval(config, trainer.world_size, data)
        convert_interval(config, trainer)
        resume_command = resume_command or f"the same training with resume={output}"
        best = train_on(data, config, trainer, output, run_files or {}, resume_command)
    return best


def train_on(
    data: Any,
    config: TrainingConfig,
    trainer: pl.Trainer,
    output: Path,
    run_files: Mapping[str, str],
    resume_command: str,
) -> float | None:
    """Build the model and train it on the data of a configuration; see ``train``."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = build(config)
    checkpoint = find_checkpoint(config.resume, model, config.trainer["max_steps"] or -1)
    check_strategy(checkpoint, model, config.trainer["strategy"])
    if not trainer.is_global_zero:
        return fit(trainer, model, data, checkpoint, output, resume_command)
    log_summary(config, trainer, model, data)
    warn_of_few_images(data)
    with output_folder(output, keep_pattern="checkpoints/*.ckpt"):
        # Check again, now that the folder is locked: another run may have ended there in the meantime.
        refuse_other_runs(output, config.resume)
        if config.resume is None:
            # It may be left from a run that ended before its first checkpoint.
            (output / PROJECTOR_FILE).unlink(missing_ok=True)
            forget_old_log(trainer, output)
        copy_best_checkpoint(checkpoint, output)
        write_run_folder(output, config, model, run_files)
        store_run_id(trainer, output)
        try:
            return fit(trainer, model, data, checkpoint, output, resume_command)
        finally:
            close_log(trainer)


# ----------------------------------------------------------------------------------------------- before the first step


def set_precision(config: TrainingConfig) -> None:
    """Refuse bfloat16 on processors that emulate it, and set the precision of float32 matrix products on GPUs."""
    if config.matmul_precision not in MATMUL_PRECISIONS:
        names = ", ".join(MATMUL_PRECISIONS)
        raise ValueError(f"matmul_precision must be one of {names}, got {config.matmul_precision!r}")
    device = device_type(config.trainer["accelerator"])
    precision = str(config.trainer["precision"])
    if precision.startswith("bf16"):
        require_bf16_units(device, f"trainer.precision={precision}", "trainer.precision=32-true")
    if device == "cuda":
        torch.set_float32_matmul_precision(config.matmul_precision)


def device_type(accelerator: str) -> str:
    """Return the type of device that Lightning chooses for an accelerator, such as ``"cuda"``."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_trainer(config: TrainingConfig, output: Path, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Return Lightning's trainer with the callbacks of a training run."""
    return instantiate(
        config.trainer,
        "trainer",
        strategy=make_strategy(config),
        default_root_dir=str(output),
        logger=make_logger(config),
        # ProgressReport counts optimizer steps, Lightning's own bar counts batches.
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(output / "checkpoints")],
        callbacks=make_callbacks(config, output, callbacks),
    )


def make_callbacks(config: TrainingConfig, output: Path, more: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the callbacks of a training run, in the order in which they run."""
    callbacks: list[pl.Callback] = [
        ContinueLog(),
        PerStepSeed(config.seed),
        OverrideOptimizerSettings(),
        DataPositionCallback(),
    ]
    # Grids are made by one process, which under FSDP has only a part of the weights.
    if config.trainer["strategy"] != "fsdp":
        callbacks.append(instantiate(config.image_logger, "image_logger", folder=output / "grids"))
    if config.metrics:
        callbacks.append(instantiate(config.metrics, "metrics"))
    if config.projector.get("memory_size"):
        callbacks.append(instantiate(config.projector, "projector", folder=output))
    callbacks += instantiate(config.checkpoint, "checkpoint", folder=output / "checkpoints", monitor=config.monitor)
    callbacks += [FinalValidation(), MetricPrinter()]
    for default in (ProgressReport, TimeForecast):
        if not any(isinstance(callback, default) for callback in more):
            callbacks.append(default())
    return [*callbacks, *more]


def make_strategy(config: TrainingConfig) -> Any:
    """Return the strategy in the form that Lightning's Trainer takes."""
    strategy = config.trainer["strategy"]
    if strategy == "fsdp":
        return make_fsdp_strategy(config)
    several_processes = config.trainer["devices"] != 1 or config.trainer["num_nodes"] != 1
    uses_ddp = strategy == "ddp" or (strategy == "auto" and several_processes)
    gan_weight = config.model.get("gan", {}).get("weight", GANConfig.weight)
    if config.stage_name == "vqgan" and gan_weight > 0 and uses_ddp:
        # Until model.gan.start_step the discriminator gets no gradients, which plain DDP refuses.
        return "ddp_find_unused_parameters_true"
    return strategy


def make_fsdp_strategy(config: TrainingConfig) -> Any:
    """Return FSDP2 over all devices, with consolidated checkpoints.

    Lightning's ``fsdp`` is FSDP1, which flattens the weights; weight decay and Muon need to know their shapes.

    Raises:
        ValueError: FSDP supports neither the stage nor the number of devices, or validation could not end.
    """
    devices = config.trainer["devices"]
    if config.stage_name != "transformer":
        raise ValueError("trainer.strategy must not be fsdp in stage=vqgan, which does not support it: use ddp")
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices must be a number of devices with trainer.strategy=fsdp, got {devices}")
    limit = config.trainer["limit_val_batches"]
    if config.data.get("val_urls") and not isinstance(limit, int):
        raise ValueError(
            "trainer.limit_val_batches must be a number that every process has with trainer.strategy=fsdp "
            f"and data.val_urls, got {limit}: streams end at different batches, and the processes would wait forever"
        )
    processes = devices * config.trainer["num_nodes"]
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


def write_run_folder(output: Path, config: TrainingConfig, model: Any, run_files: Mapping[str, str]) -> None:
    """Write the configuration, the versions and, in stage 2, the frozen models, so that the folder can be moved."""
    config_text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    for name, text in {"config.yaml": config_text, **run_files}.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    versions = {"python": platform.python_version(), "clipgen": clipgen.__version__}
    write_json(output / "versions.json", versions | package_versions())
    if not isinstance(model, ConditionalTransformer):
        return
    save_params(output, params_of(config.image_logger))
    if config.uses_token_cache:
        copy_frozen(Path(config.data["root"]).expanduser(), output)
    else:
        save_frozen(output, *model.encoders())


# ------------------------------------------------------------------------------------------------------------ training


def fit(
    trainer: pl.Trainer,
    model: Any,
    data: Any,
    checkpoint: str | None,
    output: Path,
    resume_command: str,
) -> float | None:
    """Train, and write the finished model to the run folder; return the best value of the monitored metric."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    last = next(callback for callback in callbacks if isinstance(callback, LastCheckpoint))
    try:
        with last.handle_signals():
            trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    except (LookupError, TypeError, AttributeError) as error:
        # Before the first batch, Lightning restores the states in the checkpoint.
        if checkpoint is None or last.steps_before_batch >= 0:
            raise
        raise ValueError(f"{checkpoint} cannot be resumed: {type(error).__name__}: {one_line(error)}") from error
    except SystemExit as exit:
        # Lightning turns Ctrl-C into SystemExit.
        if trainer.is_global_zero:
            report_stop(last, trainer.global_step, resume_command)
        raise KeyboardInterrupt from exit
    # Each process may have only a part of the weights, so all of them take part.
    trainer.save_checkpoint(last.path, weights_only=False)
    if trainer.is_global_zero:
        export(model, last.path, output)
        logger.info("Finished %d steps: %s", trainer.global_step, output)
    return best_score(callbacks)


def report_stop(last: LastCheckpoint, step: int, resume_command: str) -> None:
    """Log at which step a training run has stopped, and requeue its SLURM job if that was requested."""
    hint = f"; {resume_command} continues" if last.path.is_file() else ""
    logger.info("Stopped at step %d%s", step, hint)
    if last.requeue:
        requeue_slurm_job()


def best_score(callbacks: Sequence[Any]) -> float | None:
    """Return the best value of the metric that selects ``best.ckpt``; None if it was never measured."""
    for callback in callbacks:
        if isinstance(callback, BestCheckpoint) and callback.best_model_score is not None:
            return float(callback.best_model_score)
    return None


def export(model: Any, last: Path, output: Path) -> None:
    """Write the best model, or the last one, to its folder in the run folder."""
    best = last.with_name("best.ckpt")
    # Without a validation there is no best checkpoint.
    source = last if model.last_is_best or not best.is_file() else best
    finished = type(model).load(source).save(output / MODEL_FOLDER_NAMES[model_name_of(type(model))])
    if isinstance(model, ConditionalTransformer):
        record_tokenizer(finished, output / "vqgan")
