"""Type, default and description of each sampling parameter, without torch."""

from __future__ import annotations

from typing import NamedTuple

DTYPES = ("float32", "bfloat16")


class SamplingOption(NamedTuple):
    """A field of ``SamplingParams`` as an option."""

    type: type
    default: float
    help: str


# The defaults repeat those of `SamplingParams`, whose module imports torch: `--help` must not wait for that. A test
# compares them.
SAMPLING_OPTIONS = {
    "temperature": SamplingOption(float, 1.0, "divisor of the logits; 0 always takes the most likely code"),
    "top_k": SamplingOption(int, 300, "number of most likely codes that are kept; 300 is the paper's choice"),
    "top_p": SamplingOption(float, 1.0, "probability of the most likely codes that are kept"),
    "guidance_scale": SamplingOption(
        float, 1.0, "scale of classifier-free guidance; 1 disables it; needs a model trained with condition dropout"
    ),
    "guidance_power": SamplingOption(
        float, 0.0, "growth of the guidance along the image if above 0, decay if below 0; 0 keeps it constant"
    ),
}
