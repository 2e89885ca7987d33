"""The identity of a tokenizer changes with everything on which its indices depend."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

import pytest
import torch

from clipgen.models.config import AutoencoderConfig, QuantizerConfig, is_training_only
from clipgen.tokenizer_identity import identity


def other_value(config_field: Field) -> Any:
    """Return a valid value that differs from the default of a field."""
    default = config_field.default
    special = {"encoder_kernel_size": 1, "type": "cosine", "fsq_levels": [8, 5, 5, 5]}
    if config_field.name in special:
        return special[config_field.name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1 if isinstance(default, int) else default / 2 + 0.1
    return [*default, 1]


TOKENIZER_FIELDS = [
    pytest.param(section, config_field, id=f"{section}.{config_field.name}")
    for section, config_class in (("autoencoder", AutoencoderConfig), ("quantizer", QuantizerConfig))
    for config_field in fields(config_class)
]


@pytest.mark.parametrize(("section", "config_field"), TOKENIZER_FIELDS)
def test_tokenizer_identity_depends_on_all_fields_except_training_only(section, config_field):
    """Otherwise a token cache of another tokenizer would be accepted."""
    changed = {section: {config_field.name: other_value(config_field)}}
    assert (identity(changed, {}) == identity({}, {})) == is_training_only(config_field)


def test_tokenizer_identity_depends_on_the_weights():
    weights = {"encoder.conv_in.weight": torch.zeros(2)}
    assert identity({}, weights) != identity({}, {name: tensor + 1 for name, tensor in weights.items()})
    assert identity({}, weights) == identity({}, weights | {"quantize.batches_since_use": torch.ones(2)})
