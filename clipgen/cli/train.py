"""The command ``clipgen-train``: train stage 1 (``stage=vqgan``) or stage 2 (``stage=transformer``)."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clipgen.cli.console import run_command, set_up_logging

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

    from clipgen.training.config import TrainingConfig

# Groups of configs/ in the order of the help, with their options, the usual ones first. The other groups are chosen by
# the stage or the experiment. A test compares both with the files.
CHOICES = {
    "experiment": ("shapes", "cifar10", "cifar10_quick", "photos", "modern", "coco", "imagenet"),
    "variant": ("printed",),
    "data": ("folder", "webdataset", "huggingface", "shapes", "cached"),
    "clip": ("openai", "folder", "shapes", "cifar10"),
    "quantizer": ("paper", "cosine", "fsq", "lfq"),
    "model_size": ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-xl-clipgen"),
    "logger": ("tensorboard", "csv", "wandb", "none"),
}
# Experiments of CLIP-GEN, to which variant=printed applies.
PAPER_EXPERIMENTS = ("coco", "imagenet")
HELP_TEMPLATE = """usage: clipgen-train stage=vqgan [key=value ...]
       clipgen-train stage=transformer vqgan=RUN [key=value ...]

Train the tokenizer, then the transformer that uses it. Ctrl-C saves a checkpoint and stops.
Without vqgan=RUN, stage=transformer uses the newest finished tokenizer below outputs/;
clipgen-sample --list shows all runs.

what to train on:
  experiment=modern         preset of data, CLIP and both models
  data.root=FOLDER          your images, with data=folder or experiment=modern
  data=huggingface data.dataset=OWNER/NAME
                            a dataset of the Hugging Face hub, or local Parquet files
  data=cached data.root=FOLDER
                            a token cache of clipgen-encode (stage 2)
  output=FOLDER             the run folder (default: outputs/STAGE/TIME)

how to train:
  trainer.max_steps=1000    number of optimizer steps
  data.batch_size=16        images per step on each device
  trainer.devices=2         number of devices
  any other key             see  clipgen-train stage=vqgan --cfg job

how to resume or initialize:
  resume=RUN                resume a run in its folder, with its arguments; arguments given here
                            override them
  resume=auto               resume the run in output=FOLDER, or start it if there is none
  init_from=RUN             start stage 1 from a trained tokenizer
  init_from_gpt2=gpt2       start stage 2 from the weights of a GPT-2 of the same size

choices:
{choices}

several runs, one after another:
  clipgen-train --multirun stage=vqgan key=a,b
  clipgen-train --multirun hydra/sweeper=optuna stage=vqgan 'key=interval(0.1,1)'
                            search for the lowest validation loss; see .github/docs/training.md

other options:
  --info                    print versions, processor and GPU, for a bug report
  --cfg job                 print all keys with their values, and stop
  --shell-completion install=bash
                            complete keys and choices with Tab; see .github/docs/training.md

Put quotes around values with spaces or special characters: 'data.root="my photos (1)"'"""


def main() -> None:
    """Run the command."""
    run_command("clipgen-train", run)


def run() -> None:
    """Let Hydra compose the configuration, and train."""
    if {"-h", "--help"} & set(sys.argv):
        print(help_text())
    elif "--info" in sys.argv:
        from clipgen.cli.info import info_text

        print(info_text())
    else:
        compose_and_train()


def compose_and_train() -> None:
    """Run all jobs that Hydra composes; raise the first error of a job, to be printed in one sentence."""
    import hydra
    from hydra.errors import HydraException

    from clipgen.cli.config import config_dir, explain_hydra_error, quote_arguments
    from clipgen.cli.resume_args import add_run_arguments

    sys.argv[1:] = add_run_arguments(quote_arguments(sys.argv[1:]))
    # Otherwise Hydra prints errors itself, over many lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    errors: list[Exception] = []
    main_process = os.getpid()

    @hydra.main(config_path=config_dir(), config_name="train", version_base="1.3")
    def task(config: DictConfig) -> float | None:
        if os.getpid() == main_process:
            return run_and_collect(config, errors)
        # A launcher such as submitit's has moved the run elsewhere, and reports its errors.
        set_up_logging()
        return run_job(config)

    try:
        task()
    except HydraException as error:
        raise ValueError(explain_hydra_error(error)) from error
    except Exception:
        # If runs have failed, a sweeper may have too few values to compare: their errors name the cause.
        if not errors:
            raise
    if errors:
        raise errors[0]


def run_and_collect(config: DictConfig, errors: list[Exception]) -> float | None:
    """Train one run, see ``run_job``; an error is appended to ``errors``, so that the other runs of a sweep continue.

    Without a value, a sweeper that compares values counts the run as failed.
    """
    try:
        return run_job(config)
    except Exception as error:
        # The other runs need the memory that the frames occupy.
        traceback.clear_frames(error.__traceback__)
        errors.append(expected_error(error))
        return None


def run_job(config: DictConfig) -> float | None:
    """Train one run, which may be one of a sweep; return the best value of the monitored metric.

    Raises:
        ValueError: a sweeper is to compare values, and the training has no validation.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    job = HydraConfig.get()
    check_variant(job.runtime.choices)
    is_sweep = job.mode == RunMode.MULTIRUN
    if is_sweep:
        config.output = job.runtime.output_dir
    value = train_from_config(config, is_sweep)
    if is_sweep and value is None and not job.sweeper._target_.endswith("BasicSweeper"):
        raise ValueError("a search needs a validation, whose results it compares, got none: hold out some images")
    return value


