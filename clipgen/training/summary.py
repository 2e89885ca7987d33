"""What a training is about to do, in a few lines before its first step: images, batch, sizes, length, memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.data.source import count_images, skip_counter_of
from clipgen.training.validation_interval import accumulation
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
GIB = 2**30


def log_summary(config: DictConfig, trainer: pl.Trainer, model: Any, data: Any) -> None:
    """Log what the training is about to do."""
    lines = {
        "Images": images(data),
        "Batch": batch(config, trainer),
        "Tokens": tokens(config, model),
        "Parameters": parameters(model),
        "Length": length(config, trainer, data),
        "Memory": memory(config, model),
    }
    for name, text in lines.items():
        logger.info("%-11s %s", f"{name}:", text)


def images(data: Any) -> str:
    """Return how many images there are for training and for validation, and how many were skipped."""
    train, val = count_images(data.train), count_images(data.val)
    found = f"{train if train else 'a stream of unknown length'} for training"
    held_out = f"{val} held out for validation" if val else "validation reads a stream" if data.val else "no validation"
    skip_counter = skip_counter_of(data.train)
    skipped = skip_counter.num_skipped if skip_counter else 0
    return f"{found}, {held_out}, {skipped} skipped so far"


def batch(config: DictConfig, trainer: pl.Trainer) -> str:
    """Return the images per optimizer step, and how they come about."""
    size, devices, batches = config.data.batch_size, trainer.world_size, accumulation(config)
    text = f"{size * devices * batches} images per step"
    factors = [f"{size} per batch"] + [f"{devices} devices"] * (devices > 1)
    factors += [f"{batches} batches accumulated"] * (batches > 1)
    return text + (f" ({' x '.join(factors)})" if len(factors) > 1 else "")


def tokens(config: DictConfig, model: Any) -> str:
    """Return the tokens per image, and of how many codes they are."""
    if not isinstance(model, VQGAN):
        return f"{model.num_tokens} per image, of {model.codebook_size} codes"
    size, side = model.hparams["resolution"], model.hparams["resolution"] // model.downsampling
    return f"{side} x {side} = {side**2} per image of {size} x {size} pixels, of {model.codebook_size} codes"


def parameters(model: nn.Module) -> str:
    """Return the number of parameters that are trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained / 1e6:.1f} M to train"


def length(config: DictConfig, trainer: pl.Trainer, data: Any) -> str:
    """Return the steps of the training, and how many times they show each image."""
    count = count_images(data.train)
    steps, epochs = trainer.max_steps, trainer.max_epochs
    per_step = config.data.batch_size * trainer.world_size * accumulation(config)
    per_epoch = max(count.images // per_step, 1) if count else None
    if isinstance(trainer.limit_train_batches, int):
        per_epoch = trainer.limit_train_batches // accumulation(config)
    if epochs and epochs > 0 and per_epoch and (steps == -1 or epochs * per_epoch < steps):
        steps = epochs * per_epoch
    text = f"{steps} steps" if steps > 0 else "no limit on the steps"
    if steps > 0 and count:
        text += f", each image about {max(steps * per_step / count.images, 0.1):.3g} times"
    interval = trainer.val_check_interval  # type: ignore[attr-defined]
    return text + (f"; validation every {interval} batches" if isinstance(interval, int) else "")


# --------------------------------------------------------------------------------------------------------------- memory


def memory(config: DictConfig, model: Any) -> str:
    """Return the memory that training is expected to take on each device."""
    state, activations = state_bytes(model) / GIB, activation_bytes(model) * config.data.batch_size / GIB
    if "bf16" in str(config.trainer.precision):
        activations /= 2
    return (
        f"about {state + activations:.2g} GiB on each device, estimated: weights, gradients and optimizer {state:.2g}, "
        f"activations {activations:.2g} (what a forward pass keeps for the backward one, without the library's buffers)"
    )


def state_bytes(model: Any) -> int:
    """Return the bytes of all weights, of the gradients, and of the optimizer's two moments; Muon keeps one."""
    frozen = getattr(model, "_frozen", None) or ()
    weights = sum(p.nbytes for part in (model, *frozen) for p in part.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    muon = model.hparams.get("optimizer") == "muon"
    moments = sum(p.nbytes * (1 if muon and p.ndim == 2 else 2) for p in trained)
    return weights + sum(p.nbytes for p in trained) + moments


def activation_bytes(model: Any) -> int:
    """Return the bytes that the forward pass of one image keeps for the backward pass: a twin without memory of its own
    (on the meta device) is run, and what autograd saves is added up."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs, twin = run_vqgan(model.hparams) if isinstance(model, VQGAN) else run_transformer(model)
    weights = {p.untyped_storage()._cdata for p in twin.parameters()}
    del outputs  # until here they keep the graph, and with it what was saved
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)


def run_vqgan(arguments: Any) -> tuple[Any, nn.Module]:
    """Run tokenizer, discriminator and LPIPS' network on one image; return the outputs and what has the weights."""
    twin = VQGAN(**{**arguments, "ema_decay": 0.0}).train()
    side = max(arguments["resolution"] // twin.downsampling, 1) * twin.downsampling  # others are refused in training
    latents = twin.autoencoder.encode(torch.zeros(1, 3, side, side))
    reconstruction = twin.autoencoder.decode(latents)  # a quantizer keeps little, and needs real numbers
    judges = [twin.discriminator] if twin.discriminator else []
    if arguments["perceptual_weight"] > 0:
        from torchvision.models import vgg16

        judges.append(vgg16(weights=None).features.requires_grad_(False))
    outputs = reconstruction, [judge(reconstruction) for judge in judges]
    return outputs, nn.ModuleList([twin, *judges])


def run_transformer(model: Any) -> tuple[Any, nn.Module]:
    """Run the transformer and its cross-entropy on the tokens of one image; return the loss and the transformer."""
    twin = type(model)(**{**model.hparams, "ema_decay": 0.0}).train()
    indices = torch.zeros(1, twin.num_tokens, dtype=torch.int64)
    logits = twin.gpt(indices, torch.zeros(1, twin.clip_dim))
    return F.cross_entropy(logits.flatten(0, 1), indices.flatten()), twin
