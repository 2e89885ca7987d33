"""The default sampling parameters of a model: those of the grids of its training, in ``sampling.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from clipgen.sampling_params import SamplingParams, resolve_params
from clipgen.storage.files import read_json, write_json
from clipgen.storage.links import file_inside

PARAMS_FILE = "sampling.json"


def save_params(root: Path, params: SamplingParams) -> None:
    """Write the default sampling parameters to the folder of a run or a pipeline."""
    write_json(root / PARAMS_FILE, asdict(params))


def load_params(root: Path) -> SamplingParams:
    """Load the default sampling parameters of a folder, or the paper's if the folder names none.

    Raises:
        ValueError: the file is damaged, or a value is out of range.
    """
    if not (root / PARAMS_FILE).is_file():
        return SamplingParams()
    values = read_json(file_inside(root, PARAMS_FILE))
    try:
        return resolve_params(None, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{root / PARAMS_FILE} is damaged: {error}") from error


def params_of(settings: Mapping[str, Any] | None) -> SamplingParams:
    """Return the sampling parameters among the settings of the ``ImageLogger``."""
    names = [field.name for field in fields(SamplingParams)]
    return SamplingParams(**{name: settings[name] for name in names if settings and name in settings})