def check_variant(choices: Mapping[str, str | None]) -> None:
    """Raise ValueError if a variant of the paper's recipes is combined with another recipe."""
    variant = choices.get("variant")
    experiment = choices.get("experiment")
    if variant not in (None, "null") and experiment not in PAPER_EXPERIMENTS:
        raise ValueError(f"variant={variant} needs experiment=coco or experiment=imagenet, got experiment={experiment}")


def expected_error(error: Exception) -> Exception:
    """Return an error of Lightning about wrong settings as ValueError, and any other error as it is."""
    # The type is compared by name, because importing Lightning takes seconds, and most errors appear before that.
    is_misconfiguration = type(error).__name__ == "MisconfigurationException"
    return ValueError(str(error)) if is_misconfiguration else error


def help_text() -> str:
    """Return the text of --help. Hydra's own text takes longer and needs a stage."""
    choices = [f"  {group}={'|'.join(options)}" for group, options in CHOICES.items()]
    return HELP_TEMPLATE.format(choices="\n".join(choices))


def train_from_config(
    config: DictConfig,
    is_sweep: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    resume_command: str = "",
) -> float | None:
    """Complete a composed configuration, and train one stage; return the best value of the monitored metric.

    Args:
        config: the configuration, of which missing values are filled in.
        is_sweep: True for a run of --multirun.
        callbacks: further callbacks.
        resume_command: the command that resumes the training, for the message after Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C or a signal stopped the training, after it wrote a checkpoint.
    """
    training_config = to_training_config(config)
    # torch is imported only now, after the checks that do not need it.
    from clipgen.cli.progress_bar import make_progress
    from clipgen.cli.resume_args import ARGUMENTS, command_arguments
    from clipgen.training import train
    from clipgen.training.callbacks import ProgressReport

    if is_sweep:
        refuse_several_devices(training_config)
    run_files = command_arguments()
    if ARGUMENTS in run_files:
        resume_command = resume_command or f"clipgen-train resume={training_config.output}"
    return train(training_config, [ProgressReport(make_progress), *callbacks], run_files, resume_command)


def to_training_config(config: DictConfig) -> TrainingConfig:
    """Complete and check a composed configuration, and return it as plain values."""
    from clipgen.cli.config import node_to_dict
    from clipgen.cli.early_checks import complete_training_config
    from clipgen.cli.resume_args import resolve_auto
    from clipgen.training.config import TrainingConfig

    resolve_auto(config)
    complete_training_config(config)
    return TrainingConfig.from_dict(node_to_dict(config))


def refuse_several_devices(config: TrainingConfig) -> None:
    """Raise ValueError if a run of a sweep uses several devices: each of its processes would start its own sweep."""
    from clipgen.training.instantiate import instantiate
    from clipgen.training.run import make_strategy

    trainer = instantiate(
        config.trainer, "trainer", strategy=make_strategy(config), logger=False, enable_progress_bar=False
    )
    devices = trainer.world_size
    if devices > 1:
        raise ValueError(f"--multirun needs a single device, got {devices}: each process would start its own sweep")


if __name__ == "__main__":
    main()
