"""The tokenizer of an untrusted CLIP folder: no code in it is run, and no file outside of it is read."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from clipgen.checkpoint.clip_folder import (
    BYTE_PAIRS,
    CLIP_CONFIG,
    TOKENIZER_DATA,
    TOKENIZER_SETTINGS,
    open_clip_interface,
)
from clipgen.checkpoint.clip_rules import abbreviate
from clipgen.storage.files import one_line, read_json, read_json_value, write_json
from clipgen.storage.links import file_inside
from clipgen.type_checks import fits


def read_vocabulary(path: Path, vocab_size: int) -> list[str]:
    """Read the words of a CLIP, which must fit an embedding of ``vocab_size`` tokens."""
    words = read_json_value(path)
    if not fits(words, list[str]):
        raise ValueError(f"{path} must contain a list of words, got {abbreviate(words)}")
    if len(words) + 3 > vocab_size:  # padding, start and end
        raise ValueError(
            f"{path} must contain at most {vocab_size - 3} words, as the CLIP's text_cfg.vocab_size says, "
            f"got {len(words)}"
        )
    return words


def load_tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    """Load the tokenizer of a CLIP folder that contains no vocabulary: from its files, or open_clip's byte pairs."""
    text = config["text_cfg"]
    context_length = text.get("context_length", 77)
    vocab_size = text.get("vocab_size", BYTE_PAIRS)
    options = text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name"):
        hf_tokenizer = load_hf_tokenizer(folder, context_length, text.get("tokenizer_mode"), options)
        tokenizer_size = len(hf_tokenizer.tokenizer)
        tokenizer: Any = CheckedTokenizer(hf_tokenizer, folder, context_length, vocab_size)
    else:
        with open_clip_interface():
            tokenizer = open_clip.SimpleTokenizer(context_length=context_length, **options)
        tokenizer_size = BYTE_PAIRS
    if tokenizer_size > vocab_size:
        path = folder / CLIP_CONFIG
        raise ValueError(
            f"text_cfg.vocab_size of {path} must be at least {tokenizer_size}, the tokenizer's size, got {vocab_size}"
        )
    return tokenizer


class CheckedTokenizer:
    """A tokenizer of unknown origin, whose results are checked and whose failures are errors that name its folder.

    Args:
        tokenizer: a tokenizer of open_clip.
        folder: the CLIP folder.
        context_length: number of tokens per text.
        vocab_size: number of different tokens that the CLIP knows.
    """

    def __init__(self, tokenizer: Any, folder: Path, context_length: int, vocab_size: int):
        self.tokenizer = tokenizer
        self.folder = folder
        self.context_length = context_length
        self.vocab_size = vocab_size

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenize texts: (B, context_length) int64."""
        try:
            tokens: Tensor = self.tokenizer(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust package tokenizers is not an Exception
            raise ValueError(f"the tokenizer in {self.folder} cannot read this text: {one_line(error)}") from error
        if tokens.ndim != 2 or tokens.shape[1] != self.context_length:
            got = f"{tuple(tokens.shape)}"
            raise ValueError(
                f"the tokenizer in {self.folder} must return {self.context_length} tokens per text, got {got}"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"the tokens of the tokenizer in {self.folder} must be in [0, {self.vocab_size})")
        return tokens


def load_hf_tokenizer(folder: Path, context_length: int, mode: str | None, options: dict[str, Any]) -> Any:
    """Load a tokenizer of transformers from a private copy of the folder's data files, without network and code."""
    with tempfile.TemporaryDirectory(prefix="clipgen-tokenizer-") as place:
        private = Path(place)
        for name in TOKENIZER_DATA:
            if (folder / name).exists():
                shutil.copyfile(file_inside(folder, name), private / name)
        if (private / "tokenizer.json").exists():
            check_growth(folder / "tokenizer.json")
        for name in TOKENIZER_SETTINGS:
            if (folder / name).exists():
                write_json(private / name, harmless(name, file_inside(folder, name)))
        safe = dict(trust_remote_code=False, local_files_only=True)
        try:
            return open_clip.tokenizer.HFTokenizer(place, context_length, tokenizer_mode=mode, **safe, **options)
        except Exception as error:  # transformers raises anything from KeyError to its own errors
            reason = one_line(error).replace(place, str(folder))
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


# Largest factor by which the replacements of a normalizer may lengthen a text.
MAX_GROWTH = 64
# Largest number of letters that a normalizer may prepend.
MAX_PREPENDED = 1000


def check_growth(path: Path) -> None:
    """Raise ValueError if the normalizer of ``tokenizer.json`` can make a short text so long that it fills memory."""
    growth = 1
    prepended = 0
    for step in normalizer_steps(read_json(path).get("normalizer")):
        if step.get("type") == "Prepend":
            prepended += len(str(step.get("prepend")))
        elif step.get("type") == "Replace":
            growth *= replacement_growth(step)
    if growth > MAX_GROWTH or prepended > MAX_PREPENDED:
        raise ValueError(
            f"the normalizer of {path} must make texts at most {MAX_GROWTH} times longer and prepend at most "
            f"{MAX_PREPENDED} letters, got {growth:.3g} times and {prepended} letters"
        )


def normalizer_steps(normalizer: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, also those of sequences inside sequences."""
    if not isinstance(normalizer, dict):
        return
    if normalizer.get("type") != "Sequence":
        yield normalizer
        return
    steps = normalizer.get("normalizers")
    for step in steps if isinstance(steps, list) else []:
        yield from normalizer_steps(step)


def replacement_growth(step: dict[str, Any]) -> int:
    """Return the largest factor by which a replacement can lengthen a text."""
    pattern = step.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    new_length = len(str(step.get("content")))
    if isinstance(literal, str) and literal:
        return max(math.ceil(new_length / len(literal)), 1)
    # A regular expression can also match between two letters.
    return new_length + 1


CLASS_NAME = re.compile(r"\w{0,60}Tokenizer(Fast)?|TokenizersBackend|PreTrainedTokenizerFast")
TOKEN_KEYS = {"content", "lstrip", "rstrip", "single_word", "normalized", "special", "__type"}
# Allowed entries of tokenizer_config.json; all others are ignored.
ALLOWED_SETTINGS = {
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
    if key in ALLOWED_SETTINGS:
        return isinstance(value, (bool, int, float, str)) and len(str(value)) < 100
    if key.endswith("_token"):
        return is_token(value)
    if key == "tokenizer_class":
        return isinstance(value, str) and CLASS_NAME.fullmatch(value) is not None
    if key == "added_tokens_decoder":
        return isinstance(value, dict) and all(map(is_token, value.values()))
    lists = ("additional_special_tokens", "extra_special_tokens")
    return key in lists and isinstance(value, list) and all(map(is_token, value))


def is_token(value: Any) -> bool:
    """Return whether a value represents one token: a text, or a text with its flags."""
    if isinstance(value, dict):
        plain = all(isinstance(setting, (str, bool)) for setting in value.values())
        return set(value) <= TOKEN_KEYS and "content" in value and plain
    return value is None or isinstance(value, str)
