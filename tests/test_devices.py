"""Synchronization and device placement on a GPU, tested without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.hardware import device
from clipgen.hardware.device import should_compile
from clipgen.models import losses
from clipgen.models.conditioning import add_condition_noise
from clipgen.pipeline import TextToImage
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

# ---------------------------------------------------------------------------------------------------- synchronization


class CountSynchronizations(TorchDispatchMode):
    """Count the operations whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        synchronizing = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique")
        self.count += any(name in str(operation) for name in synchronizing)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def gan() -> VQGAN:
    """Return a VQ-GAN with all features that a training step can have."""
    options = dict(
        gan_weight=0.8,
        gan_start_step=1,
        lecam_weight=0.1,
        ema_decay=0.9,
        kmeans_iters=2,
        codebook_ema_decay=0.9,
        grad_clip=1.0,
        schedule="cosine",
    )
    return make_vqgan(**VQGAN_SIZES | options)


@pytest.fixture
def transformer(tiny_vqgan, shapes_clip) -> ConditionalTransformer:
    options = dict(ema_decay=0.9, cond_noise_cosine=0.9, clip_loss_weight=0.2, schedule="cosine", dropout=0.1)
    return make_transformer(**TRANSFORMER_SIZES | options).attach_encoders(tiny_vqgan, shapes_clip)


@pytest.mark.parametrize("stage", ["gan", "transformer"])
def test_training_steps_do_not_synchronize(request, fit, stage):
    counts = []
    # Initializations may synchronize, so more steps must not have more synchronizations.
    for steps in (1, 4, 8):
        with CountSynchronizations() as synchronizations:
            fit(copy.deepcopy(request.getfixturevalue(stage)), steps)
        counts.append(synchronizations.count)
    assert counts[1] == counts[2]


def test_compile_auto_compiles_on_a_gpu_only(monkeypatch, fit):
    """On a CPU the first step would wait for minutes without a word."""
    for has_triton in (True, False):
        monkeypatch.setattr(device, "can_compile", lambda has_triton=has_triton: has_triton)
        assert should_compile("auto", torch.device("cuda", 0)) == has_triton
        assert should_compile(True, torch.device("cuda", 0)) and not should_compile("auto", torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    fit(make_vqgan(**VQGAN_SIZES, compile="auto"), 1)
    with pytest.raises(ValueError, match="compile must be true, false or auto, got 'yes'"):
        make_vqgan(**VQGAN_SIZES, compile="yes")


# --------------------------------------------------------------------------------------------------------- placement


@pytest.fixture
def gpu():
    """Return a simulated GPU, whose tensors have no values.

    Reading a value or combining tensors of different devices raises an error.
    """
    if torch.version.cuda is None or torch.__version__ < (2, 15):
        pytest.skip("simulating a GPU needs torch 2.15 or later, built for CUDA")
    with FakeTensorMode():
        yield torch.device("cuda:0")


def on_gpu(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose tensors are on the simulated GPU."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    module = copy.deepcopy(module, memo)
    for part in module.modules():
        if hasattr(part, "_device"):
            part._device = torch.device("cuda:0")
    return module


def test_generation_stays_on_the_gpu(pipe, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    pipe.transformer._encoders = None
    gpu_pipe = TextToImage(on_gpu(pipe.vqgan), on_gpu(pipe.transformer), on_gpu(pipe.clip))
    gpu_pipe.projector = on_gpu(EmbeddingProjector(shift=torch.zeros(64), memory=torch.zeros(5, 64)))
    e = gpu_pipe.embed("a small red star on a black background")
    image = Image.new("RGB", (32, 32))
    for settings in (
        {},
        dict(guidance_scale=2.0, guidance_power=1.0, top_p=0.9),
        dict(temperature=0.0, outpaint=image),
    ):
        images = gpu_pipe.generate(e.expand(3, -1), 0, **settings)
        assert images.shape == (3, 3, 32, 32) and images.device == gpu


def test_losses_stay_on_the_gpu(transformer, gan, gpu):
    vqgan, clip = transformer.encoders()
    transformer._encoders = None
    transformer = on_gpu(transformer).attach_encoders(on_gpu(vqgan), on_gpu(clip))
    gan = on_gpu(gan).train()
    images = torch.empty(2, 3, 32, 32, device=gpu)
    indices, e = transformer.encode_images(images)
    drop = torch.zeros(2, dtype=torch.bool, device=gpu)
    loss, logits = transformer.gpt(indices, add_condition_noise(e, 0.9), drop, with_loss=True)
    quantizer = gan.autoencoder.quantize
    quantizer.kmeans_init_(quantizer.as_vectors(gan.encode_latents(images)))
    reconstruction, quantized = gan.autoencode(images)
    terms = gan.autoencoder_loss(images, reconstruction, quantized)
    logits_real, logits_fake = gan.discriminator(images), gan.discriminator(reconstruction)
    all_losses = [
        loss,
        transformer.clip_loss(logits, e),
        *terms.values(),
        gan.lecam(logits_real, logits_fake),
        losses.discriminator_loss(logits_real, logits_fake, "hinge"),
    ]
    assert {value.device for value in all_losses} == {gpu}
    for network, ema in ((transformer.gpt, transformer.ema), (gan.autoencoder, gan.ema)):
        ema._initialized = True  # otherwise it reads its counter
        ema.update_parameters(network)
