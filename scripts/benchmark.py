"""Speed and memory, as ratios measured in one run.

    python scripts/benchmark.py vqgan --size cifar
    python scripts/benchmark.py vqgan --size paper --device cuda --batch 16 --variants plain bf16 compile bf16+compile
    python scripts/benchmark.py transformer --size cifar --clip ViT-B-32-quickgelu --variants plain
    python scripts/benchmark.py transformer --size cifar --isa avx2 --variants plain muon
    python scripts/benchmark.py encode
    python scripts/benchmark.py transformer --size medium --device cuda --batch 32 --variants bf16 bf16+compile
    python scripts/benchmark.py sample --batches 1 8 --num-tokens 64 256 1024 --plot growth.png
    python scripts/benchmark.py sample --device cuda --bf16 --compile --decode --n-layer 24 --n-head 16 --n-embd 1024 \\
        --codebook-size 16384 --batches 1 64 256 1024
    python scripts/benchmark.py rerank

``--isa avx2`` imitates a processor without AVX-512 on one that has it.
A variant ``a+b`` switches both on. Variants run in processes of their own, so that peak memory is their own.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import logging
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clipgen import VQGAN, ConditionalTransformer, FrozenCLIP, TextToImage
from clipgen.data.shapes import ShapesDataset
from clipgen.data.token_cache import BatchedDataset, TokenCacheDataset, no_collate, record_dtype
from clipgen.files import write_json
from clipgen.models.lpips import build_lpips
from clipgen.processor import has_bf16_units, instruction_set

# What makes torch's own kernels, oneDNN and MKL leave out what AVX2 does not have; read when they are loaded
IMITATE = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
WARM_UP = 3  # steps that are not measured
CIFAR = dict(
    codebook_size=1024,
    codebook_dim=32,
    quantizer_type="cosine",
    ch=96,
    ch_mult=[1],
    num_res_blocks=1,
    attn_resolutions=[],
    resolution=32,
    z_channels=96,
    patch_size=4,
    mid_attention=False,
    perceptual_weight=0.0,
    gan_channels=32,
    gan_num_layers=2,
)
VQGAN_SIZES: dict[str, dict[str, Any]] = {"cifar": CIFAR, "paper": {}}  # an empty one: the published f16, 16384 x 256
SMALL = dict(codebook_size=1024, num_tokens=64, clip_dim=64)  # of 32 x 32 pixels
TRANSFORMER_SIZES: dict[str, dict[str, Any]] = {
    "demo": dict(n_layer=4, n_head=4, n_embd=128, **SMALL),
    "cifar": dict(n_layer=4, n_head=6, n_embd=192, **SMALL),
    "medium": {},  # the paper's for COCO
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    "channels_last": {"channels_last": True},
    "checkpointing": {"checkpointing": True},
    "ema": {"ema_decay": 0.999},
    "lecam": {"lecam_weight": 0.1},
    "without_discriminator": {"gan_weight": 0.0},
    "bf16": {"precision": "bf16-mixed"},
    "muon": {"optimizer": "muon"},
    "clip_loss": {"clip_loss_weight": 0.2},
    "every_4": {"clip_loss_interval": 4},
    "quarter": {"clip_loss_batch_fraction": 0.25},
}


def options_of(part: str) -> list[str]:
    """The names of those that a part's model has."""
    known = {"precision", *inspect.signature({"vqgan": VQGAN, "transformer": ConditionalTransformer}[part]).parameters}
    return [name for name, option in OPTIONS.items() if known.issuperset(option)]


def options(variant: str) -> dict[str, Any]:
    """What a variant such as ``bf16+compile`` switches on."""
    return {key: value for name in variant.split("+") for key, value in OPTIONS[name].items()}


# ---------------------------------------------------------------------------------------------------------- measuring


def seconds(function: Callable[[], Any], device: str) -> float:
    """What one call takes."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], Any], steps: int, device: str) -> float:
    """What a call takes, after two of warm-up."""
    return statistics.median([seconds(function, device) for _ in range(steps + 2)][2:])


def peak_memory(device: str) -> float:
    """GiB that this process needed at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


