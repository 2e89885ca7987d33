"""CLIPs in folders, which may be a stranger's: ``open_clip_config.json``, one file of weights, and a tokenizer.

open_clip would hand the settings of such a folder on to transformers and timm, which run Python files that the folder
holds and download what it names. So this module reads the folder itself: settings are compared with a list of allowed
names and values, a tokenizer is read from a private copy of known data files, and sizes are compared with the weights
before any memory is allocated.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipgen.checkpoint.safe_load import State, read_checkpoint
from clipgen.clip_rules import ANYTHING, DECODER, MODEL, PREPROCESSING, TEXT, VISION, check, shown
from clipgen.files import one_line, parse_json, read_json, write_json
from clipgen.type_checks import fits

CONFIG = "open_clip_config.json"
VOCABULARY = "vocabulary.json"  # a CLIP folder that holds one reads whole words instead of byte pairs
WEIGHTS = (  # the first that is there; open_clip's order
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
TOKENIZER_DATA = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
FILES = (CONFIG, VOCABULARY, *WEIGHTS, *TOKENIZER_DATA, *TOKENIZER_SETTINGS)
BYTE_PAIRS = 49408  # tokens of open_clip's own tokenizer


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check a CLIP folder's settings.

    Returns:
        (model_cfg, preprocess_cfg), as open_clip calls them.

    Raises:
        ValueError: a key or value is not allowed; names the file and the key.
    """
    path = member(folder, CONFIG)
    config = read_json(path, "model_cfg")
    model, preprocessing = config["model_cfg"], config.get("preprocess_cfg") or {}
    check(path, "preprocess_cfg", preprocessing, PREPROCESSING)
    nested = {"vision_cfg": VISION, "text_cfg": TEXT, "multimodal_cfg": DECODER}
    check(path, "model_cfg", model, MODEL | dict.fromkeys(nested, ANYTHING))
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise ValueError(f"model_cfg of {path} must hold {key!r}")
    for key, rules in nested.items():
        if key in model:
            check(path, f"model_cfg.{key}", model[key], rules)
            if model[key].get("output_tokens") and "multimodal_cfg" not in model:
                raise ValueError(f"model_cfg.{key}.output_tokens of {path} must be false, got true")
    return model, preprocessing


# ------------------------------------------------------------------------------------------------------- which files


def member(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; links may not leave it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, or a link out of the folder.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    if not contained(path, folder):
        raise ValueError(f"{path} must lie in {folder}, got a link to {path.resolve()}: copy the file itself")
    return path


def contained(path: Path, folder: Path) -> bool:
    """Return whether a path, with all links followed, stays in a folder, or in the store of the hub's cache that the
    folder is a snapshot of."""
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return True
    for parent in root.parents:  # models--OWNER--NAME/snapshots/REVISION links to models--OWNER--NAME/blobs
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return target.parent == parent.parent / "blobs"
    return False


def weights_file(folder: Path) -> Path:
    """Return the file of weights of a CLIP folder: the first of the usual names, or the only one there is.

    Raises:
        ValueError: there is none, or several of unusual names.
    """
    usual = [name for name in WEIGHTS if (folder / name).is_file()]
    others = [entry.name for entry in folder.iterdir() if entry.suffix in (".safetensors", ".bin", ".pth")]
    names = usual[:1] or others
    if len(names) != 1:
        what = "got none" if not names else f"got {', '.join(sorted(map(shown, names)))}"
        raise ValueError(
            f"the weights of CLIP {folder} cannot be loaded: it must hold one of {', '.join(WEIGHTS)}, {what}"
        )
    return member(folder, names[0])


def files_of(folder: Path) -> list[Path]:
    """Return the files that a CLIP folder is made of, and no others."""
    model, _ = read_config(folder)
    names = [VOCABULARY] if (folder / VOCABULARY).exists() else []
    if not names and model["text_cfg"].get("hf_tokenizer_name"):
        names = [name for name in (*TOKENIZER_DATA, *TOKENIZER_SETTINGS) if (folder / name).exists()]
    return [member(folder, CONFIG), weights_file(folder), *(member(folder, name) for name in names)]


def write_folder(target: Path, config: dict[str, Any], preprocessing: dict[str, Any], state: State) -> None:
    """Write a CLIP folder of settings and weights."""
    write_json(target / CONFIG, {"model_cfg": config, "preprocess_cfg": preprocessing})
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, target / WEIGHTS[0])


