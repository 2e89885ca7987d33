"""Type and description of each sampling parameter; the defaults are those of ``SamplingParams``."""

from __future__ import annotations

from typing import NamedTuple

DTYPES = ("float32", "bfloat16")


class SamplingOption(NamedTuple):
    """A field of ``SamplingParams`` as an option."""

    type: type
    help: str


SAMPLING_OPTIONS = {
    "temperature": SamplingOption(float, "divisor of the logits; 0 always takes the most likely code"),
    "top_k": SamplingOption(int, "number of most likely codes that are kept; 300 is the paper's choice"),
    "top_p": SamplingOption(float, "probability of the most likely codes that are kept"),
    "guidance_scale": SamplingOption(
        float, "scale of classifier-free guidance; 1 disables it; needs a model trained with condition dropout"
    ),
    "guidance_power": SamplingOption(
        float, "growth of the guidance along the image if above 0, decay if below 0; 0 keeps it constant"
    ),
}