class Clock(pl.Callback):
    """The time from the end of one training step to the end of the next: loading its batch is part of it."""

    def __init__(self, device: str, period: int):
        self.device, self.period, self.ends = device, period, [now(device)]

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(now(self.device))

    @property
    def seconds(self) -> float:
        """Of a step: the median of runs of ``period`` steps, after which the same things happen again."""
        ends = self.ends[WARM_UP :: self.period]
        return statistics.median(between(a, b) / self.period for a, b in itertools.pairwise(ends))


def now(device: str) -> Any:
    """A moment; on a GPU a mark between its kernels, so that measuring does not make the host wait for them."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one moment to another."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def fit(module: pl.LightningModule, data: DataLoader[Any], device: str, precision: str) -> dict[str, float]:
    """Seconds of a training step and peak memory."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as ``clipgen-train`` does
    clock = Clock(device, getattr(module, "clip_loss_config", ClipLossConfig()).interval)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        precision=precision,
        callbacks=[clock],
        benchmark=True,  # cuDNN's, as in configs/trainer
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {"seconds": clock.seconds, "GiB": peak_memory(device)}


def loader(*arguments: Any, **options: Any) -> DataLoader[Any]:
    """Batches, for a GPU from where it fetches them beside its work, as in training."""
    return DataLoader(*arguments, pin_memory=torch.cuda.is_available(), **options)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def table(title: str, rows: dict[str, dict[str, float]], ratio: str) -> None:
    """Print rows as Markdown; the ratio is of column ``ratio`` to the first row's."""
    columns = list(next(iter(rows.values())))
    first = next(iter(rows.values()))[ratio]
    print(f"| {title} | {' | '.join(columns)} | {ratio}, ratio |\n|{'---|' * (len(columns) + 2)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.4g}' for c in columns)} | {row[ratio] / first:.2f} |")


# -------------------------------------------------------------------------------------------------------------- parts


def measure_vqgan(size: str, variant: str, batch: int, steps: int, device: str, perceptual: bool) -> dict[str, float]:
    """Images a second of a training step, of encoding, of decoding; and the training's peak memory."""
    arguments = {**VQGAN_SIZES[size], "gan_start_step": 0, "channels_last": False, **options(variant)}
    precision = arguments.pop("precision", "32-true")
    vqgan = make_vqgan(**arguments | {"perceptual_weight": float(perceptual)})
    if perceptual:  # its speed does not depend on its weights
        vqgan._lpips = (build_lpips(),)
    images = torch.rand(batch, 3, vqgan.hparams.resolution, vqgan.hparams.resolution) * 2 - 1
    step = fit(vqgan, loader([{"images": images}] * (steps + WARM_UP), batch_size=None), device, precision)
    vqgan, images = vqgan.eval().to(device), images.to(device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision != "32-true"):
        indices = vqgan.encode(images)
        encode = median_seconds(lambda: vqgan.encode(images), steps, device)
        decode = median_seconds(lambda: vqgan.decode(indices), steps, device)
    rates = {"train images/s": step["seconds"], "encode images/s": encode, "decode images/s": decode}
    return {name: batch / value for name, value in rates.items()} | {"train GiB": step["GiB"]}


def vqgan(args: argparse.Namespace) -> dict[str, Any]:
    """Stage 1."""
    batch = args.batch or {"cifar": 24, "paper": 1}[args.size]
    measure = lambda v: apart(measure_vqgan, args.size, v, batch, args.steps, args.device, args.perceptual)
    rows = {variant: measure(variant) for variant in args.variants}
    table(f"VQ-GAN, {args.size}, batch {batch}", rows, "train images/s")
    return {"batch": batch, "rows": rows}


