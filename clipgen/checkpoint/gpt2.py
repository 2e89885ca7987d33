"""Load the language weights of GPT-2 in the format of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GPT2Config, GPT2Model

from clipgen.checkpoint.safe_load import State, check_finite, check_weights_file
from clipgen.storage.files import one_line

NETWORK_SIZES = ("n_layer", "n_head", "n_embd")
TABLE_SIZES = ("vocab_size", "n_positions")
MAX_ROWS = 2**20  # rows of the embedding tables, whose sizes may differ from ours


def load_gpt2_weights(name: str | Path, like: GPT2Config) -> State:
    """Load the weights of a GPT-2 without its head: ``wte``, ``wpe``, ``h``, ``ln_f``.

    Args:
        name: name on the Hugging Face hub, or a folder written by ``save_pretrained``.
        like: configuration whose sizes the weights must have.

    Raises:
        ValueError: the weights cannot be loaded, are not those of a GPT-2, or have another size.
    """
    config = from_pretrained(AutoConfig, name)
    if not isinstance(config, GPT2Config):
        raise ValueError(f"init_from_gpt2 must name a GPT-2, got {name}, which is a {config.model_type}")
    for size in NETWORK_SIZES:
        ours = getattr(like, size)
        theirs = getattr(config, size)
        if ours != theirs:
            raise ValueError(f"model.{size} must be {theirs}, as in the language weights {name}, got {ours}")
    for size in TABLE_SIZES:
        rows = getattr(config, size)
        if not isinstance(rows, int) or not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"init_from_gpt2 must name a GPT-2, got {name} whose {size} is {rows!r:.60}")
    for file in sorted(Path(name).glob("*.bin")):
        check_weights_file(file)
    # Without the other settings, which can ask for larger or more layers, or for code.
    plain = GPT2Config(**{size: getattr(config, size) for size in (*NETWORK_SIZES, *TABLE_SIZES)})
    model, loading_info = from_pretrained(GPT2Model, name, config=plain, output_loading_info=True)
    missing = loading_info["missing_keys"]
    if missing:
        raise ValueError(f"init_from_gpt2 must name a complete GPT-2, got {name} without {min(missing)}")
    state: State = model.state_dict()
    check_finite(state, name)
    return state


def from_pretrained(transformers_class: Any, name: str | Path, **options: Any) -> Any:
    """Call ``from_pretrained`` of a class of transformers; ValueError with a one-line reason if it fails."""
    try:
        return transformers_class.from_pretrained(str(name), trust_remote_code=False, **options)
    except Exception as error:  # no such name, no network, or a damaged file, which can raise anything
        raise ValueError(
            "init_from_gpt2 must name a GPT-2 on the Hugging Face hub, or a folder of one, "
            f"got {name}: {one_line(error)}"
        ) from error
