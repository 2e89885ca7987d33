"""The work of a training run besides its steps: one Lightning callback per concern."""

from clipgen.training.callbacks.checkpointing import AtomicCheckpointIO as AtomicCheckpointIO
from clipgen.training.callbacks.checkpointing import BestCheckpoint as BestCheckpoint
from clipgen.training.callbacks.checkpointing import LastCheckpoint as LastCheckpoint
from clipgen.training.callbacks.checkpointing import checkpoint_callbacks as checkpoint_callbacks
from clipgen.training.callbacks.image_logger import ImageLogger as ImageLogger
from clipgen.training.callbacks.metric_printer import MetricPrinter as MetricPrinter
from clipgen.training.callbacks.optimizer_settings import OverrideOptimizerSettings as OverrideOptimizerSettings
from clipgen.training.callbacks.per_step_seed import PerStepSeed as PerStepSeed
from clipgen.training.callbacks.progress import ProgressReport as ProgressReport
from clipgen.training.callbacks.progress import TimeForecast as TimeForecast
from clipgen.training.callbacks.progress import ValidationProgress as ValidationProgress
from clipgen.training.callbacks.projector_builder import ProjectorBuilder as ProjectorBuilder
from clipgen.training.callbacks.validation import FinalValidation as FinalValidation
from clipgen.training.callbacks.validation import ResumeValidation as ResumeValidation