def make_clip(name: str) -> FrozenCLIP:
    """The bundled CLIP, or one of a published architecture: its speed does not depend on its weights."""
    if name == "shapes":
        return FrozenCLIP(name)
    model = open_clip.create_model(name)
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "open_clip_config.json", config)
        torch.save(model.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
        return FrozenCLIP(folder)


def measure_transformer(
    size: str, source: str, variant: str, batch: int, steps: int, device: str, clip: str
) -> dict[str, float]:
    """Images and tokens a second of a training step, from images or from a cache; and peak memory."""
    arguments = {**TRANSFORMER_SIZES[size], **options(variant)}
    precision = arguments.pop("precision", "32-true")
    if clip != "shapes":
        arguments["clip_dim"] = open_clip.get_model_config(clip)["embed_dim"]
    transformer = make_transformer(**arguments)
    count, sizes = (steps + WARM_UP) * batch, transformer.hparams
    if source == "images" or sizes.clip_loss_weight > 0:
        transformer.attach_encoders(make_vqgan(**CIFAR).eval(), make_clip(clip))
    if source == "images":
        found = fit(transformer, loader(ShapesDataset(count), batch), device, precision)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = np.empty(count, record_dtype(1, sizes.num_tokens, sizes.codebook_size, sizes.clip_dim))
            for name, tensor in (  # a GPU is faster where all numbers are alike
                ("indices", torch.randint(sizes.codebook_size, rows["indices"].shape)),
                ("embedding", torch.randn(rows["embedding"].shape)),
            ):
                rows[name] = tensor.numpy()
            np.save(Path(folder) / "shard-000000.npy", rows)
            data: Any = BatchedDataset(TokenCacheDataset(folder))
            order = torch.randperm(count).tolist()
            found = fit(transformer, loader(data, batch, sampler=order, collate_fn=no_collate), device, precision)  # type: ignore[arg-type]
    images = batch / found["seconds"]
    row = {"images/s": images, "tokens/s": images * sizes.num_tokens, "GiB": found["GiB"]}
    if device == "cuda":
        row["MFU"] = (
            flops(transformer) * row["tokens/s"] / 989e12
        )  # the dense bf16 peak of H100 SXM and H200; see ``flops``
    return row


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """What ``clipgen-encode`` does to images of the paper's size, and what that makes for ImageNet."""
    row = apart(measure_encode, args.clip, args.batch, args.steps, args.device)
    table(f"256 x 256, {args.clip}, batch {args.batch}", {"tokenizer and CLIP": row}, "images/s")
    views, size = 1_281_167 * args.augmentations, np.dtype(record_dtype(1, 256, 16384, 512)).itemsize
    hours = views / row["images/s"] / 3600
    print(f"\nImageNet, {args.augmentations} augmentations: {views * size / 1e9:.1f} GB, {hours:.0f} hours")
    return {"batch": args.batch, "rows": {"encode": row}, "hours": hours}


def measure_encode(clip: str, batch: int, steps: int, device: str) -> dict[str, float]:
    """Seconds of the paper's tokenizer and of a CLIP, images a second of both, peak memory."""
    vqgan, encoder = make_vqgan(perceptual_weight=0.0).eval().to(device), make_clip(clip).to(device)
    images = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1
    with torch.inference_mode():
        tokenizer = median_seconds(lambda: vqgan.encode(images), steps, device)
        embedding = median_seconds(lambda: encoder.encode_image(images), steps, device)
    rate = batch / (tokenizer + embedding)
    return {"tokenizer, s": tokenizer, "CLIP, s": embedding, "images/s": rate, "GiB": peak_memory(device)}


def flops(transformer: ConditionalTransformer) -> float:
    """Return the floating-point operations per token of training: 6 N + 12 L C T (PaLM, arXiv:2204.02311, App. B).

    N counts the weights of the blocks and of the head, not the embeddings, which are only looked up. Attention counts
    as if every position saw all T: causal attention needs half of the second term. Not counted are the optimizer
    (Muon's Newton-Schulz iterations are matrix products, too), recomputation by checkpointing, and the CLIP loss; so
    MFU falls where they are switched on.
    """
    gpt, sizes = transformer.gpt, transformer.hparams
    parameters = sum(p.numel() for p in gpt.transformer.h.parameters()) + gpt.head.weight.numel()
    return 6 * parameters + 12 * sizes.n_layer * sizes.n_embd * sizes.num_tokens


def transformer(args: argparse.Namespace) -> dict[str, Any]:
    """Stage 2, online and from the cache; and how fast the cache is read."""
    batch = args.batch or {"demo": 32, "cifar": 32, "medium": 1}[args.size]
    rows = {}
    for source in ["cache"] if args.size == "medium" else ["images", "cache"]:
        for variant in args.variants:
            row = apart(measure_transformer, args.size, source, variant, batch, args.steps, args.device, args.clip)
            rows[f"from {source}, {variant}"] = row
    table(f"GPT-2, {args.size}, batch {batch}", rows, "images/s")
    rate = reading_rate()
    print(f"\nReading a cache of 200 000 images in 20 shards, batches of 256 in random order: {rate:.0f} images/s")
    return {"batch": batch, "rows": rows, "reading": rate}


def reading_rate() -> float:
    """Images a second out of a cache, by one process."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(20):
            np.save(Path(folder) / f"shard-{i:06d}.npy", np.ones(10_000, record_dtype(1, 256, 16384, 512)))
        data: Any = BatchedDataset(TokenCacheDataset(folder))
        order = torch.randperm(len(data)).tolist()[:100_000]
        batches = loader(data, 256, sampler=order, collate_fn=no_collate)  # type: ignore[arg-type]
        read = lambda: [len(batch["indices"]) for batch in batches]
        read()  # brings the files into memory
        return len(order) / seconds(read, "cpu")


def decoding_weights(transformer: ConditionalTransformer) -> list[Tensor]:
    """The matrices (in, out) that every step of decoding multiplies with."""
    gpt: Any = transformer.gpt.transformer
    weights = [
        w
        for block in gpt.h
        for w in (block.attn.c_attn.weight, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
    ]
    return [*weights, transformer.gpt.head.weight.T]


def reads(transformer: ConditionalTransformer) -> Callable[[], Any]:
    """Reading the weights once a token: what no decode loop can be faster than."""
    memory = torch.cat([weight.flatten() for weight in decoding_weights(transformer)])
    return lambda: [memory.sum() for _ in range(transformer.num_tokens)]


def products(transformer: ConditionalTransformer, batch: int) -> Callable[[], Any]:
    """The matrix products of decoding, as torch does them, and nothing else."""
    weights = decoding_weights(transformer)
    inputs = {w.shape[0]: torch.randn(batch, w.shape[0], device=w.device, dtype=w.dtype) for w in weights}

    def run() -> None:
        for _ in range(transformer.num_tokens):
            for weight in weights:
                inputs[weight.shape[0]] @ weight

    return run


def generate(transformer: ConditionalTransformer, embedding: Tensor) -> Callable[[], Any]:
    """transformers' own ``generate`` over the same weights, with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt: Any = transformer.gpt
    config = GPT2Config(**gpt.transformer.config.to_diff_dict() | {"attn_implementation": "sdpa"})
    model: Any = GPT2LMHeadModel(config).eval().to(embedding)
    model.transformer.load_state_dict(gpt.transformer.state_dict())
    model.lm_head = gpt.head
    settings = dict(do_sample=True, top_k=300, top_p=0.95, use_cache=True, pad_token_id=0)
    tokens = transformer.num_tokens

    def run() -> Any:
        start = gpt.condition(embedding)[:, None]
        return model.generate(inputs_embeds=start, max_new_tokens=tokens, min_new_tokens=tokens, **settings)

    return run


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """Decoding against transformers' generate and against the bare matrix products, alternating."""
    rows = {
        f"T {tokens}, batch {batch}": measure_sample(args, tokens, batch)
        for tokens in args.num_tokens
        for batch in args.batches
    }
    table(f"{args.n_layer} x {args.n_embd}, K = {args.codebook_size}", rows, "images/s")
    if args.plot:
        plot_sample(rows, args)
    return {"rows": rows}


def measure_sample(args: argparse.Namespace, tokens: int, batch: int) -> dict[str, float]:
    """The median seconds of each way, for one length and batch."""
    sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, codebook_size=args.codebook_size)
    transformer = make_transformer(**sizes, num_tokens=tokens, clip_dim=512).eval().to(args.device)
    embedding = torch.nn.functional.normalize(torch.randn(batch, 512, device=args.device), dim=-1)
    if args.bf16:
        transformer, embedding = transformer.to(torch.bfloat16), embedding.to(torch.bfloat16)
    if args.compile:
        transformer.compile_decoder()
    runs: dict[str, Callable[[], Any]] = {
        "reads": reads(transformer),
        "products": products(transformer, batch),
        "clipgen": lambda: transformer.sample(embedding, top_k=300, top_p=0.95, seed=0),
        "generate": generate(transformer, embedding),
    } | ({"decode": pictures(transformer, batch, args)} if args.decode else {})
    found: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(args.steps + 1):
            for name, run in runs.items():
                found[name].append(seconds(run, args.device))
    median = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {f"{name}, s": value for name, value in median.items()} | {
        "clipgen / reads": median["clipgen"] / median["reads"],
        "clipgen / products": median["clipgen"] / median["products"],
        "generate / clipgen": median["generate"] / median["clipgen"],
        "images/s": batch / (median["clipgen"] + median.get("decode", 0)),
        "tokens/s": batch * tokens / median["clipgen"],
    }


