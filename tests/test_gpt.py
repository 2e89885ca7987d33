"""The network and its incremental decoder, compared with transformers' own GPT-2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from clipgen.hardware.measured_choices import measured_choice
from clipgen.models import cpu_kernels, kv_cache
from clipgen.models.config import GPTConfig
from clipgen.models.gpt import ConditionalGPT2
from clipgen.models.kv_cache import CompiledDecoder, IncrementalDecoder
from clipgen.sampling import LogitsFn, sample_sequence
from clipgen.sampling_params import SamplingParams

K, T, E, C = 50, 12, 16, 32


def network(**arguments) -> ConditionalGPT2:
    """Return a network with weights so large that its logits differ clearly."""
    sizes = dict(n_layer=3, n_head=4, n_embd=C, codebook_size=K, num_tokens=T, clip_dim=E)
    null_condition = arguments.pop("null_condition", False)
    gpt = ConditionalGPT2(GPTConfig(**(sizes | arguments)), null_condition).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return gpt


def reference_model(gpt: ConditionalGPT2) -> GPT2LMHeadModel:
    """Return transformers' language model with the same weights and GPT-2's own activation."""
    config = GPT2Config(
        vocab_size=K,
        n_positions=T,
        n_embd=C,
        n_layer=3,
        n_head=4,
        activation_function="gelu_new",
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).eval()
    model.transformer.load_state_dict(gpt.transformer.state_dict())
    model.lm_head.weight = torch.nn.Parameter(gpt.head.weight.detach().clone())
    return model


def embeddings(batch_size: int) -> Tensor:
    return F.normalize(torch.randn(batch_size, E), dim=-1)


def condition_token(gpt: ConditionalGPT2, e: Tensor) -> Tensor:
    """Compute the condition token (B, 1, C) by hand: a linear projection of the embedding at unit variance."""
    return (E**0.5 * e @ gpt.clip_proj.weight.T + gpt.clip_proj.bias)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_teacher_forced_logits_match_gpt2(tie_embeddings):
    gpt = network(tie_embeddings=tie_embeddings)
    reference = reference_model(gpt)
    e = embeddings(3)
    indices = torch.randint(K, (3, T))
    tokens = torch.cat([condition_token(gpt, e), reference.transformer.wte(indices)], dim=1)[:, :T]
    logits = gpt(indices, e)
    assert logits.shape == (3, T, K)
    torch.testing.assert_close(logits, reference(inputs_embeds=tokens).logits, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_greedy_decoding_matches_gpt2():
    gpt = network(tie_embeddings=False)
    e = embeddings(32)
    # Otherwise most samples would repeat one index, and the same one.
    gpt.transformer.wpe.weight.normal_(std=1)
    gpt.clip_proj.weight.normal_(std=4)
    expected = reference_model(gpt).generate(
        inputs_embeds=condition_token(gpt, e),
        attention_mask=torch.ones(32, 1, dtype=torch.long),
        do_sample=False,
        min_new_tokens=T,
        max_new_tokens=T,
        pad_token_id=0,
    )
    logits_fn = IncrementalDecoder(gpt, 32).start(gpt.condition_tokens(e))
    previous = None
    indices = []
    for position in range(T):
        previous = logits_fn(position, previous).argmax(-1)
        indices.append(previous)
    assert torch.equal(torch.stack(indices, dim=1), expected)
    assert len(expected.unique(dim=0)) > 2 and len(expected.unique()) > 5  # samples and positions differ


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
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_uses_no_mask(monkeypatch, compiled):
    """FlashAttention supports no mask, and transformers would build one under torch.compile."""
    calls = []
    attend = F.scaled_dot_product_attention

    def record(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    gpt = network()
    (torch.compile(gpt, backend="eager") if compiled else gpt)(torch.zeros(2, T, dtype=torch.int64), embeddings(2))
    assert calls == [(None, True)] * 3


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


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("kernel", [cpu_kernels.addmm_linear, cpu_kernels.split_linear, cpu_kernels.prepacked_linear])
def test_all_kernels_compute_the_product(kernel, batch_size):
    if kernel is cpu_kernels.prepacked_linear and not cpu_kernels.has_prepacked_kernels():
        pytest.skip("this build of torch has no prepacked oneDNN kernels")
    weight, bias = torch.randn(32, 48), torch.randn(48)
    x = torch.randn(batch_size, 32)
    expected = (x.double() @ weight.double() + bias.double()).float()
    torch.testing.assert_close(kernel(weight, bias)(x), expected, atol=1e-5, rtol=1e-5)
    for name in ("gelu_pytorch_tanh", "gelu", "gelu_new", "relu"):
        activation = ACT2FN[name]
        y = kernel(weight, bias, activation)(x)
        torch.testing.assert_close(y, activation(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "inputs", "outputs", "avx2", "avx512"),
    [
        (1, 128, 512, cpu_kernels.addmm_linear, cpu_kernels.addmm_linear),
        (1, 512, 2048, cpu_kernels.split_linear, cpu_kernels.split_linear),
        (1, 512, 2049, cpu_kernels.prepacked_linear, cpu_kernels.prepacked_linear),
        (1, 2048, 512, cpu_kernels.prepacked_linear, cpu_kernels.split_linear),
        (3, 128, 512, cpu_kernels.prepacked_linear, cpu_kernels.prepacked_linear),
    ],
)
def test_usual_kernels_follow_from_shape_and_instruction_set(monkeypatch, batch_size, inputs, outputs, avx2, avx512):
    monkeypatch.setattr(cpu_kernels, "has_prepacked_kernels", lambda: True)
    for name, expected in (("AVX2", avx2), ("AVX512", avx512)):
        monkeypatch.setattr(cpu_kernels, "instruction_set", lambda name=name: name)
        assert cpu_kernels.usual_cpu_kernel(batch_size, inputs, outputs) is expected


@pytest.fixture
def kernel_cache(monkeypatch, tmp_path) -> Path:
    """Let measured kernels be kept in a new folder."""
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    cpu_kernels.measured_kernel.cache_clear()
    yield tmp_path / "cache"
    cpu_kernels.measured_kernel.cache_clear()


def test_fastest_kernel_is_measured_once_and_kept(monkeypatch, kernel_cache):
    """The next process takes the choice of the first, whatever it would measure, so that samples stay the same."""
    answers = ["addmm_linear", "prepacked_linear"]
    monkeypatch.setattr(cpu_kernels, "fastest_kernel", lambda *_: answers.pop(0))
    for _ in range(2):
        assert cpu_kernels.choose_cpu_kernel(1, 512, 2048) is cpu_kernels.addmm_linear
        cpu_kernels.measured_kernel.cache_clear()  # as in another process
    assert answers == ["prepacked_linear"]
    (key,) = json.loads((kernel_cache / "kernels.json").read_text())
    assert "product 1 x 512 x 2048" in key and torch.__version__ in key
    for batch_size, inputs, outputs in ((3, 512, 2048), (1, 128, 512)):  # one kernel is known to be the best
        cpu_kernels.choose_cpu_kernel(batch_size, inputs, outputs)
    assert answers == ["prepacked_linear"]


def test_choices_of_another_process_are_not_overwritten(kernel_cache):
    def measure() -> str:
        assert measured_choice("product", lambda: "first") == "first"
        return "second"

    assert measured_choice("product", measure) == "first"


@pytest.mark.parametrize("content", ["{", None], ids=["damaged", "not writable"])
def test_kernels_are_not_measured_if_the_choice_cannot_be_kept(monkeypatch, kernel_cache, content):
    if content is None:
        kernel_cache.write_text("not a folder")
    else:
        kernel_cache.mkdir()
        (kernel_cache / "kernels.json").write_text(content)
    monkeypatch.setattr(cpu_kernels, "fastest_kernel", lambda *_: pytest.fail("measured"))
    assert cpu_kernels.choose_cpu_kernel(1, 512, 2048) is cpu_kernels.usual_cpu_kernel(1, 512, 2048)


@pytest.mark.parametrize(("advantage", "expected"), [(0.97, "usual"), (0.9, "other")])
def test_small_advantages_do_not_outweigh_the_usual_kernel(monkeypatch, advantage, expected):
    """They are within the noise of the measurement."""
    clock = [0.0]

    def kernel(seconds: float):
        def run(x):
            clock[0] += seconds

        return lambda weight, bias: run

    monkeypatch.setattr(cpu_kernels.time, "perf_counter", lambda: clock[0])
    kernels = {"usual": kernel(1.0), "other": kernel(advantage)}
    assert cpu_kernels.fastest_kernel(kernels, "usual", 1, 8, 8) == expected


class WrongOperators:
    """Operators whose product omits the bias."""

    _reorder_linear_weight = staticmethod(lambda weight, batch_size: weight)
    _linear_pointwise = staticmethod(lambda x, packed, *_: x @ packed.T)


@torch.no_grad()
@pytest.mark.parametrize("operators", [object(), WrongOperators()], ids=["none", "wrong"])
def test_missing_or_wrong_onednn_operators_are_not_used(monkeypatch, operators):
    """The operators are private, and may differ on other processors and in later versions of torch."""
    cpu_kernels.has_prepacked_kernels.cache_clear()
    monkeypatch.setattr(cpu_kernels, "onednn", operators)
    try:
        weight, bias, x = torch.randn(32, 48), torch.randn(48), torch.randn(5, 32)
        assert cpu_kernels.choose_cpu_kernel(5, 32, 48) is cpu_kernels.addmm_linear
        assert torch.equal(IncrementalDecoder.make_linear(weight, bias, 5)(x), torch.addmm(bias, x, weight))
    finally:
        cpu_kernels.has_prepacked_kernels.cache_clear()


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


@torch.no_grad()
def test_logits_depend_only_on_previous_indices():
    gpt = network()
    e = embeddings(2)
    indices = torch.randint(K, (2, T))
    before = gpt(indices, e)
    for t in range(T - 1):
        other = indices.clone()
        other[:, t] = (other[:, t] + 1) % K
        after = gpt(other, e)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-5, rtol=1e-5)
        assert ((after - before)[:, t + 1 :].abs().amax(-1) > 1e-3).all()  # all later logits change


@torch.no_grad()
def test_condition_affects_all_positions():
    gpt = network()
    indices = torch.randint(K, (2, T))
    assert ((gpt(indices, embeddings(2)) - gpt(indices, embeddings(2))).abs().amax(-1) > 1e-3).all()


def count_parameters(gpt: ConditionalGPT2) -> int:
    return sum(p.numel() for p in gpt.parameters())


def test_tied_head_is_the_token_embedding():
    assert count_parameters(network(tie_embeddings=False)) - count_parameters(network()) == K * C
    gpt = network()
    assert gpt.head.weight is gpt.transformer.wte.weight


@torch.no_grad()
def test_null_condition_replaces_only_dropped_embeddings():
    gpt = network(null_condition=True)
    indices = torch.randint(K, (1, T)).repeat(3, 1)
    a, b = embeddings(3), embeddings(3)
    drop = torch.tensor([True, False, True])
    first, second = gpt(indices, a, drop), gpt(indices, b, drop)
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and torch.allclose(first[0], first[2], atol=1e-5)
    torch.testing.assert_close(first[1], gpt(indices, a)[1])
    with pytest.raises(ValueError, match=r"no null condition: train it with model\.conditioning.drop_prob > 0"):
        network().condition_tokens(a, drop)


@torch.no_grad()
def test_sincos_2d_positions_encode_row_and_column():
    sizes = dict(n_layer=1, n_head=2, codebook_size=K, clip_dim=E, pos_embed_init="sincos_2d")
    gpt = ConditionalGPT2(GPTConfig(**sizes, num_tokens=16, n_embd=32))
    positions = gpt.transformer.wpe.weight
    position = torch.arange(16)
    distance = torch.cdist(positions, positions) + 9 * torch.eye(16)
    assert distance.min() > 0.05  # all different
    for half, axis in ((positions[:, :16], position // 4), (positions[:, 16:], position % 4)):
        assert torch.equal(torch.cdist(half, half) < 1e-6, axis[:, None] == axis)
    assert gpt.transformer.wpe.weight.requires_grad
    for num_tokens, n_embd in ((12, 32), (16, 34)):
        with pytest.raises(ValueError, match=f"got {num_tokens} and {n_embd}"):
            ConditionalGPT2(GPTConfig(**sizes, num_tokens=num_tokens, n_embd=n_embd))


def test_dropout_applies_only_in_training():
    gpt = network(dropout=0.5)
    e = embeddings(2)
    indices = torch.randint(K, (2, T))
    assert torch.equal(gpt(indices, e), gpt(indices, e))
    gpt.train()
    assert not torch.equal(gpt(indices, e), gpt(indices, e))


def test_mlp_dropout_applies_before_the_second_layer_in_training_only():
    gpt = network(mlp_dropout=0.5)
    mlp = gpt.transformer.h[0].mlp
    seen = []
    mlp.c_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(4, 8, C)
    mlp(x)
    mlp.train()(x)
    clean, dropped = seen
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6 and torch.allclose(dropped[kept], 2 * clean[kept])
    assert torch.allclose(network().eval().transformer.h[0].mlp.act(mlp.c_fc(x)), clean)


def test_condition_is_scaled_to_unit_variance_unless_disabled():
    embedding = F.normalize(torch.randn(2, E), dim=-1)
    scaled, plain = network(), network(scale_condition=False)
    plain.load_state_dict(scaled.state_dict())
    assert torch.allclose(scaled.condition_tokens(embedding), plain.condition_tokens(4 * embedding))  # sqrt(E) = 4
    assert torch.allclose(plain.condition_tokens(embedding), plain.clip_proj(embedding))


def test_torch_initialization_has_the_moments_of_hfailabs_modules():
    """Compared with torch.nn.TransformerEncoderLayer, torch.nn.Embedding and torch.nn.Linear themselves."""
    width = 64
    sizes = dict(n_layer=1, n_head=4, n_embd=width, codebook_size=400, num_tokens=T, clip_dim=E, tie_embeddings=False)
    gpt = ConditionalGPT2(GPTConfig(**sizes, lm_head_bias=True, weight_init="torch"))
    layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width)
    block = gpt.transformer.h[0]
    pairs = [
        (block.attn.c_attn, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias),
        (block.attn.c_proj, layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias),
        (block.mlp.c_fc, layer.linear1.weight, layer.linear1.bias),
        (block.mlp.c_proj, layer.linear2.weight, layer.linear2.bias),
        (gpt.clip_proj, *torch.nn.Linear(E, width).parameters()),
        (gpt.head, *torch.nn.Linear(width, 400).parameters()),
    ]
    for ours, weight, bias in pairs:
        assert ours.weight.std().item() == pytest.approx(weight.std().item(), rel=0.1)
        assert ours.weight.abs().max().item() == pytest.approx(weight.abs().max().item(), rel=0.1)
        assert ours.bias.abs().max().item() == pytest.approx(bias.abs().max().item(), rel=0.3)
    assert gpt.transformer.wte.weight.std().item() == pytest.approx(1, rel=0.1)
    assert not gpt.transformer.wpe.weight.any()


def test_n_embd_must_be_divisible_by_n_head():
    with pytest.raises(ValueError, match="n_embd must be divisible by n_head, got 32 and 5"):
        network(n_head=5)
