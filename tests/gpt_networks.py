"""A small network of stage 2, and conditions for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.models.config import GPTConfig
from clipgen.models.gpt import ConditionalGPT2

K, T, E, C = 50, 12, 16, 32


def network(**arguments) -> ConditionalGPT2:
    """Return a network with weights so large that its logits differ clearly."""
    sizes = dict(n_layer=3, n_head=4, n_embd=C, codebook_size=K, num_tokens=T, clip_dim=E)
    null_condition = arguments.pop("null_condition", False)
    gpt = ConditionalGPT2(GPTConfig(**(sizes | arguments)), null_condition).eval()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return gpt


def embeddings(batch_size: int) -> Tensor:
    return F.normalize(torch.randn(batch_size, E), dim=-1)
