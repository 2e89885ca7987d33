"""A stranger's CLIP folder runs no code, names no other files or models, and fills no memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipgen.bundled import BUNDLED
from clipgen.checkpoint import clip_folder, clip_tokenizer
from clipgen.clip import FrozenCLIP
from clipgen.frozen_models import ALLOW_CLIP_VARIABLE, copy_frozen, load_clip, save_frozen
from clipgen.storage.files import read_json, write_json

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "clip")


@pytest.fixture
def no_network(monkeypatch):
    """Fail the test if anything asks for an address."""

    def refuse(*arguments, **_):
        pytest.fail(f"network wanted: {arguments[:2]}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def change(folder: Path, part: str | None, **values) -> None:
    """Change settings of a CLIP folder."""
    config = read_json(folder / clip_folder.CLIP_CONFIG)
    target = config["model_cfg"] if part is None else config["model_cfg"].setdefault(part, {})
    target.update(values)
    write_json(folder / clip_folder.CLIP_CONFIG, config)


def add_python_tokenizer(folder: Path, marker: Path, **options) -> None:
    """Add a tokenizer that is Python code, which leaves a marker if it runs."""
    (folder / "vocabulary.json").unlink()
    change(folder, "text_cfg", hf_tokenizer_name="anything", **options)
    auto_map = {"AutoTokenizer": ["evil.T", None], "AutoConfig": "evil.C"}
    write_json(folder / "config.json", {"model_type": "bert"})
    write_json(folder / "tokenizer_config.json", {"auto_map": auto_map, "tokenizer_class": "T"})
    code = f"open({str(marker)!r}, 'w').write('ran')\nclass T: pass\nclass C: pass\n"
    (folder / "evil.py").write_text(code)


def words_tokenizer(folder: Path) -> None:
    """Add an ordinary tokenizer of transformers, of whole words, that a folder of 25 tokens can hold."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "red", "ring"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    (folder / "vocabulary.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    write_json(folder / "tokenizer_config.json", settings)
    change(folder, "text_cfg", hf_tokenizer_name="anything")


# -------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs .* must be an object with no other keys"),
        ({"tokenizer_kwargs": {"code_revision": "main"}}, "tokenizer_kwargs .* must be an object with no other keys"),
        ({}, r"tokenizer_config.json asks for Python code of its own \(auto_map\)"),
    ],
)
def test_python_beside_a_clip_never_runs(folder, tmp_path, no_network, options, message):
    add_python_tokenizer(folder, tmp_path / "marker", **options)
    with pytest.raises(ValueError, match=message):
        FrozenCLIP(str(folder))
    assert not (tmp_path / "marker").exists()


def test_python_behind_config_json_never_runs(folder, tmp_path, no_network):
    add_python_tokenizer(folder, tmp_path / "marker")
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "config.json", {"model_type": "bert", "auto_map": {"AutoTokenizer": "evil.T"}})
    with pytest.raises(ValueError, match=r"config.json asks for Python code of its own \(auto_map\)"):
        FrozenCLIP(str(folder))
    assert not (tmp_path / "marker").exists()


def test_a_hub_clip_is_read_by_the_same_rules(folder, tmp_path, monkeypatch):
    import huggingface_hub

    add_python_tokenizer(folder, tmp_path / "marker", tokenizer_kwargs={"trust_remote_code": True})
    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="tokenizer_kwargs"):
        FrozenCLIP("hf-hub:evil/clip@v1")
    assert asked[0][:2] == ("evil/clip", "v1") and not any(".py" in name or "*" in name for name in asked[0][2])
    assert not (tmp_path / "marker").exists()


def test_an_ordinary_tokenizer_of_transformers_is_read_without_network(folder, no_network):
    words_tokenizer(folder)
    clip = FrozenCLIP(str(folder))
    assert clip.tokenizer(["a red ring"])[0, :4].tolist() == [2, 3, 4, 0]


