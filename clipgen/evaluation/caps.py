"""CapS: the probability of a caption given an image, by a captioning model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.evaluation.features import import_function
from clipgen.images import to_bytes
from clipgen.storage.files import one_line

BLIP = "Salesforce/blip-image-captioning-base"
Captioner = Callable[[Tensor, Sequence[str]], list[Tensor]]  # images, captions -> log p of each caption's tokens, (L,)


def load_captioner(name: str) -> Captioner:
    """Load a captioner by name.

    Args:
        name: ``"blip"``, or ``"blip:NAME_OR_FOLDER"`` for another BLIP of transformers; or ``"module:function"``, which
            takes images (B, 3, H, W) in [-1, 1] and B captions and returns the log probabilities of the tokens of each.

    Raises:
        ValueError: the name is unknown, or the weights cannot be loaded.
    """
    prefix, _, rest = name.partition(":")
    try:
        return Blip(rest or BLIP) if prefix == "blip" else import_function(prefix, rest)
    # No network, no such folder, no such module: what to do is the same.
    except Exception as error:
        raise ValueError(
            f"captioner {name!r} cannot be loaded ({one_line(error)}): go online once, or name a folder "
            "(blip:FOLDER) or module:function"
        ) from error


class Blip:
    """BLIP (arXiv:2201.12086) as a language model that is conditioned on an image.

    Special tokens are excluded from the score; unknown words are scored as ``[UNK]``. Captions are truncated to the
    number of positions of the model.
    """

    def __init__(self, name: str):
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.model: Any = BlipForConditionalGeneration.from_pretrained(name).eval().requires_grad_(False)
        self.processor: Any = BlipProcessor.from_pretrained(name)
        tokenizer = self.processor.tokenizer
        self.special_ids = sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> list[Tensor]:
        """Return the log probabilities (L,) of the tokens of each caption given its image."""
        self.model.to(images.device)
        inputs = self.prepare(images, captions)
        ids = inputs["input_ids"].clone()
        # BLIP's decoder starts with a token of its own instead of the tokenizer's [CLS].
        ids[:, 0] = self.model.config.text_config.bos_token_id
        logits = self.model(
            pixel_values=inputs["pixel_values"], input_ids=ids, attention_mask=inputs["attention_mask"]
        ).logits
        targets = ids[:, 1:]
        log_p = F.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, targets[..., None])[..., 0]
        is_word = ~torch.isin(targets, torch.tensor(self.special_ids, device=ids.device))
        return [caption_log_p[mask] for caption_log_p, mask in zip(log_p, is_word)]

    def prepare(self, images: Tensor, captions: Sequence[str]) -> Any:
        """Return the model's inputs: normalized pixels, token ids (B, L) and attention mask (B, L)."""
        return self.processor(
            images=list(to_bytes(images).cpu()),
            text=list(captions),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(images.device)
