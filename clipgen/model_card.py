"""The model card of a pipeline, as the Hugging Face hub shows it."""

from __future__ import annotations

import html
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import clipgen
from clipgen.clip import FrozenCLIP
from clipgen.models.config import dotted_values
from clipgen.sampling_params import SamplingParams
from clipgen.storage.files import one_line, read_json, read_yaml
from clipgen.storage.links import file_inside
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)

SETTING_NAME = re.compile(r"\w{1,60}")
# OWNER/NAME of a dataset on the hub.
HUB_DATASET = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
# Contains the training settings in the folder of a pipeline.
TRAINING_FILE = "training.json"
# Contains the images of the card.
SAMPLES_FILE = "model_card.png"
CARD_TAGS = ("clip-gen", "vqgan", "autoregressive", "language-free-training")
CARD_TEMPLATE = """
A text-to-image model after CLIP-GEN (arXiv:2203.00386), trained by clipgen {version} from images alone.
Its CLIP: {clip}.
{data}{samples}{results}
```python
from clipgen import TextToImage

TextToImage.from_pretrained("{repository}")("a prompt")[0].save("image.png")
```

| part | setting | value |
|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class CardDetails:
    """Content of a model card besides the settings of the model.

    Args:
        license: license of the weights, as the hub spells it, such as ``"mit"``.
        datasets: names on the hub of the datasets that the model was trained on; if empty, the dataset of its
            ``data=huggingface``.
        language: language of the prompts that its CLIP understands, such as ``"en"``.
        prompts: prompts of the images in the card, one each, generated with seed 0 when the pipeline is saved.
        params: sampling parameters of these images; None uses those of the pipeline.
        results: measured values by metric, or the ``metrics.json`` that ``clipgen-eval`` wrote.
        evaluated_on: name of the dataset that the results were measured on. The hub lists results only with it.
        repository: name of the model on the hub; ``push_to_hub`` fills it in.

    Raises:
        ValueError: a result is not a finite number, or the file contains no results.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    language: str | None = None
    prompts: Sequence[str] = ()
    params: SamplingParams | None = None
    results: Mapping[str, float] | str | Path = field(default_factory=dict)
    evaluated_on: str | None = None
    repository: str = "OWNER/NAME"

    def __post_init__(self) -> None:
        results = self.results
        if isinstance(results, (str, Path)):
            results = read_json(Path(results).expanduser(), "metrics")["metrics"]
        if not isinstance(results, Mapping):
            raise ValueError(f"results must be numbers by the names of metrics, got {results!r:.60}")
        for name, value in results.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"the result {name} must be a finite number, got {value!r:.60}")
        object.__setattr__(self, "results", dict(results))


def training_settings(root: Path) -> dict[str, Any]:
    """Return the data and trainer settings of stage 2, read from its run or pipeline folder.

    Paths are omitted because they are local to the machine that trained the model. Only the card needs these settings,
    so a file that cannot be read causes a warning, and the model is loaded.
    """
    try:
        if (root / TRAINING_FILE).is_file():
            return settings_of(read_json(file_inside(root, TRAINING_FILE)))
        if (root / "config.yaml").is_file():
            return settings_of(read_yaml(file_inside(root, "config.yaml")))
    except (ValueError, OSError) as error:
        logger.warning("The model card will not say how the model was trained: %s", one_line(error))
    return {}


def settings_of(config: Any) -> dict[str, Any]:
    """Return the plain settings of data and trainer in a configuration, and nothing else."""
    settings = {}
    for part in ("data", "trainer"):
        values = config.get(part) if isinstance(config, dict) else None
        if not isinstance(values, dict):
            continue
        plain = {key: value for key, value in values.items() if is_card_setting(key, value)}
        if plain:
            settings[part] = plain
    return settings


def is_card_setting(key: Any, value: Any) -> bool:
    """Return whether a setting is a short name with a number or a short text that is not a path."""
    named = isinstance(key, str) and SETTING_NAME.fullmatch(key) is not None
    scalar = isinstance(value, (bool, int, float, str)) and len(str(value)) <= 200
    is_path = re.search(r"[/\\]", str(value)) and not (key == "dataset" and is_hub_dataset(str(value)))
    return named and scalar and not is_path


