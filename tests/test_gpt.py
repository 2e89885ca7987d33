"""The network and its cached decoder against transformers' own GPT-2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from clipgen.models import kv_cache
from clipgen.models.config import GPTConfig
from clipgen.models.gpt import ConditionalGPT2
from clipgen.models.kv_cache import CompiledDecoder, IncrementalDecoder

K, T, E, C = 50, 12, 16, 32


def network(**arguments) -> ConditionalGPT2:
    """With weights so large that logits differ clearly."""
    sizes = dict(n_layer=3, n_head=4, n_embd=C, codebook_size=K, num_tokens=T, clip_dim=E)
    null_condition = arguments.pop("null_condition", False)
    gpt = ConditionalGPT2(GPTConfig(**(sizes | arguments)), null_condition).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return gpt


def published(gpt: ConditionalGPT2) -> GPT2LMHeadModel:
    """transformers' language model with the same weights and GPT-2's own activation."""
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


def embeddings(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, E), dim=-1)


def first_token(gpt: ConditionalGPT2, e: Tensor) -> Tensor:
    """What Eq. 6 puts first, by hand: a linear map of the embedding at unit variance; (B, 1, C)."""
    return (E**0.5 * e @ gpt.clip_proj.weight.T + gpt.clip_proj.bias)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_teacher_forced_logits_are_gpt2s(tie_embeddings):
    gpt, e, indices = network(tie_embeddings=tie_embeddings), embeddings(3), torch.randint(K, (3, T))
    theirs = published(gpt)
    tokens = torch.cat([first_token(gpt, e), theirs.transformer.wte(indices)], dim=1)[:, :T]
    logits = gpt(indices, e)
    assert logits.shape == (3, T, K)
    torch.testing.assert_close(logits, theirs(inputs_embeds=tokens).logits, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_greedy_decoding_is_gpt2s_index_for_index():
    gpt, e = network(tie_embeddings=False), embeddings(32)
    gpt.transformer.wpe.weight.normal_(std=1)  # else most rows say one word again and again,
    gpt.clip_proj.weight.normal_(std=4)  # and the same one
    expected = published(gpt).generate(
        inputs_embeds=first_token(gpt, e),
        attention_mask=torch.ones(32, 1, dtype=torch.long),
        do_sample=False,
        min_new_tokens=T,
        max_new_tokens=T,
        pad_token_id=0,
    )
    step, previous, drawn = IncrementalDecoder(gpt, 32).start(gpt.condition(e)), None, []
    for position in range(T):
        previous = step(position, previous).argmax(-1)
        drawn.append(previous)
    assert torch.equal(torch.stack(drawn, dim=1), expected)
    assert len(expected.unique(dim=0)) > 2 and len(expected.unique()) > 5  # rows and positions do differ


@torch.no_grad()
def test_the_cache_changes_nothing():
    gpt, e, indices = network(), embeddings(4), torch.randint(K, (4, T))
    step = IncrementalDecoder(gpt, 4).start(gpt.condition(e))
    logits = [step(t, None if t == 0 else indices[:, t - 1]) for t in range(T)]
    torch.testing.assert_close(torch.stack(logits, dim=1), gpt(indices, e), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_nor_does_compiling():
    gpt = network()
    decoder = CompiledDecoder(gpt, 4)
    for rows in (4, 3):  # the second run starts over another one's cache, with a row to fill up
        e, indices = embeddings(rows), torch.randint(K, (rows, T))
        step = decoder.start(gpt.condition(e))
        logits = [step(t, None if t == 0 else indices[:, t - 1]) for t in range(T)]
        torch.testing.assert_close(torch.stack(logits, dim=1), gpt(indices, e), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_any_number_of_row_counts_compiles(monkeypatch):
    """Dynamo counts the programs of all decoders together, and gives up at eight."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    gpt = network()
    for rows in range(1, 11):
        step = CompiledDecoder(gpt, rows).start(gpt.condition(embeddings(rows)))
        assert step(0, None).shape == (rows, K)


