"""CapS: BLIP against its formula, and captioners of users."""

from __future__ import annotations

import sys

import pytest
import torch
from feature_spaces import results_of
from torch import Tensor

from clipgen.evaluation import functional
from clipgen.evaluation.caps import load_captioner
from clipgen.evaluation.features import source_hash
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.sources import GeneratedImages
from clipgen.images import to_pil


def test_blip_matches_the_product_of_word_probabilities(tmp_path, images):
    """A tiny BLIP: the product of the words' probabilities, one forward pass a word, without special tokens."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
    from transformers import BlipProcessor as Processor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "star", "ring"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), vocab_file=str(tmp_path / "vocab.txt"))
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = BlipConfig(
        text_config=dict(
            **small,
            vocab_size=11,
            max_position_embeddings=12,
            encoder_hidden_size=16,
            bos_token_id=5,
            sep_token_id=3,
            pad_token_id=0,
            eos_token_id=3,
            is_decoder=True,
            initializer_range=0.5,
        ),
        vision_config=dict(**small, image_size=32, patch_size=16, initializer_range=0.5),
        projection_dim=8,
    )
    model = BlipForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "blip")
    size = {"height": 32, "width": 32}
    Processor(BlipImageProcessor(size=size), tokenizer).save_pretrained(tmp_path / "blip")
    ours = load_captioner(f"blip:{tmp_path / 'blip'}")(images[:2], ["a red star", "a blue"])
    pixels = BlipImageProcessor(size=size)(to_pil(images[:2]), return_tensors="pt")["pixel_values"]
    for row, (image, ids) in enumerate(zip(pixels, ([6, 7, 9], [6, 8]))):
        product, before = 1.0, [5]
        for word in ids:
            with torch.no_grad():
                logits = model(pixel_values=image[None], input_ids=torch.tensor([before])).logits[0, -1]
            product *= logits.softmax(-1)[word].item()
            before.append(word)
        assert functional.caption_score(ours[row]) == pytest.approx(product ** (1 / len(ids)), rel=1e-4)
    blip = load_captioner(f"blip:{tmp_path / 'blip'}")
    known, unknown, long = blip(images[:1].repeat(3, 1, 1, 1), ["a red", "a zebra", "a " * 40])
    assert len(unknown) == 2 and known[0] == pytest.approx(unknown[0].item(), rel=1e-4) and len(long) == 12 - 2
    with pytest.raises(ValueError, match=r"a caption with a token, got none in '\\x00'"):
        ImageMetrics(captioner=blip)(images[:1], ["\x00"])
    other = load_captioner(f"blip:{tmp_path / 'blip'}")
    identities = [ImageMetrics(captioner=model, captioner_name="blip").identity() for model in (blip, other)]
    torch.nn.init.zeros_(next(other.model.parameters()))
    assert identities[0] == identities[1] != ImageMetrics(captioner=other, captioner_name="blip").identity()


def half_sure(images: Tensor, captions) -> list[Tensor]:
    """A captioner by hand: every word has probability 1 / 2, but "blue" 1 / 8."""
    return [torch.tensor([0.125 if word == "blue" else 0.5 for word in text.split()]).log() for text in captions]


def test_caption_score_of_a_set_is_the_mean(tmp_path, images):
    source = GeneratedImages(lambda captions, seeds: images[: len(seeds)], ["a red", "a blue"], 0, {})
    metrics = ImageMetrics(None, captioner=load_captioner(f"{__name__}:half_sure"))
    assert metrics.identity()["captioner_source"] == source_hash(half_sure) == source_hash(sys.modules[__name__])
    results = results_of(source, metrics, tmp_path)
    assert results == {"caps": pytest.approx((0.5 + 0.25) / 2)}
    with pytest.raises(ValueError, match=r"captioner 'blip:/nowhere' cannot be loaded .* go online once"):
        load_captioner("blip:/nowhere")