def download(name: str) -> Path:
    """Download a CLIP from the Hugging Face hub: its settings, one file of weights, its tokenizer's data.

    Raises:
        ValueError: it cannot be had.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    settings = [CONFIG, VOCABULARY, *TOKENIZER_DATA, *TOKENIZER_SETTINGS]
    try:
        for weights in WEIGHTS:
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=[*settings, weights]))
            if (folder / weights).is_file():
                break
    except (OSError, ValueError) as error:  # no network, no such name, no right to it
        raise ValueError(
            f"CLIP {name!r} cannot be downloaded ({one_line(error)}): download it once on a machine with a network"
        ) from error
    return folder


# --------------------------------------------------------------------------------------------------------- the model


@contextmanager
def open_clip_interface() -> Iterator[None]:
    """Tell a version of open_clip that clipgen does not fit from weights that are missing."""
    try:
        yield
    except (ImportError, TypeError, AttributeError, NameError) as error:
        raise ValueError(
            f"open_clip {open_clip.__version__} does not work as clipgen expects ({one_line(error)}): "
            "pip install 'open_clip_torch>=3.2,<4'"
        ) from error


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Build the CLIP of a folder, with its weights.

    Returns:
        (model, model_cfg, preprocess_cfg)

    Raises:
        ValueError: settings or weights are not allowed, or do not fit each other; nothing is allocated then.
    """
    config, preprocessing = read_config(folder)
    weights = weights_file(folder)
    header = read_header(weights)
    with torch.device("meta"):
        plan = build(folder, config)
    compare(plan, adapted(header, plan), weights)
    state = adapted(read_state(weights), plan)
    model = build(folder, config)
    model.load_state_dict(state)
    check_finite(model, weights)
    return model, config, preprocessing