def pictures(transformer: ConditionalTransformer, batch: int, args: argparse.Namespace) -> Callable[[], Any]:
    """Turning the indices into pictures, 64 at a time, by a tokenizer of the paper's size."""
    side = math.isqrt(transformer.num_tokens)
    indices = torch.randint(args.codebook_size, (batch, side, side), device=args.device)
    tokenizer = make_vqgan(codebook_size=args.codebook_size, perceptual_weight=0.0).eval().to(args.device)
    if args.compile:  # as ``TextToImage.compile`` does
        tokenizer.tokenizer.decoder.compile(dynamic=False)

    def run() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            for some in indices.split(64):
                tokenizer.decode(some)

    return run


def plot_sample(rows: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Seconds an image against the number of indices, a panel a batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(args.batches), 3.2), layout="constrained")
    for axis, batch in zip(figure.subplots(1, len(args.batches), squeeze=False)[0], args.batches):
        for name, style in (("generate", "o--"), ("clipgen", "o-"), ("products", "o:")):
            times = [rows[f"T {tokens}, batch {batch}"][f"{name}, s"] / batch for tokens in args.num_tokens]
            axis.plot(args.num_tokens, times, style, label=name)
        axis.set(title=f"batch {batch}", xlabel="indices", ylabel="seconds an image", xscale="log", yscale="log")
        axis.set_xticks(args.num_tokens, [str(tokens) for tokens in args.num_tokens], minor=False)
        axis.legend()
    figure.savefig(args.plot, dpi=110)