def test_a_tokenizers_settings_name_no_files(folder, tmp_path):
    words_tokenizer(folder)
    settings = read_json(folder / "tokenizer_config.json")
    secret = {
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd",
        "name_or_path": "evil/x",
        "chat_template": "x",
    }
    write_json(folder / "tokenizer_config.json", settings | secret)
    kept = clip_tokenizer.harmless("tokenizer_config.json", folder / "tokenizer_config.json")
    assert kept == settings
    FrozenCLIP(str(folder))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/x"}, "timm_model_name of .* must be the name of a network"),
        ("vision_cfg", {"timm_model_name": "local-dir:/etc"}, "timm_model_name of .* must be the name of a network"),
        ("text_cfg", {"hf_model_name": "evil/x"}, "hf_model_name of .* must be null, got 'evil/x'"),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "tokenizer_kwargs of .* must be an object"),
        ("text_cfg", {"tokenizer_kwargs": {"reduction_mask": "syntax"}}, "tokenizer_kwargs of .* must be an object"),
        ("text_cfg", {"surprise": 1}, "must not contain 'surprise'"),
        (None, {"surprise": 1}, "must not contain 'surprise'"),
        (None, {"embed_dim": "64"}, "embed_dim of .* must be a whole number"),
        (None, {"embed_dim": True}, "embed_dim of .* must be a whole number"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "pos_embed_type of .* must be one of 'learnable'"),
        ("vision_cfg", {"norm_kwargs": {"device": "meta"}}, "norm_kwargs of .* must be an object"),
        ("vision_cfg", {"output_tokens": True}, "output_tokens of .* must be false"),
        ("vision_cfg", {"head_width": 4096}, "does not describe a CLIP"),
        ("text_cfg", {"heads": 7}, "does not describe a CLIP"),
    ],
)
def test_settings_that_are_not_allowed_are_named(folder, no_network, part, values, message):
    change(folder, part, **values)
    with pytest.raises(ValueError, match=message) as caught:
        FrozenCLIP(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_every_model_of_open_clip_fits_the_rules(tmp_path):
    """But for text networks that only transformers can build, whose names would have to be downloaded."""
    refused = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        write_json(tmp_path / clip_folder.CLIP_CONFIG, {"model_cfg": config})
        try:
            clip_folder.read_settings(tmp_path)
        except ValueError as error:
            assert "hf_model_name" in str(error), (name, error)
            refused.add(name)
    assert refused == {
        n for n in open_clip.list_models() if open_clip.get_model_config(n)["text_cfg"].get("hf_model_name")
    }


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_cfg", {"layers": 10**8}),
        ("text_cfg", {"layers": 10**8}),
        ("vision_cfg", {"width": 10**9}),
        ("text_cfg", {"vocab_size": 10**12}),
        ("text_cfg", {"context_length": 10**6}),
        ("vision_cfg", {"image_size": 10**6}),
        (None, {"embed_dim": 10**9}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(folder, monkeypatch, part, values):
    change(folder, part, **values)
    monkeypatch.setattr(clip_folder, "build_network", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match="must be a whole number from"):
        FrozenCLIP(str(folder))


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_cfg", {"width": 16384, "layers": 100}),  # 320 billion parameters
        ("text_cfg", {"vocab_size": 2_000_000, "width": 16384}),
        (None, {"embed_dim": 16384}),
        ("vision_cfg", {"timm_model_name": "vit_giant_patch14_224", "timm_pool": "token", "timm_proj": "linear"}),
    ],
)
def test_sizes_are_compared_with_the_weights_before_memory_is_allocated(folder, monkeypatch, part, values):
    change(folder, part, **values)
    monkeypatch.setattr(clip_folder, "read_state", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors does not fit its open_clip_config.json"):
        FrozenCLIP(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    state = load_file(folder / WEIGHTS)
    state["visual.proj"][3, 5] = value
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"must be finite, got NaN or an infinite number in visual\.proj"):
        FrozenCLIP(str(folder))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_that_are_not_floating_point_are_refused(folder, kind):
    state = load_file(folder / WEIGHTS)
    save_file(state | {"visual.proj": state["visual.proj"].to(kind)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"visual.proj of .* must contain floating-point numbers, got"):
        FrozenCLIP(str(folder))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_point_type_are_read(folder, kind):
    state = load_file(folder / WEIGHTS)
    save_file({name: tensor.to(kind) for name, tensor in state.items()}, folder / WEIGHTS)
    assert FrozenCLIP(str(folder)).embed_dim == 64


def test_pickled_weights_are_read_without_running_them(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "marker"),))

    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    assert FrozenCLIP(str(folder)).embed_dim == 64
    torch.save(state | {"visual.proj": Evil()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"open_clip_pytorch_model.bin"):
        FrozenCLIP(str(folder))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "vocabulary.json is damaged"),
        ("5", "vocabulary.json must contain a list of words, got 5"),
        ("[1, 2]", "vocabulary.json must contain a list of words"),
        ("[" * 10**5, "vocabulary.json is damaged: its values are nested too deeply"),
        (json.dumps([str(i) for i in range(23)]), "vocabulary.json must contain at most 22 words, .* got 23"),
    ],
)
def test_a_vocabularys_faults_name_the_file(folder, content, message):
    (folder / "vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        FrozenCLIP(str(folder))


# ------------------------------------------------------------------------------------------------- names and copies


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("hf-hub:evil/x", None),
        ("/etc", None),
        ("local-dir:/etc", None),
        ("../other", None),
        ("ViT-B-32", "/etc/passwd"),
        ("ViT-B-32", None),
        ("ViT-B-32", "laion5b_no_such_tag"),
        ("shapes", "/etc/passwd"),
        ("clip", "/etc/passwd"),
    ],
)
def test_clip_json_names_nothing_that_its_maker_chose(folder, no_network, monkeypatch, name, tag):
    root = folder.parent
    write_json(root / "clip.json", {"model_name": name, "pretrained": tag})
    made = []
    monkeypatch.setattr("clipgen.frozen_models.FrozenCLIP", lambda *arguments: made.append(arguments))
    with pytest.raises(ValueError, match="neither in the folder nor a model and tag of open_clip") as caught:
        load_clip(root)
    assert not made and str(root / "clip.json") in str(caught.value)
    monkeypatch.setenv(ALLOW_CLIP_VARIABLE, "something else")
    with pytest.raises(ValueError, match=ALLOW_CLIP_VARIABLE):
        load_clip(root)
    monkeypatch.setenv(ALLOW_CLIP_VARIABLE, name if tag is None else f"{name}:{tag}")
    if name != "clip":
        load_clip(root)
        assert made == [(name, tag)]


