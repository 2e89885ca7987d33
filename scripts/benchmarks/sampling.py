"""The decoding loop against transformers' ``generate`` and against bare matrix products; reranking by CLIP."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.models import paper_tokenizer
from benchmarks.timing import alternating_medians, median_seconds, print_table
from clipgen import ConditionalTransformer, TextToImage

CLIP_DIM = 512
DECODE_BATCH_SIZE = 64
Run = Callable[[], Any]


def run_sample(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of tokens and each batch size."""
    rows = {}
    for tokens in args.num_tokens:
        for batch in args.batches:
            rows[f"T {tokens}, batch {batch}"] = measure_sample(args, tokens, batch)
    print_table(f"{args.n_layer} x {args.n_embd}, K = {args.codebook_size}", rows, "images/s")
    if args.plot:
        plot_growth(rows, args)
    return {"rows": rows}


def measure_sample(args: argparse.Namespace, tokens: int, batch: int) -> dict[str, float]:
    """Return the median seconds of each way to compute the same tokens, and their ratios."""
    transformer, embedding = make_inputs(args, tokens, batch)
    runs: dict[str, Run] = {
        "reads": weight_reads(transformer),
        "products": matrix_products(transformer, batch),
        "clipgen": lambda: transformer.sample(embedding, top_k=300, top_p=0.95, seed=0),
        "generate": transformers_generate(transformer, embedding),
    }
    if args.decode:
        runs["decode"] = image_decoding(transformer, batch, args)
    with torch.inference_mode():
        medians = alternating_medians(runs, args.steps, args.device)
    return {f"{name}, s": value for name, value in medians.items()} | {
        "clipgen / reads": medians["clipgen"] / medians["reads"],
        "clipgen / products": medians["clipgen"] / medians["products"],
        "generate / clipgen": medians["generate"] / medians["clipgen"],
        "images/s": batch / (medians["clipgen"] + medians.get("decode", 0)),
        "tokens/s": batch * tokens / medians["clipgen"],
    }


def make_inputs(args: argparse.Namespace, tokens: int, batch: int) -> tuple[ConditionalTransformer, Tensor]:
    """Return a transformer with random weights and CLIP embeddings (batch, E)."""
    transformer = ConditionalTransformer(
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        codebook_size=args.codebook_size,
        num_tokens=tokens,
        clip_dim=CLIP_DIM,
    )
    transformer = transformer.eval().to(args.device)
    embedding = torch.nn.functional.normalize(torch.randn(batch, CLIP_DIM, device=args.device), dim=-1)
    if args.bf16:
        transformer = transformer.to(torch.bfloat16)
        embedding = embedding.to(torch.bfloat16)
    if args.compile:
        transformer.compile_decoder()
    return transformer, embedding


def decoding_weights(transformer: ConditionalTransformer) -> list[Tensor]:
    """Return the matrices (in, out) that every decoding step multiplies with."""
    gpt: Any = transformer.gpt
    weights = []
    for block in gpt.transformer.h:
        weights += [block.attn.c_attn.weight, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight]
    return [*weights, gpt.head.weight.T]


def weight_reads(transformer: ConditionalTransformer) -> Run:
    """Return a function that reads the weights once per token: no decoding loop can be faster."""
    memory = torch.cat([weight.flatten() for weight in decoding_weights(transformer)])

    def run() -> None:
        for _ in range(transformer.num_tokens):
            memory.sum()

    return run


def matrix_products(transformer: ConditionalTransformer, batch: int) -> Run:
    """Return a function that computes the matrix products of decoding by torch, and nothing else."""
    weights = decoding_weights(transformer)
    inputs = {weight.shape[0]: weight.new_empty(batch, weight.shape[0]).normal_() for weight in weights}

    def run() -> None:
        for _ in range(transformer.num_tokens):
            for weight in weights:
                inputs[weight.shape[0]] @ weight

    return run


def transformers_generate(transformer: ConditionalTransformer, embedding: Tensor) -> Run:
    """Return a function that samples by transformers' own ``generate`` with its KV cache, from the same weights."""
    gpt: Any = transformer.gpt
    config = GPT2Config(**gpt.transformer.config.to_diff_dict() | {"attn_implementation": "sdpa"})
    model: Any = GPT2LMHeadModel(config).eval().to(embedding)
    model.transformer.load_state_dict(gpt.transformer.state_dict())
    model.lm_head = gpt.head
    tokens = transformer.num_tokens

    def run() -> Any:
        return model.generate(
            inputs_embeds=gpt.condition_tokens(embedding)[:, None],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=300,
            top_p=0.95,
            use_cache=True,
            pad_token_id=0,
        )

    return run


def image_decoding(transformer: ConditionalTransformer, batch: int, args: argparse.Namespace) -> Run:
    """Return a function that decodes random tokens by a tokenizer of the paper's size."""
    side = math.isqrt(transformer.num_tokens)
    indices = torch.randint(args.codebook_size, (batch, side, side), device=args.device)
    vqgan = paper_tokenizer(args.codebook_size).to(args.device)
    if args.compile:  # as TextToImage.compile does
        vqgan.autoencoder.decoder.compile(dynamic=False)

    def run() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            for chunk in indices.split(DECODE_BATCH_SIZE):
                vqgan.decode(chunk)

    return run


def plot_growth(rows: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Plot seconds per image against the number of tokens, with one panel per batch size."""
    figure = Figure(figsize=(4 * len(args.batches), 3.2), layout="constrained")
    panels = figure.subplots(1, len(args.batches), squeeze=False)[0]
    for axis, batch in zip(panels, args.batches):
        for name, style in (("generate", "o--"), ("clipgen", "o-"), ("products", "o:")):
            times = [rows[f"T {tokens}, batch {batch}"][f"{name}, s"] / batch for tokens in args.num_tokens]
            axis.plot(args.num_tokens, times, style, label=name)
        axis.set(title=f"batch {batch}", xlabel="tokens", ylabel="seconds per image", xscale="log", yscale="log")
        axis.set_xticks(args.num_tokens, [str(tokens) for tokens in args.num_tokens], minor=False)
        axis.legend()
    figure.savefig(args.plot, dpi=110)


def run_rerank(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the choice among candidates by CLIP score, compared with their generation."""
    pipe = TextToImage.load(args.checkpoint).to(args.device)
    embedding = pipe.embed(args.prompt)
    rows = {}
    for candidates in args.batches:
        rows[f"{candidates} candidates"] = measure_rerank(pipe, embedding, candidates, args)
    print_table(f"reranking, {args.checkpoint}", rows, "reranking / generating")
    return {"rows": rows}


@torch.inference_mode()
def measure_rerank(pipe: TextToImage, embedding: Tensor, candidates: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of generating and of reranking a number of candidates."""

    def generate() -> Tensor:
        return pipe.generate(embedding.expand(candidates, -1), 0)

    images = generate()

    def rerank() -> int:
        return int((pipe.clip.encode_image(images) @ embedding[0]).argmax())

    generating = median_seconds(generate, args.steps, args.device)
    reranking = median_seconds(rerank, args.steps, args.device)
    return {"generating, s": generating, "reranking, s": reranking, "reranking / generating": reranking / generating}
