"""The incremental and the compiled decoder, compared with the full forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpt_networks import K, T, embeddings, network
from torch import Tensor

from clipgen.models import kv_cache
from clipgen.models.kv_cache import CompiledDecoder, IncrementalDecoder
from clipgen.sampling import LogitsFn, sample_sequence
from clipgen.sampling_params import SamplingParams


def decode(logits_fn: LogitsFn, indices: Tensor) -> Tensor:
    """Return the decoder's logits (B, T, K) when it is fed with the given indices."""
    logits = []
    for t in range(T):
        previous = None if t == 0 else indices[:, t - 1]
        logits.append(logits_fn(t, previous).clone())
    return torch.stack(logits, dim=1)


@torch.no_grad()
def test_incremental_decoding_matches_the_full_forward_pass():
    gpt = network()
    e = embeddings(4)
    indices = torch.randint(K, (4, T))
    logits = decode(IncrementalDecoder(gpt, 4).start(gpt.condition_tokens(e)), indices)
    torch.testing.assert_close(logits, gpt(indices, e), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoding_matches_the_full_forward_pass():
    gpt = network()
    decoder = CompiledDecoder(gpt, 4)
    # The second batch is padded, and overwrites the cache of the first.
    for batch_size in (4, 3):
        e = embeddings(batch_size)
        indices = torch.randint(K, (batch_size, T))
        logits = decode(decoder.start(gpt.condition_tokens(e)), indices)
        torch.testing.assert_close(logits, gpt(indices, e), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_more_than_eight_batch_sizes_can_be_compiled(eager_compile):
    """Dynamo counts the graphs of all decoders together, and its default limit is eight."""
    gpt = network()
    for batch_size in range(1, 11):
        logits_fn = CompiledDecoder(gpt, batch_size).start(gpt.condition_tokens(embeddings(batch_size)))
        assert logits_fn(0, None).shape == (batch_size, K)


@torch.no_grad()
def test_one_graph_serves_all_positions_without_copying_the_cache(monkeypatch):
    """A write into a slice of a larger tensor would be functionalized to a select_scatter, which copies the tensor."""
    from torch._dynamo.backends.common import aot_autograd

    programs = []
    compile = torch.compile

    def record(program, inputs):
        programs.append({str(node.target) for node in program.graph.nodes})
        return program

    backend = aot_autograd(fw_compiler=record, inference_compiler=record)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    gpt = network(tie_embeddings=False)
    logits_fn = CompiledDecoder(gpt, 4).start(gpt.condition_tokens(embeddings(3)))
    for position in (0, 3):
        assert logits_fn(position, None).shape == (3, K)
    assert len(programs) == 1 and not [name for name in programs[0] if "scatter" in name]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("outputs", "has_bias"), [(48, True), (48, False), (33, True)])
def test_linear_layers_of_small_batches(batch_size, outputs, has_bias):
    weight = torch.randn(32, outputs)
    bias = torch.randn(outputs) if has_bias else None
    x = torch.randn(batch_size, 32)
    expected = (x.double() @ weight.double() + (bias.double() if has_bias else 0)).float()
    for layout in (weight, weight.T.contiguous().T):  # the weight of a tied head is transposed
        for decoder in (IncrementalDecoder, CompiledDecoder):
            y = decoder.make_linear(layout, bias, batch_size)(x)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    bias = bias.bfloat16() if has_bias else None
    half = IncrementalDecoder.make_linear(weight.bfloat16(), bias, batch_size)(x.bfloat16())
    torch.testing.assert_close(half.float(), expected, atol=0.3, rtol=0.05)


@pytest.fixture
def eager_compile(monkeypatch):
    """Make torch.compile trace, guard and recompile, but generate no code."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))


@torch.no_grad()
def test_graphs_of_large_batches_read_the_cache_in_buckets(monkeypatch, eager_compile):
    """The logits equal those of the incremental decoder, which reads only the positions so far."""
    monkeypatch.setattr(kv_cache, "BUCKET_SIZE", 5)
    gpt = network()
    lengths = []
    attend = F.scaled_dot_product_attention

    def record(q, k, v, **options):
        lengths.append(k.shape[2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    for batch_size, expected in ((2, [12] * T), (kv_cache.MIN_BATCH_SIZE_FOR_BUCKETS, [5] * 5 + [10] * 5 + [12] * 2)):
        condition = gpt.condition_tokens(embeddings(batch_size))
        indices = torch.randint(K, (batch_size, T))
        compiled = CompiledDecoder(gpt, batch_size).start(condition)
        incremental = IncrementalDecoder(gpt, batch_size).start(condition)
        for position in range(T):
            previous = indices[:, position - 1] if position else None
            lengths.clear()
            logits = compiled(position, previous)
            assert lengths in ([], [expected[position]] * 3)  # recorded only when the graph is traced
            torch.testing.assert_close(logits, incremental(position, previous), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=7, top_p=0.9),
        SamplingParams(guidance_scale=2.0, guidance_power=1.0),
        SamplingParams(temperature=0.0),
    ],
    ids=["top_p", "guidance", "greedy"],
)
def test_sampling_inside_the_graph_gives_the_indices_of_sampling_outside(eager_compile, params):
    """Also for padded batches, with a prefix, and after a batch with other settings."""
    gpt = network()
    decoder = CompiledDecoder(gpt, 8)
    for batch_size in (4, 3):
        condition = gpt.condition_tokens(embeddings((1 + params.uses_guidance) * batch_size))
        uniforms = torch.rand(batch_size, T)
        prefix = torch.randint(K, (batch_size, 2))
        decoder.start_sampling(condition[:batch_size], uniforms, SamplingParams(temperature=3.0, top_k=3))(0, None)
        indices = []
        for sample_fn in (
            decoder.start_sampling(condition, uniforms, params),
            IncrementalDecoder(gpt, len(condition)).start_sampling(condition, uniforms, params),
        ):
            indices.append(sample_sequence(sample_fn, uniforms.shape, prefix=prefix))
        assert torch.equal(indices[0], indices[1])
        assert len(indices[0].unique()) > 4


def test_decoder_created_in_inference_mode_works_outside(eager_compile):
    gpt = network()
    with torch.inference_mode():
        decoder = CompiledDecoder(gpt, 2)
        first = decoder.start(gpt.condition_tokens(embeddings(2)))(0, None).clone()
    with torch.no_grad():
        second = decoder.start(gpt.condition_tokens(embeddings(2)))(0, None)
    assert first.shape == second.shape == (2, K)
