"""Estimate memory and speed of a recipe on a GPU from the FLOPs and bytes of a training step. Nothing is measured.

    python -m clipgen estimate experiment=photos
    python -m clipgen estimate experiment=photos data.image_size=64 --tflops 165 --bandwidth 1008 --mfu 0.4

The models are built on the meta device, which allocates no memory. A step takes at least the time of its matrix
products at a fraction of the peak rate (--mfu), and at least the time to move its bytes: every weight, gradient and
moment is read and written once, every saved activation is written and read, and so is its gradient. Kernel launches,
data loading and all other operations come on top. Stage 2 is estimated from a token cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipgen.cli.config import compose_config, node_to_dict
from clipgen.training.instantiate import instantiate
from clipgen.training.summary import GIB, activation_bytes, run_transformer, run_vqgan, state_bytes
from clipgen.vqgan import VQGAN

# A data set that the recipes need only to be composed.
PLACEHOLDERS = ("data.root=photos",)
CLIP_DIM = 512  # ViT-B/32


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a training step.

    Args:
        tokens: tokens per image.
        parameters: trained parameters.
        flops: floating-point operations per step.
        bytes_moved: bytes read and written per step.
        memory: bytes of weights, gradients, moments and activations.
    """

    tokens: int
    parameters: int
    flops: float
    bytes_moved: float
    memory: float

    def seconds(self, tflops: float, bandwidth: float, mfu: float) -> float:
        """Return the seconds per step, of products or of memory, whichever takes longer.

        Args:
            tflops: peak rate of matrix products, in 10^12 operations per second.
            bandwidth: memory bandwidth in GB/s.
            mfu: fraction of the peak rate that is reached.
        """
        return max(self.flops / (tflops * 1e12 * mfu), self.bytes_moved / (bandwidth * 1e9))


def estimate(stage: str, overrides: list[str]) -> Estimate:
    """Return the estimate of a stage, as composed by Hydra with overrides."""
    tokenizer = [] if stage == "vqgan" else ["vqgan=x"]
    config = node_to_dict(compose_config(f"stage={stage}", *PLACEHOLDERS, *overrides, *tokenizer))
    batch_size = config["data"]["batch_size"]
    with torch.device("meta"):
        model = build_model(stage, config, overrides)
        flops = step_flops(model) * batch_size
    state = state_bytes(model)
    # Activations are in bf16; those of the quantizer and the losses, in float32, are few.
    factor = 0.5 if "bf16" in str(config["trainer"]["precision"]) else 1.0
    activations = activation_bytes(model) * batch_size * factor
    return Estimate(
        tokens=num_tokens(model, config),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=flops,
        bytes_moved=2 * state + 4 * activations,
        memory=state + activations,
    )


def build_model(stage: str, config: dict[str, Any], overrides: list[str]) -> Any:
    """Return the model of a stage; the transformer gets its sizes from the recipe of stage 1."""
    if stage == "vqgan":
        return instantiate(config["model"], "model")
    tokenizer = build_model("vqgan", node_to_dict(compose_config("stage=vqgan", *PLACEHOLDERS, *overrides)), overrides)
    tokens = (config["data"]["image_size"] // tokenizer.downsampling) ** 2
    sizes = {"codebook_size": tokenizer.codebook_size, "num_tokens": tokens, "clip_dim": CLIP_DIM}
    return instantiate(config["model"], "model", **sizes)


def num_tokens(model: Any, config: dict[str, Any]) -> int:
    """Return the number of tokens per image."""
    if isinstance(model, VQGAN):
        return (config["data"]["image_size"] // model.downsampling) ** 2
    tokens: int = model.num_tokens
    return tokens


def step_flops(model: Any) -> float:
    """Return the FLOPs of a step per image: forward and backward pass, as torch counts them.

    In stage 1 the discriminator and LPIPS also see the real image: the former with a backward pass for its own loss on
    both, the latter without.
    """
    if isinstance(model, VQGAN):
        return count_flops(lambda: total_of(run_vqgan(model)[0])) + networks_flops(model)
    return count_flops(lambda: run_transformer(model)[0])


def networks_flops(model: VQGAN) -> float:
    """Return the FLOPs of the discriminator's own loss, and of LPIPS on the real image."""
    size = model.autoencoder_config.resolution
    image = torch.zeros(1, 3, size, size)
    discriminator = model.discriminator
    flops = 2 * count_flops(lambda: discriminator(image).sum()) if discriminator else 0.0
    if model.loss_config.perceptual_weight > 0:
        from torchvision.models import vgg16

        with torch.no_grad():
            flops += count_flops(lambda: vgg16(weights=None).features(image).sum())
    return flops


def total_of(outputs: Any) -> torch.Tensor:
    """Return the sum of nested outputs."""
    if isinstance(outputs, torch.Tensor):
        return outputs.sum()
    return sum((total_of(output) for output in outputs), torch.zeros(()))


def count_flops(compute_loss: Callable[[], torch.Tensor]) -> float:
    """Return the FLOPs of computing a loss, and of its backward pass."""
    with FlopCounterMode(display=False) as counter:
        value = compute_loss()
        if value.requires_grad:
            value.backward()
    return counter.get_total_flops()


def describe(name: str, cost: Estimate, args: argparse.Namespace) -> str:
    """Return a row of the table."""
    seconds = cost.seconds(args.tflops, args.bandwidth, args.mfu)
    values = [
        f"{cost.tokens}",
        f"{cost.parameters / 1e6:.0f} M",
        f"{cost.flops / 1e12:.2f}",
        f"{cost.bytes_moved / 1e9:.1f}",
        f"{cost.memory / GIB:.1f}",
        f"{1 / seconds:.1f}",
    ]
    return f"| {name} | {' | '.join(values)} |"


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="arguments of clipgen-train, without stage")
    parser.add_argument(
        "--tflops", type=float, default=165.0, help="peak rate in bf16 (default: %(default)s, RTX 4090)"
    )
    parser.add_argument("--bandwidth", type=float, default=1008.0, help="in GB/s (default: %(default)s, RTX 4090)")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak rate (default: %(default)s)")
    return parser


def main() -> None:
    """Print a table with one row per stage."""
    args = make_parser().parse_args()
    print("Estimated, not measured:\n")
    print("| | tokens per image | parameters | TFLOP per step | GB per step | GiB | steps/s |")
    print("|---" * 7 + "|")
    for stage in ("vqgan", "transformer"):
        print(describe(f"stage={stage}", estimate(stage, args.overrides), args))


if __name__ == "__main__":
    main()