@pytest.mark.parametrize("config", [{"model_name": 5, "pretrained": None}, {"model_name": "clip", "pretrained": [1]}])
def test_clip_json_of_other_types_is_named(folder, config):
    write_json(folder.parent / "clip.json", config)
    with pytest.raises(ValueError, match=r"clip.json must name a CLIP by two strings"):
        load_clip(folder.parent)


@pytest.mark.parametrize(("name", "tag"), [("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")])
def test_models_and_tags_of_open_clip_are_allowed(tmp_path, monkeypatch, name, tag):
    write_json(tmp_path / "clip.json", {"model_name": name, "pretrained": tag})
    made = []
    monkeypatch.setattr("clipgen.frozen_models.FrozenCLIP", lambda *arguments: made.append(arguments))
    load_clip(tmp_path)
    assert made == [(name, tag)]


def test_a_clip_of_a_local_file_travels_along(tmp_path, tiny_vqgan, monkeypatch):
    """A run's clip.json could not name the file: it would be a stranger's choice on another machine."""
    config = read_json(BUNDLED["shapes"] / "clip" / clip_folder.CLIP_CONFIG)["model_cfg"]
    config["text_cfg"]["vocab_size"] = clip_folder.BYTE_PAIRS
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-CLIP", config)
    clip = FrozenCLIP("Tiny-CLIP", str(tmp_path / "weights.pt"))
    save_frozen(tmp_path / "run", tiny_vqgan, clip)
    again = load_clip(tmp_path / "run")
    assert read_json(tmp_path / "run" / "clip.json")["model_name"] == "clip"
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(again.encode_image(images), clip.encode_image(images))
    assert torch.equal(again.encode_text(["a ring"]), clip.encode_text(["a ring"]))


@pytest.fixture
def stranger(folder, tmp_path, tiny_vqgan) -> Path:
    """A cache's frozen pair, with a secret that lies outside of it."""
    root = tmp_path / "cache"
    save_frozen(root, tiny_vqgan, FrozenCLIP(str(folder)))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("PRIVATE KEY")
    return root


