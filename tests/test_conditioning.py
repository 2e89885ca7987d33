"""Conditions other than CLIP embeddings, by the Conditioner protocol."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import TRANSFORMER_SIZES, make_transformer
from torch import Tensor, nn

from clipgen.pipeline import TextToImage

COLORS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0)}


class MeanColor(nn.Module):
    """Embed an image by its mean color, and the name of a color by that color."""

    embed_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("colors", torch.tensor(list(COLORS.values())))

    @property
    def device(self) -> torch.device:
        return self.colors.device

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return F.normalize(self.colors[[list(COLORS).index(text) for text in texts]], dim=-1)


@pytest.fixture
def transformer(tiny_vqgan):
    return make_transformer(**TRANSFORMER_SIZES | {"clip_dim": 3}).attach_encoders(tiny_vqgan, MeanColor())


def test_transformer_trains_on_another_conditioner(transformer, fit):
    before = transformer.gpt.clip_proj.weight.detach().clone()
    fit(transformer, 2)
    assert not torch.equal(transformer.gpt.clip_proj.weight, before)


def test_pipeline_generates_with_another_conditioner(transformer, tiny_vqgan):
    pipe = TextToImage(tiny_vqgan, transformer, MeanColor())
    images = pipe(["red", "green"], num_images=2, rerank_from=3, seed=0)
    assert len(images) == 4 and images[0].size == (32, 32)
    assert images[0].info["prompt"] == "red"


def test_pipeline_with_another_conditioner_is_not_saved(transformer, tiny_vqgan, tmp_path):
    pipe = TextToImage(tiny_vqgan, transformer, MeanColor())
    with pytest.raises(TypeError, match="the conditioner must be a FrozenCLIP to be saved, got MeanColor"):
        pipe.save(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
