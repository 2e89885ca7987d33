"""The network, compared with transformers' own GPT-2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpt_networks import C, E, K, T, embeddings, network
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from clipgen.models.config import GPTConfig
from clipgen.models.gpt import ConditionalGPT2
from clipgen.models.kv_cache import IncrementalDecoder


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
