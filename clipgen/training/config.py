"""The configuration of a training run, as plain Python values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

MODEL_TARGETS = {
    "vqgan": "clipgen.vqgan.VQGAN",
    "transformer": "clipgen.transformer.ConditionalTransformer",
}
MONITORS = {"vqgan": "val/loss", "transformer": "val/cross_entropy"}
# Keys at the top of files in configs/ that are not fields of ``TrainingConfig``.
OTHER_KEYS = ("shards",)
TRAINER_DEFAULTS: dict[str, Any] = {
    "_target_": "pytorch_lightning.Trainer",
    "accelerator": "auto",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "max_steps": -1,
    "max_epochs": -1,
    "limit_val_batches": None,
    "val_check_interval": None,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 1,
    "log_every_n_steps": 10,
}


@dataclass
class TrainingConfig:
    """Everything that ``train`` needs to know; the keys of ``config.yaml`` in a run folder.

    A section is a dictionary of the arguments of the class or function that its key ``_target_`` names. Keys that a
    section leaves out keep their defaults, which for ``model`` are the paper's.

    Args:
        stage_name: ``"vqgan"`` or ``"transformer"``.
        output: the run folder, which is created.
        data: the images, or the token cache of stage 2; needs a ``_target_``.
        model: see ``VQGAN`` and ``ConditionalTransformer``.
        clip: the CLIP of stage 2, see ``FrozenCLIP``.
        trainer: see ``pytorch_lightning.Trainer``; needs ``max_steps`` or ``max_epochs``. A whole number as
            ``val_check_interval`` counts optimizer steps, not batches.
        logger: a Lightning logger; empty for none.
        checkpoint: see ``checkpoint_callbacks``.
        image_logger: see ``ImageLogger``.
        metrics: see ``ReconstructionMetrics``; empty for none.
        projector: see ``ProjectorBuilder``; without ``memory_size`` there is none.
        monitor: the metric whose lowest value selects ``best.ckpt``.
        seed: seed of the weights, the data order and the randomness of each step.
        matmul_precision: ``"high"`` (TF32 on GPUs from Ampere on) or ``"highest"`` (float32).
        effective_batch_size: images per optimizer step, over all devices and accumulated batches; it sets
            ``batch_size`` of ``data``, so that the steps of a recipe keep their meaning on any number of devices.
        resume: a run folder or a ``.ckpt`` file to resume.
        vqgan: the tokenizer of stage 2: a run folder, a checkpoint or a model folder.
        init_from: a trained VQGAN whose network and weights stage 1 starts from.
        init_from_gpt2: a GPT-2 whose weights stage 2 starts from.
    """

    stage_name: str
    output: str
    data: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    image_logger: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    projector: dict[str, Any] = field(default_factory=dict)
    monitor: str = ""
    seed: int = 0
    matmul_precision: str = "high"
    effective_batch_size: int | None = None
    resume: str | None = None
    vqgan: str | None = None
    init_from: str | None = None
    init_from_gpt2: str | None = None

    def __post_init__(self) -> None:
        if self.stage_name not in MODEL_TARGETS:
            raise ValueError(f"stage_name must be one of {', '.join(MODEL_TARGETS)}, got {self.stage_name!r}")
        self.output = str(self.output)
        self.monitor = self.monitor or MONITORS[self.stage_name]
        self.model = {"_target_": MODEL_TARGETS[self.stage_name]} | self.model
        self.clip = {"_target_": "clipgen.clip.FrozenCLIP", "model_name": "shapes"} | self.clip
        self.trainer = TRAINER_DEFAULTS | self.trainer
        self.checkpoint = {"_target_": "clipgen.training.callbacks.checkpoint_callbacks"} | self.checkpoint
        self.image_logger = {"_target_": "clipgen.training.callbacks.ImageLogger"} | self.image_logger
        self.projector = {"_target_": "clipgen.training.callbacks.ProjectorBuilder"} | self.projector

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Return the configuration in nested dictionaries, such as the content of a ``config.yaml``.

        ``OTHER_KEYS`` are left out: they only contain values that other keys refer to.

        Raises:
            ValueError: a key at the top is unknown, for example misspelled.
        """
        names = [config_field.name for config_field in fields(cls)]
        unknown = [name for name in values if name not in (*names, *OTHER_KEYS)]
        if unknown:
            raise ValueError(
                f"keys of a configuration must be of {', '.join(names)}, got {', '.join(map(str, unknown))}"
            )
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

    @property
    def grad_accum_steps(self) -> int:
        """Batches per optimizer step."""
        return int(self.model.get("optimizer", {}).get("grad_accum_steps", 1))

    def divide_batch(self, devices: int) -> None:
        """Set the batch size per device from ``effective_batch_size``, if there is one.

        Raises:
            ValueError: it cannot be divided by the number of devices and of accumulated batches.
        """
        if self.effective_batch_size is None:
            return
        batches = devices * self.grad_accum_steps
        if self.effective_batch_size < 1 or self.effective_batch_size % batches:
            raise ValueError(
                f"effective_batch_size must be a multiple of {batches}, {devices} devices times "
                f"{self.grad_accum_steps} accumulated batches, got {self.effective_batch_size}"
            )
        self.data = {**self.data, "batch_size": self.effective_batch_size // batches}

    @property
    def uses_token_cache(self) -> bool:
        """Whether stage 2 trains from a token cache instead of images."""
        return reads_token_cache(self.data)


def reads_token_cache(data: Mapping[str, Any]) -> bool:
    """Return whether a ``data`` section names a token cache."""
    return str(data.get("_target_")).endswith("TokenCacheDataModule")