def build(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Build open_clip's network from settings that were checked; nothing is downloaded."""
    arguments = copy.deepcopy(config)
    custom = arguments.pop("custom_text", False)
    arguments["vision_cfg"]["timm_model_pretrained"] = False
    with open_clip_interface():
        kind: Any = open_clip.CLIP
        if custom:
            kind = open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP
        try:
            return kind(**arguments)
        except (ValueError, AssertionError, ArithmeticError, RuntimeError, LookupError) as error:
            reason = one_line(error) or type(error).__name__
            raise ValueError(f"{folder / CONFIG} does not describe a CLIP: {reason}") from error


def read_header(path: Path) -> State:
    """Read names, shapes and types of weights, as tensors without memory."""
    if path.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in read_state(path).items()}
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: empty(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


def empty(shape: list[int], dtype: str) -> Tensor:
    """Return a tensor without memory, of one of safetensors' types."""
    integers = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    others = {"BOOL": torch.bool, "C64": torch.complex64}
    kind = (integers | others).get(dtype, torch.float32 if dtype.startswith(("F", "BF")) else torch.int64)
    return torch.empty(shape, dtype=kind, device="meta")


def read_state(path: Path) -> State:
    """Read weights; nothing in the file is executed."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must hold weights by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def adapted(state: State, model: nn.Module) -> State:
    """Return weights under the names of this version of open_clip, as its own ``load_checkpoint`` does."""
    with open_clip_interface():
        state = open_clip.convert.convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == own[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    return {name: tensor for name, tensor in state.items() if name in own or not name.endswith("position_ids")}


def compare(model: nn.Module, state: State, path: Path) -> None:
    """Raise ValueError at the first weight whose name, shape or type does not fit the model."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            what = "lacks" if name in own else "must not hold"
            raise ValueError(f"{path} does not fit its {CONFIG}: it {what} {shown(name)}")
        ours, theirs = own[name], state[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{path} does not fit its {CONFIG}: {name} must be {tuple(ours.shape)}, got {tuple(theirs.shape)}"
            )
        if ours.is_floating_point() != theirs.is_floating_point():
            kind = "floating-point numbers" if ours.is_floating_point() else "whole numbers"
            raise ValueError(f"{name} of {path} must hold {kind}, got {str(theirs.dtype).removeprefix('torch.')}")


@torch.no_grad()
def check_finite(model: nn.Module, source: str | Path) -> None:
    """Raise ValueError at the first weight that holds NaN or an infinite number."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN wins
            if not math.isfinite(low) or not math.isfinite(high):
                raise ValueError(f"the weights of {source} must be finite, got NaN or an infinite number in {name}")


# ----------------------------------------------------------------------------------------------------- the tokenizer


def read_vocabulary(path: Path, size: int) -> list[str]:
    """Read the words of a CLIP, which must fit an embedding of ``size`` tokens."""
    words = parse_json(path)
    if not fits(words, list[str]):
        raise ValueError(f"{path} must hold a list of words, got {shown(words)}")
    if len(words) + 3 > size:  # padding, start and end
        raise ValueError(
            f"{path} must hold at most {size - 3} words, as the CLIP's text_cfg.vocab_size says, got {len(words)}"
        )
    return words


def load_tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    """Load the tokenizer of a CLIP folder that holds no vocabulary: from its files, or open_clip's byte pairs."""
    text = config["text_cfg"]
    length, size = text.get("context_length", 77), text.get("vocab_size", BYTE_PAIRS)
    options = text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name"):
        tokenizer = load_hf_tokenizer(folder, length, text.get("tokenizer_mode"), options)
        size_of = len(tokenizer.tokenizer)
    else:
        with open_clip_interface():
            tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
        size_of = BYTE_PAIRS
    if size_of > size:
        path = folder / CONFIG
        raise ValueError(f"text_cfg.vocab_size of {path} must be at least {size_of}, the tokenizer's size, got {size}")
    return tokenizer


def load_hf_tokenizer(folder: Path, length: int, mode: str | None, options: dict[str, Any]) -> Any:
    """Load a tokenizer of transformers from a private copy of the folder's data files, without network and code."""
    with tempfile.TemporaryDirectory(prefix="clipgen-tokenizer-") as place:
        private = Path(place)
        for name in TOKENIZER_DATA:
            if (folder / name).exists():
                shutil.copyfile(member(folder, name), private / name)
        for name in TOKENIZER_SETTINGS:
            if (folder / name).exists():
                write_json(private / name, harmless(name, member(folder, name)))
        safe = dict(trust_remote_code=False, local_files_only=True)
        try:
            return open_clip.tokenizer.HFTokenizer(place, length, tokenizer_mode=mode, **safe, **options)
        except Exception as error:  # transformers raises anything from KeyError to its own errors
            reason = one_line(error).replace(place, str(folder))
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


WORD = re.compile(r"\w{0,60}Tokenizer(Fast)?|TokenizersBackend|PreTrainedTokenizerFast")
TOKEN_KEYS = {"content", "lstrip", "rstrip", "single_word", "normalized", "special", "__type"}
FLAGS = {  # of tokenizer_config.json; whatever else stands there is left out
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "do_lower_case",
    "extra_ids",
    "keep_accents",
    "legacy",
    "lowercase",
    "model_max_length",
    "padding_side",
    "remove_space",
    "spaces_between_special_tokens",
    "split_special_tokens",
    "strip_accents",
    "tokenize_chinese_chars",
    "truncation_side",
    "src_lang",
    "tgt_lang",
}


def harmless(name: str, path: Path) -> dict[str, Any]:
    """Return the part of a tokenizer's settings file that says how to cut texts: no code, paths or addresses.

    Raises:
        ValueError: the tokenizer needs Python code of its own.
    """
    content = read_json(path)
    if "auto_map" in content:
        raise ValueError(f"{path} asks for Python code of its own (auto_map), which clipgen never runs")
    if name == "config.json":
        kind = content.get("model_type")
        return {"model_type": kind} if isinstance(kind, str) and re.fullmatch(r"[\w-]{1,60}", kind) else {}
    if name == "added_tokens.json":
        return {key: value for key, value in content.items() if type(value) is int}
    return {key: value for key, value in content.items() if is_setting(key, value)}


def is_setting(key: str, value: Any) -> bool:
    """Return whether a value of a tokenizer's settings file is known and plain."""
    if key in FLAGS:
        return isinstance(value, (bool, int, float, str)) and len(str(value)) < 100
    if key.endswith("_token"):
        return is_token(value)
    if key == "tokenizer_class":
        return isinstance(value, str) and WORD.fullmatch(value) is not None
    if key == "added_tokens_decoder":
        return isinstance(value, dict) and all(map(is_token, value.values()))
    lists = ("additional_special_tokens", "extra_special_tokens")
    return key in lists and isinstance(value, list) and all(map(is_token, value))


def is_token(value: Any) -> bool:
    """Return whether a value stands for one token: a text, or a text with its flags."""
    if isinstance(value, dict):
        plain = all(isinstance(setting, (str, bool)) for setting in value.values())
        return set(value) <= TOKEN_KEYS and "content" in value and plain
    return value is None or isinstance(value, str)