@torch.no_grad()
def test_one_program_serves_all_positions_and_copies_no_cache(monkeypatch):
    """Which a write into a slice of a larger tensor would: functionalized, that is a select_scatter."""
    from torch._dynamo.backends.common import aot_autograd

    programs, compile = [], torch.compile
    watch = lambda program, inputs: programs.append({str(node.target) for node in program.graph.nodes}) or program
    backend = aot_autograd(fw_compiler=watch, inference_compiler=watch)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    step = CompiledDecoder(gpt := network(tie_embeddings=False), 4).start(gpt.condition(embeddings(3)))
    for position in (0, 3):
        assert step(position, None).shape == (3, K)
    assert len(programs) == 1 and not [name for name in programs[0] if "scatter" in name]


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_is_given_no_mask(monkeypatch, compiled):
    """Flash attention takes none, and transformers would make one under torch.compile."""
    calls, attend = [], F.scaled_dot_product_attention
    record = lambda *a, attn_mask=None, is_causal=False, **k: (
        calls.append((attn_mask, is_causal)),
        attend(*a, attn_mask=attn_mask, is_causal=is_causal, **k),
    )[1]
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    gpt = network()
    (torch.compile(gpt, backend="eager") if compiled else gpt)(torch.zeros(2, T, dtype=torch.int64), embeddings(2))
    assert calls == [(None, True)] * 3


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("outputs", "bias"), [(48, True), (48, False), (33, True)])
def test_products_of_few_rows(rows, outputs, bias):
    weight, offset, x = torch.randn(32, outputs), torch.randn(outputs) if bias else None, torch.randn(rows, 32)
    expected = (x.double() @ weight.double() + (offset.double() if bias else 0)).float()
    for laid_out in (weight, weight.T.contiguous().T):  # the tied head is a transposed one
        for decoder in (IncrementalDecoder, CompiledDecoder):
            found = decoder.make_linear(laid_out, offset, rows)(x)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    half = IncrementalDecoder.make_linear(weight.bfloat16(), offset.bfloat16() if bias else None, rows)(x.bfloat16())
    torch.testing.assert_close(half.float(), expected, atol=0.3, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("kernel", [kv_cache.addmm_linear, kv_cache.split_linear, kv_cache.prepacked_linear])
def test_all_kernels_compute_the_product(kernel, rows):
    if kernel is kv_cache.prepacked_linear and not kv_cache.has_prepacked_kernels():
        pytest.skip("this build of torch has no prepacked oneDNN kernels")
    weight, bias, x = torch.randn(32, 48), torch.randn(48), torch.randn(rows, 32)
    expected = (x.double() @ weight.double() + bias.double()).float()
    torch.testing.assert_close(kernel(weight, bias, rows)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "avx2", "avx512"),
    [
        (1, 128, 512, kv_cache.addmm_linear, kv_cache.addmm_linear),
        (1, 512, 2048, kv_cache.split_linear, kv_cache.split_linear),
        (1, 512, 2049, kv_cache.prepacked_linear, kv_cache.prepacked_linear),
        (1, 2048, 512, kv_cache.prepacked_linear, kv_cache.split_linear),
        (3, 128, 512, kv_cache.prepacked_linear, kv_cache.prepacked_linear),
    ],
)
def test_kernels_follow_from_shape_and_instruction_set(monkeypatch, rows, inputs, outputs, avx2, avx512):
    monkeypatch.setattr(kv_cache, "has_prepacked_kernels", lambda: True)
    for name, expected in (("AVX2", avx2), ("AVX512", avx512)):
        monkeypatch.setattr(kv_cache, "instruction_set", lambda name=name: name)
        assert kv_cache.choose_cpu_kernel(rows, inputs, outputs) is expected


class WrongOperators:
    """A oneDNN whose product forgets the bias."""

    _reorder_linear_weight = staticmethod(lambda weight, rows: weight)
    _linear_pointwise = staticmethod(lambda x, packed, *_: x @ packed.T)


@torch.no_grad()
@pytest.mark.parametrize("operators", [object(), WrongOperators()], ids=["none", "wrong"])
def test_without_working_operators_the_product_is_the_plain_one(monkeypatch, operators):
    """As on builds of torch for other processors and systems, or later ones: the operators are private."""
    kv_cache.has_prepacked_kernels.cache_clear()
    monkeypatch.setattr(kv_cache, "onednn", operators)
    try:
        weight, bias, x = torch.randn(32, 48), torch.randn(48), torch.randn(5, 32)
        assert kv_cache.choose_cpu_kernel(5, 32, 48) is kv_cache.addmm_linear
        assert torch.equal(IncrementalDecoder.make_linear(weight, bias, 5)(x), torch.addmm(bias, x, weight))
    finally:
        kv_cache.has_prepacked_kernels.cache_clear()


