"""Captioners: how probable a sentence is, given an image. For CapS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.evaluation.features import import_function
from clipgen.files import one_line
from clipgen.images import to_bytes

BLIP = "Salesforce/blip-image-captioning-base"
Captioner = Callable[[Tensor, Sequence[str]], list[Tensor]]  # images, captions -> log p of each one's tokens, (L,)


def captioner(name: str) -> Captioner:
    """The captioner of a name.

    Args:
        name: ``"blip"``, or ``"blip:NAME_OR_FOLDER"`` of another BLIP of transformers; or ``"module:function"``, which
            takes images (B, 3, H, W) in [-1, 1] and B captions and returns the log probabilities of the tokens of each.

    Raises:
        ValueError: there is no such captioner, or its weights cannot be loaded.
    """
    kind, _, rest = name.partition(":")
    try:
        return Blip(rest or BLIP) if kind == "blip" else import_function(kind, rest)
    except Exception as error:  # no network, no such folder or module: the way out is the same
        raise ValueError(
            f"captioner {name!r} cannot be loaded ({one_line(error)}): go online once, or name a folder "
            "(blip:FOLDER) or module:function"
        ) from error


class Blip:
    """BLIP (arXiv:2201.12086) as a language model under an image.

    Special tokens are no words and do not count; a word that it does not know counts as ``[UNK]``. A caption is cut to
    the positions that the model has.
    """

    def __init__(self, name: str):
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.model: Any = BlipForConditionalGeneration.from_pretrained(name).eval().requires_grad_(False)
        self.processor: Any = BlipProcessor.from_pretrained(name)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> list[Tensor]:
        self.model.to(images.device)
        pixels = list(to_bytes(images).cpu())
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            images=pixels, text=list(captions), return_tensors="pt", padding=True, truncation=True, max_length=longest
        )
        inputs = inputs.to(images.device)
        ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
        ids[:, 0] = self.model.config.text_config.bos_token_id  # BLIP's decoder starts with a token of its own
        logits = self.model(pixel_values=inputs["pixel_values"], input_ids=ids, attention_mask=mask).logits
        log_p = F.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        tokenizer = self.processor.tokenizer
        special = torch.tensor(sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}), device=ids.device)
        words = ~torch.isin(ids[:, 1:], special)
        return [row[keep] for row, keep in zip(log_p, words)]