def is_hub_dataset(name: str) -> bool:
    """Return whether a dataset is OWNER/NAME on the hub, and not a local folder."""
    return HUB_DATASET.fullmatch(name) is not None and not Path(name).exists()


def hub_datasets(training: dict[str, Any]) -> list[str]:
    """Return the dataset on the hub that training settings name, if any."""
    name = str(settings_of(training).get("data", {}).get("dataset", ""))
    return [name] if is_hub_dataset(name) else []


def model_card(
    vqgan: VQGAN,
    transformer: ConditionalTransformer,
    clip: FrozenCLIP,
    training: dict[str, Any],
    details: CardDetails | None = None,
) -> str:
    """Return a model card: what the model is, how to generate images with it, how it was trained, how good it is."""
    details = details or CardDetails()
    details = replace(details, datasets=details.datasets or hub_datasets(training))
    text = CARD_TEMPLATE.format(
        clip=cell(Path(clip.model_name).name),
        version=clipgen.__version__,
        repository=details.repository,
        data=describe_data(details),
        samples=describe_samples(details),
        results=describe_results(details),
        rows="\n".join(setting_rows(vqgan, transformer, training)),
    )
    return str(ModelCard(f"---\n{metadata(details).to_yaml()}\n---\n{text}"))


def setting_rows(vqgan: VQGAN, transformer: ConditionalTransformer, training: dict[str, Any]) -> list[str]:
    """Return a row of the table of settings for each setting of the models, the data and the trainer."""
    settings = {
        "transformer": dict(dotted_values(transformer.hparams)),
        "vqgan": dict(dotted_values(vqgan.hparams)),
        **settings_of(training),
    }
    rows = []
    for part, values in settings.items():
        for key, value in values.items():
            rows.append(f"| {part} | {cell(key)} | {cell(value)} |")
    return rows


def metadata(details: CardDetails) -> ModelCardData:
    """Return the part of the card that the hub reads."""
    data = ModelCardData(
        library_name="clipgen",
        pipeline_tag="text-to-image",
        license=details.license,
        language=details.language,
        tags=list(CARD_TAGS),
        datasets=list(details.datasets) or None,
    )
    if details.results and details.evaluated_on:
        data.model_name = details.repository.rpartition("/")[2]
        data.eval_results = eval_results(details)
    return data


def eval_results(details: CardDetails) -> list[EvalResult]:
    """Return the measured values as the hub lists them."""
    results: dict[str, float] = details.results  # type: ignore[assignment]
    dataset = str(details.evaluated_on)
    entries = []
    for name, value in results.items():
        entry = EvalResult(
            task_type="text-to-image",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=value,
        )
        entries.append(entry)
    return entries


def describe_data(details: CardDetails) -> str:
    """Return a sentence that names the training data, if it is known."""
    if not details.datasets:
        return ""
    return f"Its training data: {', '.join(map(cell, details.datasets))}.\n"


def describe_samples(details: CardDetails) -> str:
    """Return the link to the images of the card, if it has any, and how they were generated."""
    if not details.prompts:
        return ""
    params = asdict(details.params or SamplingParams())
    settings = ", ".join(f"{name} {value:g}" for name, value in params.items())
    how = f"One image per prompt, not selected: seed 0, {settings}."
    return f"\n![Generated images with their prompts]({SAMPLES_FILE})\n\n{how}\n"


def describe_results(details: CardDetails) -> str:
    """Return a table of the measured values, if there are any."""
    results: dict[str, float] = details.results  # type: ignore[assignment]
    if not results:
        return ""
    place = f" on {cell(details.evaluated_on)}" if details.evaluated_on else ""
    rows = [f"| {cell(name)} | {value:.4g} |" for name, value in results.items()]
    return f"\nMeasured{place}:\n\n| metric | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def cell(value: Any) -> str:
    """Return a value as plain text for a Markdown table, on one line and without markup."""
    text = html.escape(" ".join(str(value).split())[:200])
    return re.sub(r"([\\`*|!\[\]~])", r"\\\1", text)