def test_only_the_files_of_a_clip_are_copied(stranger, tmp_path):
    clip = stranger / "clip"
    (clip / "evil.py").write_text("pass")
    (clip / "notes.txt").write_text("?")
    (clip / "assets").symlink_to(tmp_path / "secret")
    (clip / "LICENSE").symlink_to(tmp_path / "secret" / "id_rsa")
    (stranger / "vqgan" / "more.txt").symlink_to(tmp_path / "secret" / "id_rsa")
    copy_frozen(stranger, tmp_path / "run")
    names = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    model = {"vqgan/config.json", "vqgan/model.safetensors", "clip.json"}
    assert names == model | {f"clip/{name}" for name in ("open_clip_config.json", WEIGHTS, "vocabulary.json")}
    assert load_clip(tmp_path / "run").embed_dim == 64


@pytest.mark.parametrize(
    "link", ["clip/vocabulary.json", "clip/" + WEIGHTS, "clip/open_clip_config.json", "vqgan/config.json", "clip.json"]
)
def test_links_out_of_a_folder_are_refused(stranger, tmp_path, link):
    (stranger / link).rename(tmp_path / "secret" / "file")
    (stranger / link).symlink_to(tmp_path / "secret" / "file")
    with pytest.raises(ValueError, match=r"must lie in .*, got a link to"):
        copy_frozen(stranger, tmp_path / "run")
    if link.startswith("clip"):
        with pytest.raises(ValueError, match=r"must lie in .*, got a link to"):
            load_clip(stranger)


def test_a_folder_that_is_itself_a_link_is_refused(stranger, tmp_path):
    (stranger / "clip").rename(tmp_path / "elsewhere")
    (stranger / "clip").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"must lie in .*, got a link to"):
        load_clip(stranger)
    with pytest.raises(ValueError, match=r"must lie in .*, got a link to"):
        copy_frozen(stranger, tmp_path / "run")


def test_the_hubs_cache_is_made_of_links_that_are_followed(folder, tmp_path):
    repo = tmp_path / "models--me--clip"
    snapshot = repo / "snapshots" / "abc" / "clip"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(repo / "blobs" / str(number))
    assert FrozenCLIP(str(snapshot)).embed_dim == 64
    (repo / "blobs").rename(tmp_path / "secret")
    (repo / "blobs").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="got a link to"):
        FrozenCLIP(str(snapshot))


# ------------------------------------------------------------------------------------------------- another open_clip


@pytest.mark.parametrize(
    "error", [TypeError("unexpected keyword argument 'require_pretrained'"), AttributeError("x"), ImportError("x")]
)
def test_a_changed_open_clip_is_not_called_missing_weights(monkeypatch, error):
    def create_model(*_, **__):
        raise error

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match=r"open_clip .* does not work as clipgen expects .*pip install") as caught:
        FrozenCLIP("ViT-B-32-quickgelu", "openai")
    assert "download" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- a tokenizer's steps


def change_tokenizer(folder, **values):
    """Replace parts of the tokenizer.json of a folder."""
    words_tokenizer(folder)
    write_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json") | values)


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}])
def test_a_normalizer_that_multiplies_a_text_is_refused(folder, pattern):
    replacement = {"type": "Replace", "pattern": pattern, "content": "a" * 10}
    steps = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replacement] * 12}]}
    change_tokenizer(folder, normalizer=steps)
    with pytest.raises(ValueError, match=r"tokenizer\.json must make texts at most 64 times longer"):
        FrozenCLIP(str(folder))


def test_an_ordinary_normalizer_is_allowed(folder):
    replacement = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    steps = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, replacement]}
    change_tokenizer(folder, normalizer=steps)
    assert FrozenCLIP(str(folder)).tokenizer(["A  red ring"])[0, :3].tolist() == [2, 3, 4]


def test_a_panic_of_a_tokenizer_names_its_folder(folder):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change_tokenizer(folder, pre_tokenizer=pattern)
    clip = FrozenCLIP(str(folder))
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot read this text"):
        clip.encode_text(["a" * 40 + "b"])


def test_a_tokenizer_that_adds_tokens_without_end_is_refused(folder):
    pieces = [{"SpecialToken": {"id": "[PAD]", "type_id": 0}}] * 1000 + [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"[PAD]": {"id": "[PAD]", "ids": [0], "tokens": ["[PAD]"]}}
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens}
    change_tokenizer(folder, post_processor=template)
    with pytest.raises(ValueError, match=r"the tokenizer in .* (must return \d+ tokens per text|cannot)"):
        FrozenCLIP(str(folder))