def rerank(args: argparse.Namespace) -> dict[str, Any]:
    """What choosing among candidates by CLIP costs beside drawing them."""
    pipe = TextToImage.load(args.checkpoint).to(args.device)
    embedding = pipe.embed(args.prompt)
    rows = {f"{count} candidates": measure_rerank(pipe, embedding, count, args) for count in args.batches}
    table(f"reranking, {args.checkpoint}", rows, "reranking / drawing")
    return {"rows": rows}


@torch.inference_mode()
def measure_rerank(pipe: TextToImage, embedding: Tensor, count: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of either, for so many candidates."""
    drawing = lambda: pipe.generate(embedding.expand(count, -1), 0)
    images = drawing()
    choosing = lambda: (pipe.clip.encode_image(images) @ embedding[0]).argmax().item()
    draw, choose = (median_seconds(run, args.steps, args.device) for run in (drawing, choosing))
    return {"drawing, s": draw, "reranking, s": choose, "reranking / drawing": choose / draw}


def machine(device: str) -> str:
    """Describe what it ran on: device, instruction set, threads, build of torch."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    units = "with" if has_bf16_units("cpu") else "without"
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    found = (
        f"{name}, CPU {instruction_set()} {units} bfloat16 units, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__} (BLAS {blas[1] if blas else 'unknown'})"
    )
    if device == "cuda":  # what its fp32 is
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        found += f"; TF32 in fp32 convolutions {convolutions}, products {products}, products of training True"
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = p.add_subparsers(dest="part", required=True)
    v = parts.add_parser("vqgan", help="stage 1: train step, encode, decode")
    v.add_argument("--size", choices=VQGAN_SIZES, default="cifar")
    v.add_argument("--perceptual", action="store_true", help="with LPIPS (random weights)")
    t = parts.add_parser("transformer", help="stage 2: train step, from images and from a cache")
    t.add_argument("--size", choices=TRANSFORMER_SIZES, default="cifar")
    e = parts.add_parser("encode", help="clipgen-encode, at the paper's size")
    e.add_argument("--batch", type=int, default=8)
    e.add_argument("--augmentations", type=int, default=10, help="views of each image of ImageNet")
    for part, name in ((t, "shapes"), (e, "ViT-B-32-quickgelu")):
        part.add_argument("--clip", default=name, help="shapes, or an architecture of open_clip (default: %(default)s)")
    training = [
        "plain",
        "muon",
        "compile",
        "checkpointing",
        "ema",
        "clip_loss",
        "clip_loss+every_4",
        "clip_loss+quarter",
    ]
    for part, name, variants in (
        (v, "vqgan", ["plain", "channels_last", "checkpointing", "compile"]),
        (t, "transformer", training),
    ):
        part.add_argument("--batch", type=int)
        known = ", ".join(options_of(name))
        part.add_argument("--variants", nargs="+", default=variants, help=f"of {known}, joined by +")
    s = parts.add_parser("sample", help="the decode loop")
    s.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    for name, value in (("n-layer", 8), ("n-head", 8), ("n-embd", 512), ("codebook-size", 4096)):
        s.add_argument(f"--{name}", type=int, default=value)
    s.add_argument("--num-tokens", type=int, nargs="+", default=[256])
    s.add_argument("--plot", type=Path, help="PNG of the growth with the number of indices")
    s.add_argument("--bf16", action="store_true")
    s.add_argument("--compile", action="store_true", help="the decode loop, by torch.compile")
    s.add_argument("--decode", action="store_true", help="into pictures too, by a tokenizer of the paper's size")
    r = parts.add_parser("rerank", help="choosing by CLIP, beside drawing")
    r.add_argument("--checkpoint", default="shapes")
    r.add_argument("--prompt", default="a large blue ring on a white background")
    r.add_argument("--batches", type=int, nargs="+", default=[64], help="candidates")
    for part, steps in ((v, 10), (t, 20), (e, 3), (s, 3), (r, 3)):
        part.add_argument("--steps", type=int, default=steps, help="measured, after some of warm-up")
        part.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        part.add_argument("--output", type=Path, help="JSON to write")
        part.add_argument("--isa", choices=IMITATE, help="instruction set to imitate on a newer x86 processor")
    return p


def restart_imitating(isa: str | None) -> None:
    """Replace this process by one whose environment imitates an instruction set, unless it does already."""
    missing = {name: value for name, value in IMITATE.get(isa or "", {}).items() if os.environ.get(name) != value}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})


def main() -> None:
    p = parser()
    args = p.parse_args()
    for variant in getattr(args, "variants", []):
        for name in set(variant.split("+")).difference(known := options_of(args.part)):
            p.error(f"variants must be of {', '.join(known)}, got {name}")
    restart_imitating(args.isa)
    run = {"vqgan": vqgan, "transformer": transformer, "encode": encode, "sample": sample, "rerank": rerank}[args.part]
    found = {"part": args.part, "machine": machine(args.device), **run(args)}
    print(f"\n{found['machine']}")
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
