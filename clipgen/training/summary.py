"""Summarize a training run before its first step: images, batch size, tokens, parameters, length and memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.data.source import count_images, skip_counter_of
from clipgen.hardware.device import should_compile
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from clipgen.training.config import TrainingConfig

logger = logging.getLogger(__name__)
GIB = 2**30


def log_summary(config: TrainingConfig, trainer: pl.Trainer, model: Any, data: Any) -> None:
    """Log the size, length and memory of a training run."""
    lines = {
        "Images": describe_images(data),
        "Batch": describe_batch(config, data.batch_size, trainer.world_size),
        "Tokens": describe_tokens(model),
        "Parameters": describe_parameters(model, trainer.strategy.root_device),
        "Length": describe_length(config, trainer, data),
        "Memory": describe_training_memory(model, data.batch_size, str(config.trainer["precision"])),
    }
    if should_compile(model.hparams["compile"], trainer.strategy.root_device):
        lines["Compile"] = "torch.compile; the first steps take minutes"
    for name, text in lines.items():
        logger.info("%-11s %s", f"{name}:", text)
    if config.trainer["strategy"] == "fsdp":
        logger.info("No image grids are made with trainer.strategy=fsdp: each process has a part of the weights only")


def describe_images(data: Any) -> str:
    """Return the numbers of images for training and for validation, and of skipped images."""
    train = count_images(data.train)
    val = count_images(data.val)
    training = f"{train if train else 'a stream of unknown length'} for training"
    if val:
        validation = f"{val} held out for validation"
    else:
        validation = "validation reads a stream" if data.val else "no validation"
    skip_counter = skip_counter_of(data.train)
    skipped = skip_counter.num_skipped if skip_counter else 0
    return f"{training}, {validation}, {skipped} skipped so far"


def describe_batch(config: TrainingConfig, batch_size: int, devices: int) -> str:
    """Return the number of images per optimizer step, and what the steps of a recipe mean on several devices."""
    factors = [f"data.batch_size={batch_size} per device"]
    if devices > 1:
        factors.append(f"{devices} devices")
    if config.grad_accum_steps > 1:
        factors.append(f"{config.grad_accum_steps} accumulated batches")
    text = f"{batch_size * devices * config.grad_accum_steps} images per optimizer step: {' x '.join(factors)}"
    if devices == 1 or config.effective_batch_size is not None:
        return text
    return (
        f"{text}. Steps and validation intervals are counted as on one device, so {devices} devices see {devices} "
        f"times as many images in them, and an epoch of a folder has fewer steps; model.optimizer.learning_rate is not "
        f"scaled. To keep the number of images per step of a recipe, set effective_batch_size to its batch size"
    )


def describe_tokens(model: Any) -> str:
    """Return the number of tokens per image and the size of the codebook."""
    if not isinstance(model, VQGAN):
        return f"{model.num_tokens} per image, from a codebook of {model.codebook_size}"
    size = model.autoencoder_config.resolution
    side = size // model.downsampling
    return f"{side} x {side} = {side**2} per image of {size} x {size} pixels, from a codebook of {model.codebook_size}"


def describe_parameters(model: nn.Module, device: torch.device) -> str:
    """Return the number of trained parameters and the device."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained / 1e6:.1f} M to train, on {device}"


def describe_length(config: TrainingConfig, trainer: pl.Trainer, data: Any) -> str:
    """Return the number of steps, and how often they show each image."""
    count = count_images(data.train)
    steps = planned_steps(config, trainer, data)
    text = f"{steps} steps" if steps > 0 else "no limit on the steps"
    if steps > 0 and count:
        epochs = steps * images_per_step(config, trainer, data) / count.images
        text += f", each image about {max(epochs, 0.1):.3g} times"
    interval = config.trainer["val_check_interval"]
    return text + (f"; validation every {interval} steps" if isinstance(interval, int) else "")


def images_per_step(config: TrainingConfig, trainer: pl.Trainer, data: Any) -> int:
    """Return the number of images per optimizer step."""
    return data.batch_size * trainer.world_size * config.grad_accum_steps


