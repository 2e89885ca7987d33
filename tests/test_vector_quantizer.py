"""Vector quantization: nearest neighbors, gradients, codebook updates, k-means and dead codes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from clipgen.models.quantizers import VectorQuantizer
from clipgen.models.quantizers.base import usage_and_perplexity
from clipgen.models.quantizers.vector import nearest_rows

BOTH_DISTANCES = pytest.mark.parametrize("distance", ["euclidean", "cosine"])


def quantizer(distance: str = "euclidean", codes: int = 32, dim: int = 8, **arguments) -> VectorQuantizer:
    """Return a quantizer with normally distributed codes; a new codebook lies in a tiny cube around zero."""
    module = VectorQuantizer(codes, dim, distance, **arguments)
    torch.nn.init.normal_(module.embedding.weight)
    return module


@BOTH_DISTANCES
def test_codes_and_indices_round_trip(distance):
    module = quantizer(distance)
    z_q, indices, _ = module(torch.randn(2, 8, 4, 6))
    assert indices.shape == (2, 4, 6) and indices.dtype == torch.int64
    assert module.indices_to_codes(indices).shape == (2, 8, 4, 6)
    torch.testing.assert_close(z_q, module.indices_to_codes(indices), atol=1e-6, rtol=0)
    assert torch.equal(module(module.indices_to_codes(indices)).indices, indices)


@BOTH_DISTANCES
def test_indices_are_the_nearest_codes(distance):
    module = quantizer(distance)
    z = 3 * torch.randn(500, 8)
    codes, latents = module.embedding.weight.detach().double(), z.double()
    if distance == "cosine":
        expected = F.cosine_similarity(latents[:, None], codes[None], dim=-1).argmax(1)
    else:
        expected = (latents[:, None] - codes[None]).square().sum(-1).argmin(1)
    assert torch.equal(module(z[:, :, None, None]).indices.flatten(), expected)
    assert len(expected.unique()) > 10


def test_gradient_passes_straight_through():
    module = quantizer()
    weight = torch.randn(2, 8, 3, 3)
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    (module(z).z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert module.embedding.weight.grad is None  # codes are trained by the codebook loss only


def test_cosine_codes_have_length_sqrt_d_and_the_gradient_of_the_projection():
    module = quantizer("cosine")
    weight = torch.randn(2, 8, 3, 3)
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    z_q = module(z).z_q
    torch.testing.assert_close(z_q.norm(dim=1), torch.full((2, 3, 3), 8**0.5))
    (z_q * weight).sum().backward()
    free = z.detach().clone().requires_grad_()
    (free / free.square().sum(1, keepdim=True).sqrt() * 8**0.5 * weight).sum().backward()
    torch.testing.assert_close(z.grad, free.grad)
    assert torch.equal(module(5 * z).indices, module(z).indices)


def test_losses_and_their_gradients_by_hand():
    module = VectorQuantizer(2, 2)
    module.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    z = torch.tensor([[0.0, 1.0], [2.0, 2.0]]).T.reshape(1, 2, 1, 2).requires_grad_()  # nearest: code 0, code 1
    _, indices, losses = module(z)
    assert indices.flatten().tolist() == [0, 1]
    assert losses["codebook_loss"].item() == losses["commitment_loss"].item() == (0 + 1 + 1 + 1) / 4
    losses["commitment_loss"].backward(retain_graph=True)
    assert z.grad is not None and module.embedding.weight.grad is None
    z.grad = None
    losses["codebook_loss"].backward()
    assert z.grad is None
    # d/de mean((e - z)^2) = 2 (e - z) / 4
    torch.testing.assert_close(module.embedding.weight.grad, torch.tensor([[0.0, -0.5], [-0.5, 0.5]]))


def test_quantization_is_fp32_under_autocast():
    module = quantizer(codes=256)
    z = torch.randn(4, 8, 16, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(z)
    outside = module(z.float())
    assert inside.z_q.dtype == inside.losses["codebook_loss"].dtype == torch.float32
    assert torch.equal(inside.indices, outside.indices) and torch.equal(inside.z_q, outside.z_q)


def usage_after_training(dead_code_reset_after: int) -> float:
    """Train a codebook on 64 clusters far from its initial codes; return the fraction of codes in use."""
    clusters = 4 + torch.randn(64, 4)
    module = VectorQuantizer(64, 4, dead_code_reset_after=dead_code_reset_after)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        z = clusters[torch.randint(64, (256,))] + 0.01 * torch.randn(256, 4)
        optimizer.zero_grad()
        module(z[:, :, None, None]).losses["codebook_loss"].backward()
        optimizer.step()
    indices = module.eval()(clusters[:, :, None, None]).indices
    return usage_and_perplexity(torch.bincount(indices.flatten(), minlength=64))[0].item()


def test_resets_bring_dead_codes_into_use():
    assert usage_after_training(dead_code_reset_after=0) < 0.2
    assert usage_after_training(dead_code_reset_after=3) > 0.7


def test_only_codes_unused_for_n_batches_are_reset():
    module = quantizer(codes=4, dim=2, dead_code_reset_after=3)
    module.embedding.weight.data = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    module.batches_since_use.zero_()
    near = lambda *codes: module.embedding.weight.data[list(codes)].reshape(-1, 2, 1, 1) + 0.1
    reset_codes = []
    for chosen in ([0, 1, 2], [0, 1], [0, 1], [0, 1, 2]):
        before = module.embedding.weight.data.clone()
        z = near(*chosen)
        module(z)
        moved = (module.embedding.weight.data != before).any(1)
        reset_codes.append(moved.nonzero().flatten().tolist())
        for code in module.embedding.weight.data[moved]:
            assert any(torch.equal(code, latent) for latent in z.flatten(1))  # to a latent of this batch
    # Code 3 is unused for three batches. Code 2, used in the first and last batch, is not.
    assert reset_codes == [[], [], [3], []]


def test_first_training_batch_initializes_the_codebook():
    module = VectorQuantizer(16, 4, dead_code_reset_after=50).eval()
    z = 10 + torch.randn(64, 4, 1, 1)
    before = module.embedding.weight.detach().clone()
    module(z)
    assert torch.equal(module.embedding.weight, before)
    module.train()(z)
    assert (module.embedding.weight.norm(dim=1) > 5).sum() >= 15  # all but the one that was in use


def test_ema_update_by_hand():
    """Codes move by a tenth of the way to the mean of their latents; unused codes stay."""
    module = VectorQuantizer(3, 2, codebook_ema_decay=0.9)
    module.embedding.weight.data = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 99.0]])
    z = torch.tensor([[1.0, 1.0], [3.0, 1.0], [10.0, 2.0]]).view(3, 2, 1, 1).requires_grad_()
    z_q, indices, losses = module(z)
    assert indices.flatten().tolist() == [0, 0, 1]
    torch.testing.assert_close(z_q.flatten(1), torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 0.0]]))  # before the update
    after = torch.tensor([[0.2, 0.1], [10.0, 0.2], [0.0, 99.0]])
    torch.testing.assert_close(module.embedding.weight.data, after)
    assert set(losses) == {"commitment_loss"}  # the codebook loss would have no effect
    losses["commitment_loss"].backward()
    assert z.grad is not None and not any(p.requires_grad for p in module.parameters())
    module.eval()(z)
    torch.testing.assert_close(module.embedding.weight.data, after)


def test_kmeans_places_codes_at_the_clusters():
    clusters = torch.tensor([[5.0, 5.0], [-5.0, 5.0], [0.0, -8.0], [9.0, 0.0]])
    z = clusters.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2)
    module = VectorQuantizer(8, 2, kmeans_iters=10, dead_code_reset_after=50)
    module.kmeans_init_(z)
    assert (torch.cdist(clusters, module.codebook).min(dim=1).values < 0.2).all()
    before = module.codebook.clone()
    module(z[:, :, None, None])
    assert torch.equal(module.codebook, before)  # the first batch does not initialize them again


def test_kmeans_starts_from_distinct_latents():
    module = VectorQuantizer(16, 2, kmeans_iters=0)
    latents = torch.randn(16, 2)
    module.kmeans_init_(latents)
    assert {tuple(code) for code in module.codebook.tolist()} == {tuple(latent) for latent in latents.tolist()}


def test_kmeans_computes_distances_in_chunks(monkeypatch):
    vectors, centers = torch.randn(50, 3), torch.randn(7, 3)
    expected = nearest_rows(vectors, centers)
    monkeypatch.setattr("clipgen.models.quantizers.vector.MAX_DISTANCES", 21)
    assert torch.equal(nearest_rows(vectors, centers), expected)


def test_kmeans_ignores_non_finite_latents():
    module = VectorQuantizer(4, 2, kmeans_iters=2)
    latents = torch.randn(40, 2)
    latents[::3] = float("nan")
    module.kmeans_init_(latents)
    assert torch.isfinite(module.codebook).all()
    with pytest.raises(ValueError, match="finite latents in the first batch, got none"):
        module.kmeans_init_(latents[::3])


def train_rank(rank: int, folder: str) -> None:
    torch.manual_seed(0)  # the same codebook on both ranks
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = VectorQuantizer(16, 4, dead_code_reset_after=2, codebook_ema_decay=0.5, kmeans_iters=2)
    torch.manual_seed(rank)  # different data
    latents = 5 + torch.randn(8 + rank, 4)  # k-means uses 8 of each rank, 16 for 16 codes
    module.kmeans_init_(latents)
    assert sum(torch.cdist(latents[:8], module.codebook).amin(dim=1) < 1e-3) == 8
    for _ in range(4):
        module(5 + torch.randn(32, 4, 1, 1))
    torch.save(module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_codebook_is_identical_on_all_ranks(tmp_path):
    mp.spawn(train_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["embedding.weight"].norm(dim=1) > 5).all()