@pytest.fixture
def eager_compile(monkeypatch):
    """Let torch.compile trace, guard and recompile, but generate no code."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))


@torch.no_grad()
def test_programs_of_many_rows_read_the_cache_in_buckets(monkeypatch, eager_compile):
    """And score as the loop that reads only what it has written."""
    monkeypatch.setattr(kv_cache, "BUCKET_SIZE", 5)
    gpt, lengths, attend = network(), [], F.scaled_dot_product_attention
    record = lambda q, k, v, **options: (lengths.append(k.shape[2]), attend(q, k, v, **options))[1]
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    for rows, expected in ((2, [12] * T), (kv_cache.MIN_BATCH_SIZE_FOR_BUCKETS, [5] * 5 + [10] * 5 + [12] * 2)):
        condition, indices = gpt.condition(embeddings(rows)), torch.randint(K, (rows, T))
        compiled, plain = CompiledDecoder(gpt, rows).start(condition), IncrementalDecoder(gpt, rows).start(condition)
        for position in range(T):
            previous = indices[:, position - 1] if position else None
            lengths.clear()
            scored = compiled(position, previous)
            assert lengths in ([], [expected[position]] * 3)  # none where the program is traced already
            torch.testing.assert_close(scored, plain(position, previous), atol=1e-4, rtol=1e-4)


def test_a_decoder_made_in_inference_mode_works_outside(eager_compile):
    gpt = network()
    with torch.inference_mode():
        decoder = CompiledDecoder(gpt, 2)
        first = decoder.start(gpt.condition(embeddings(2)))(0, None).clone()
    with torch.no_grad():
        second = decoder.start(gpt.condition(embeddings(2)))(0, None)
    assert first.shape == second.shape == (2, K)


@torch.no_grad()
def test_causality():
    gpt, e, indices = network(), embeddings(2), torch.randint(K, (2, T))
    before = gpt(indices, e)
    for t in range(T - 1):
        other = indices.clone()
        other[:, t] = (other[:, t] + 1) % K
        after = gpt(other, e)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-5, rtol=1e-5)
        assert ((after - before)[:, t + 1 :].abs().amax(-1) > 1e-3).all()  # and every later one does change


@torch.no_grad()
def test_the_condition_reaches_every_position():
    gpt, indices = network(), torch.randint(K, (2, T))
    assert ((gpt(indices, embeddings(2)) - gpt(indices, embeddings(2))).abs().amax(-1) > 1e-3).all()


def test_a_tied_head_is_one_matrix():
    count = lambda gpt: sum(p.numel() for p in gpt.parameters())
    assert count(network(tie_embeddings=False)) - count(network()) == K * C
    gpt = network()
    assert gpt.head.weight is gpt.transformer.wte.weight


@torch.no_grad()
def test_null_condition_forgets_the_embedding_and_leaves_other_rows_alone():
    gpt, indices = network(null_condition=True), torch.randint(K, (1, T)).repeat(3, 1)
    a, b, drop = embeddings(3), embeddings(3), torch.tensor([True, False, True])
    first, second = gpt(indices, a, drop), gpt(indices, b, drop)
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and torch.allclose(first[0], first[2], atol=1e-5)
    torch.testing.assert_close(first[1], gpt(indices, a)[1])
    with pytest.raises(ValueError, match="no null condition: train it with model.conditioning.drop_prob > 0"):
        network().condition(a, drop)


@torch.no_grad()
def test_grid_positions_tell_row_and_column():
    sizes = dict(n_layer=1, n_head=2, codebook_size=K, clip_dim=E, pos_embed_init="sincos_2d")
    gpt = ConditionalGPT2(GPTConfig(**sizes, num_tokens=16, n_embd=32))
    positions = gpt.transformer.wpe.weight
    place = torch.arange(16)
    distance = torch.cdist(positions, positions) + 9 * torch.eye(16)
    assert distance.min() > 0.05  # all different
    for half, axis in ((positions[:, :16], place // 4), (positions[:, 16:], place % 4)):
        assert torch.equal(torch.cdist(half, half) < 1e-6, axis[:, None] == axis)
    assert gpt.transformer.wpe.weight.requires_grad
    for num_tokens, n_embd in ((12, 32), (16, 34)):
        with pytest.raises(ValueError, match=f"got {num_tokens} and {n_embd}"):
            ConditionalGPT2(GPTConfig(**sizes, num_tokens=num_tokens, n_embd=n_embd))


def test_dropout_only_in_training():
    gpt, e, indices = network(dropout=0.5), embeddings(2), torch.randint(K, (2, T))
    assert torch.equal(gpt(indices, e), gpt(indices, e))
    gpt.train()
    assert not torch.equal(gpt(indices, e), gpt(indices, e))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd must be divisible by n_head, got 32 and 5"):
        network(n_head=5)