def planned_steps(config: TrainingConfig, trainer: pl.Trainer, data: Any) -> int:
    """Return the number of optimizer steps that ``max_steps`` and ``max_epochs`` allow; -1 if there is no limit."""
    count = count_images(data.train)
    steps_per_epoch = None
    if count:
        steps_per_epoch = max(count.images // images_per_step(config, trainer, data), 1)
    if isinstance(trainer.limit_train_batches, int):
        steps_per_epoch = trainer.limit_train_batches // config.grad_accum_steps
    steps = trainer.max_steps
    epochs = trainer.max_epochs
    if epochs and epochs > 0 and steps_per_epoch:
        by_epochs = epochs * steps_per_epoch
        return by_epochs if steps == -1 else min(steps, by_epochs)
    return steps


# --------------------------------------------------------------------------------------------------------------- memory


def describe_training_memory(model: Any, batch_size: int, precision: str) -> str:
    """Return the memory that training is expected to take on each device."""
    state = state_bytes(model) / GIB
    activations = activation_bytes(model) * batch_size / GIB
    if "bf16" in precision:
        activations /= 2
    return (
        f"about {state + activations:.2g} GiB per device (estimated): weights, gradients and optimizer {state:.2g}, "
        f"activations {activations:.2g}, without the buffers of the libraries"
    )


def state_bytes(model: Any) -> int:
    """Return the bytes of all weights, of the gradients, and of the optimizer's two moments per weight (Muon: one)."""
    frozen = model.encoders() if getattr(model, "has_encoders", False) else ()
    total = 0
    for part in (model, *frozen):
        total += sum(parameter.nbytes for parameter in part.parameters())
    uses_muon = model.hparams["optimizer"].get("name") == "muon"
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_moments = 1 if uses_muon and parameter.ndim == 2 else 2
            total += (1 + num_moments) * parameter.nbytes
    return total


def activation_bytes(model: Any) -> int:
    """Return the bytes per image that the forward pass keeps for the backward pass.

    Runs a copy of the model on the meta device, which allocates no memory, and adds up what autograd saves.
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run = run_vqgan if isinstance(model, VQGAN) else run_transformer
        outputs, copy = run(model)
    weights = {p.untyped_storage()._cdata for p in copy.parameters()}
    # The outputs keep the graph alive, and with it the saved tensors.
    del outputs
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)


def copy_without_ema(model: Any) -> Any:
    """Return a new model with the settings of another, without EMA weights."""
    optimizer = {**model.hparams["optimizer"], "ema_decay": 0.0}
    return type(model)(**{**model.hparams, "optimizer": optimizer}).train()


def run_vqgan(model: VQGAN) -> tuple[Any, nn.Module]:
    """Run the autoencoder, the discriminator and the network of LPIPS on one image.

    The quantizer is left out: it keeps little, and needs real numbers.

    Returns:
        The outputs, and a module with all weights.
    """
    copy = copy_without_ema(model)
    # Sizes that are not divisible by the downsampling factor are refused when training starts.
    side = max(model.autoencoder_config.resolution // copy.downsampling, 1) * copy.downsampling
    latents = copy.autoencoder.encode(torch.zeros(1, 3, side, side))
    reconstruction = copy.autoencoder.decode(latents)
    networks = [copy.discriminator] if copy.discriminator else []
    if model.loss_config.perceptual_weight > 0:
        from torchvision.models import vgg16

        networks.append(vgg16(weights=None).features.requires_grad_(False))
    outputs = (reconstruction, [network(reconstruction) for network in networks])
    return outputs, nn.ModuleList([copy, *networks])


def run_transformer(model: Any) -> tuple[Any, nn.Module]:
    """Run the transformer and its cross-entropy on the tokens of one image; return the loss and the transformer."""
    copy = copy_without_ema(model)
    indices = torch.zeros(1, copy.num_tokens, dtype=torch.int64)
    logits = copy.gpt(indices, torch.zeros(1, copy.clip_dim))
    return F.cross_entropy(logits.flatten(0, 1), indices.flatten()), copy
