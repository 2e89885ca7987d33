"""What a GPU would mind, seen without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.models import losses
from clipgen.models.conditioning import add_condition_noise
from clipgen.pipeline import TextToImage
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

# ------------------------------------------------------------------------------------------- waiting for the device


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host must know before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        reads = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique")
        self.count += any(name in str(operation) for name in reads)
        return operation(*arguments, **(named or {}))


@pytest.fixture
def gan() -> VQGAN:
    """With all that a step may have to do."""
    more = dict(
        gan_weight=0.8,
        gan_start_step=1,
        lecam_weight=0.1,
        ema_decay=0.9,
        kmeans_iters=2,
        codebook_ema_decay=0.9,
        grad_clip=1.0,
        schedule="cosine",
    )
    return make_vqgan(**VQGAN_SIZES | more)


@pytest.fixture
def transformer(tiny_vqgan, shapes_clip) -> ConditionalTransformer:
    more = dict(ema_decay=0.9, cond_noise_cosine=0.9, clip_loss_weight=0.2, schedule="cosine", dropout=0.1)
    return make_transformer(**TRANSFORMER_SIZES | more).attach_encoders(tiny_vqgan, shapes_clip)


@pytest.mark.parametrize("stage", ["gan", "transformer"])
def test_a_training_step_waits_for_nothing(request, fit, stage):
    """It only asks for work, so that a GPU always has some."""
    counts = []
    for steps in (1, 4, 8):  # what waits once is made in the first
        with Waits() as waits:
            fit(copy.deepcopy(request.getfixturevalue(stage)), steps)
        counts.append(waits.count)
    assert counts[1] == counts[2]


# ----------------------------------------------------------------------------------------------- on one device alone


@pytest.fixture
def gpu():
    """Tensors that have shapes and devices, and no values: whose value is needed on the way, or whose device is
    another one's, raises."""
    if torch.version.cuda is None or torch.__version__ < (2, 15):
        pytest.skip("a GPU can be pretended by torch 2.15 or later, built for CUDA")
    with FakeTensorMode():
        yield torch.device("cuda:0")


def moved(module: nn.Module) -> nn.Module:
    """A copy whose tensors are on the pretended GPU."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        memo[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
    found = copy.deepcopy(module, memo)
    for part in found.modules():
        if hasattr(part, "_device"):
            part._device = torch.device("cuda:0")
    return found


def test_drawing_stays_on_the_gpu(pipe, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    pipe.transformer._encoders = None
    there = TextToImage(moved(pipe.vqgan), moved(pipe.transformer), moved(pipe.clip))
    there.projector = moved(EmbeddingProjector(shift=torch.zeros(64), memory=torch.zeros(5, 64)))
    e = there.embed("a small red star on a black background")
    given = there.vqgan.encode(torch.empty(1, 3, 32, 32, device=gpu)).flatten(1)[:, :8]
    for settings in ({}, dict(guidance_scale=2.0, guidance_power=1.0, top_p=0.9), dict(temperature=0.0, prefix=given)):
        drawn = there.generate(e.expand(3, -1), 0, **settings)
        assert drawn.shape == (3, 3, 32, 32) and drawn.device == gpu


def test_losses_stay_on_the_gpu(transformer, gan, gpu):
    (vqgan, clip), transformer._encoders = transformer.encoders(), None
    there, gan = moved(transformer).attach_encoders(moved(vqgan), moved(clip)), moved(gan).train()
    images = torch.empty(2, 3, 32, 32, device=gpu)
    indices, e = there.encode(images)
    loss, logits = there.gpt(indices, add_condition_noise(e, 0.9), torch.zeros(2, dtype=torch.bool, device=gpu), True)
    quantizer = gan.autoencoder.quantize
    quantizer.kmeans_init_(quantizer.as_vectors(gan.encode_latents(images)))
    reconstruction, quantized = gan.autoencode(images)
    terms = gan.autoencoder_loss(images, reconstruction, quantized)
    both = gan.discriminator(images), gan.discriminator(reconstruction)
    found = [
        loss,
        there.clip_loss(logits, e),
        *terms.values(),
        gan.lecam(*both),
        losses.discriminator_loss(*both, "hinge"),
    ]
    assert {loss.device for loss in found} == {gpu}
    for part, average in ((there.gpt, there.ema), (gan.autoencoder, gan.ema)):
        average.begun = True  # else it looks whether it has
        average.update_parameters(part)
