"""The frozen CLIP: what it hands on, its guard rails, and how well the bundled one sees."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path

import open_clip
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clipgen.bundled import BUNDLED
from clipgen.clip import FrozenCLIP, WordTokenizer, match_activation
from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset
from clipgen.generation.bundled_vocabulary import CLASSES
from clipgen.images import to_pil

CAPTIONS = [str(attributes) for attributes in ALL_ATTRIBUTES]


def write_clip(folder: Path, **preprocessing: str) -> Path:
    """A CLIP folder in open_clip's layout, with random weights and open_clip's own tokenizer."""
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 8, "width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}
    model = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    folder.mkdir(parents=True)
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], **preprocessing},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def byte_pair_clip(tmp_path_factory) -> FrozenCLIP:
    torch.manual_seed(0)
    return FrozenCLIP(str(write_clip(tmp_path_factory.mktemp("clips") / "tiny")))


# -------------------------------------------------------------------------------------------------------------- bundled


@torch.no_grad()
def test_bundled_clip_tells_all_sentences_apart(shapes_clip):
    """At least 99 % of 2000 fresh renders are nearest to their own sentence, of all 288."""
    data = ShapesDataset(2000, seed=987_654)
    similarity = shapes_clip.encode_image(data.render(range(2000))) @ shapes_clip.encode_text(CAPTIONS).T
    truth = torch.tensor([ALL_ATTRIBUTES.index(a) for a in data.attributes])
    assert (similarity.argmax(1) == truth).float().mean() >= 0.99


def test_bundled_files_are_small():
    size = lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20
    assert 0 < size(BUNDLED["shapes"] / "clip") <= 4
    assert size(BUNDLED["shapes"]) <= 10
    files = [path.read_bytes() for path in BUNDLED["cifar10"].rglob("*.*") if path.is_file()]
    assert sum(len(zlib.compress(content)) for content in files) <= 20 * 2**20  # in a wheel


def test_bundled_cifar10_clip_tells_the_classes_apart():
    clip = FrozenCLIP("cifar10")
    text = clip.encode_text([f"a photo of a {name}" for name in CLASSES])
    assert clip.model_name == "cifar10" and clip.embed_dim == 128
    assert (text @ text.T - torch.eye(10)).max() < 0.9


# ----------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_have_unit_norm(shapes_clip, images):
    e, t = shapes_clip.encode_image(images), shapes_clip.encode_text(CAPTIONS[:3])
    assert e.shape == (8, shapes_clip.embed_dim) and t.shape == (3, shapes_clip.embed_dim)
    assert e.dtype == t.dtype == torch.float32
    torch.testing.assert_close(torch.cat([e, t]).norm(dim=1), torch.ones(11))


def test_gradients_reach_the_images_and_nothing_else(shapes_clip, images):
    free = images.clone().requires_grad_()
    (shapes_clip.encode_image(free) * torch.randn(8, shapes_clip.embed_dim)).sum().backward()
    assert torch.isfinite(free.grad).all() and (free.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in shapes_clip.parameters())
    assert torch.equal(free.detach(), images)  # nothing is normalized in place


def test_feature_maps_are_the_tokens_after_each_block_as_a_grid(shapes_clip, images):
    outputs: list[Tensor] = []
    blocks = shapes_clip.model.visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    shapes_clip.encode_image(images)
    for hook in hooks:
        hook.remove()
    maps = shapes_clip.feature_maps(images)
    assert len(maps) == len(outputs) == 4
    for feature_map, tokens in zip(maps, outputs):
        # the first token is the class token; 4 x 4 patches of 8 pixels follow
        torch.testing.assert_close(feature_map[:, :, 1, 2], tokens[:, 1 + 4 * 1 + 2])


def test_perceptual_distance_matches_its_definition(shapes_clip, images):
    others = images.flip(0)
    expected = torch.zeros(len(images))
    pairs = list(zip(shapes_clip.feature_maps(images), shapes_clip.feature_maps(others)))
    for a, b in pairs:
        # the squared distance of unit vectors is 2 - 2 cos
        expected += (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2)) / len(pairs)
    torch.testing.assert_close(shapes_clip.perceptual_distance(images, others), expected, atol=1e-5, rtol=1e-4)


def test_perceptual_distance_of_equal_images_is_zero_with_finite_gradient(shapes_clip, images):
    copy = images.clone().requires_grad_()
    distance = shapes_clip.perceptual_distance(images, copy)
    torch.testing.assert_close(distance, torch.zeros(len(images)), atol=1e-10, rtol=0)
    distance.sum().backward()
    assert torch.isfinite(copy.grad).all()


def test_clip_is_a_lightning_module_without_anything_to_train(shapes_clip):
    """Like the two stages, but frozen."""
    assert isinstance(shapes_clip, pl.LightningModule)
    assert not any(parameter.requires_grad for parameter in shapes_clip.parameters())


def test_never_in_training_mode(shapes_clip):
    owner = torch.nn.ModuleList([shapes_clip]).train()
    assert owner.training and not any(module.training for module in shapes_clip.modules())
    assert shapes_clip.train() is shapes_clip


@torch.no_grad()
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (48, 80), (100, 64), (20, 24)], ids=str)
def test_preprocessing_is_open_clips(tmp_path, size, resize_mode, interpolation):
    """Against the PIL transform that open_clip builds for the model, to a few of PIL's 256 levels.

    Ours keeps the overshoot of the bicubic filter, which PIL cuts off: a clamp would stop gradients.
    """
    folder = write_clip(tmp_path / "clip", resize_mode=resize_mode, interpolation=interpolation)
    clip = FrozenCLIP(str(folder))
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    smooth = F.interpolate(torch.rand(4, 3, 6, 6), size=size, mode="bicubic").clamp(0, 1) * 2 - 1
    ours = clip.preprocess(smooth)
    theirs = torch.stack([transform(picture) for picture in to_pil(smooth)])
    assert ours.shape == theirs.shape == (4, 3, 32, 32)
    levels = lambda x: (x * clip.std + clip.mean).clamp(0, 1) * 255
    assert (levels(ours) - levels(theirs)).abs().max() < 2.5
    e = clip.encode_image(smooth)
    assert F.cosine_similarity(e, clip.model.encode_image(theirs)).min() > 0.999


@torch.no_grad()
def test_preprocessing_matches_open_clip_on_sharp_photos(shapes_clip):
    """Hard edges and bright pixels, where bicubic filters overshoot."""
    images = ShapesDataset(16, image_size=96, seed=1).render(range(16))
    transform = open_clip.create_model_and_transforms(f"local-dir:{BUNDLED['shapes'] / 'clip'}")[2]
    theirs = torch.stack([transform(picture) for picture in to_pil(images)])
    e = shapes_clip.model.encode_image(theirs)
    assert F.cosine_similarity(shapes_clip.encode_image(images), e).min() > 0.999


def test_bytes_are_refused(shapes_clip):
    """255 + 1 is 0 in them."""
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) floats in \[-1, 1\], got uint8 of"):
        shapes_clip.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_wrong_shapes_are_refused(shapes_clip):
    with pytest.raises(ValueError, match=r"images must be .*, got float32 of \(3, 32, 32\)"):
        shapes_clip.encode_image(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"images must be .*, got float32 of \(2, 1, 32, 32\)"):
        shapes_clip.encode_image(torch.zeros(2, 1, 32, 32))
    with pytest.raises(TypeError, match="list of texts"):
        shapes_clip.encode_text("a red ring")


# ------------------------------------------------------------------------------------------------------------ sentences


def test_words_become_indices():
    tokenizer = WordTokenizer(["a", "red", "ring"], context_length=6)
    assert tokenizer("a red ring").tolist() == [[1, 2, 3, 4, 5, 0]]
    assert tokenizer(["A Red, ring.", ""]).tolist() == [[1, 2, 3, 4, 5, 0], [1, 5, 0, 0, 0, 0]]


def test_long_sentences_keep_their_end(byte_pair_clip):
    words = WordTokenizer(["a", "red", "ring"], context_length=6)("a red ring a red ring a red ring")
    assert words.tolist() == [[1, 2, 3, 4, 2, 5]]
    pieces = byte_pair_clip.tokenizer(["a very long sentence about nothing at all, in more words than fit"])
    assert pieces.shape == (1, 8) and pieces[0, -1] == pieces.max() == 49407
    assert not pieces[0].eq(0).any()


def test_a_cut_sentence_still_has_an_embedding_of_its_own(shapes_clip, byte_pair_clip):
    for clip in (shapes_clip, byte_pair_clip):
        e = clip.encode_text(["a small red ring " * 20, "a large blue star " * 20])
        assert torch.isfinite(e).all() and (e[0] @ e[1]) < 0.999


def test_unknown_words_are_named_and_the_known_listed(shapes_clip, caplog):
    with caplog.at_level(logging.WARNING):
        odd = shapes_clip.encode_text(["a small turquoise red ring on a white background"])
    assert "'turquoise'" in caplog.text and "'red'" not in caplog.text
    assert all(word in caplog.text for word in ("cyan", "triangle", "background"))
    assert torch.equal(odd, shapes_clip.encode_text(["a small red ring on a white background"]))


def test_known_sentences_raise_no_warning(shapes_clip, caplog, tmp_path):
    """Nor does a CLIP when it is made, whatever words it knows."""
    shapes_clip.encode_text([*CAPTIONS, "A small red ring on a white background."])
    folder = shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "clip")
    words = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps([f"{word}s" for word in words]))
    FrozenCLIP(str(folder))
    assert not caplog.records


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "tag", "quick_gelu"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-L-14", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", False),
    ],
)
def test_activation_follows_the_weights(name, tag, quick_gelu):
    matched, force = match_activation(name, tag)
    assert matched.removesuffix("-quickgelu") == name.removesuffix("-quickgelu")
    assert (force or open_clip.get_model_config(matched).get("quick_gelu", False)) == quick_gelu


def test_openai_weights_under_the_plain_name_get_quick_gelu(monkeypatch, byte_pair_clip, caplog):
    """Loaded without it they are quietly wrong. Nothing is downloaded: create_model is replaced."""
    asked = {}

    def create_model(name: str, pretrained: str | None = None, **options) -> torch.nn.Module:
        asked.update(options, name=name, pretrained=pretrained)
        return byte_pair_clip.model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    FrozenCLIP("ViT-B-32", "openai")
    assert (asked["name"], asked["pretrained"]) == ("ViT-B-32", "openai")
    assert asked["force_quick_gelu"] is True or asked["name"].endswith("-quickgelu")
    assert "quick_gelu" in caplog.text
    FrozenCLIP("ViT-B-32", "laion2b_s34b_b79k")
    assert asked["force_quick_gelu"] is False


def test_a_local_file_of_unknown_origin_warns(caplog):
    assert match_activation("ViT-B-32", "/some/file.pt") == ("ViT-B-32", False)
    assert "ViT-B-32-quickgelu" in caplog.text


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("VIT-Z", "openai", "'VIT-Z' must be a bundled model .*shapes"),
        ("ViT-B-32-quickgelu", None, "must name the weights of ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "/no/such/file.pt", "cannot be loaded"),
    ],
)
def test_unknown_names_and_weights_are_refused(name, tag, message):
    with pytest.raises(ValueError, match=message):
        FrozenCLIP(name, tag)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shapes", ("shapes", None)),
        ("ViT-B-32-quickgelu:openai", ("ViT-B-32-quickgelu", "openai")),
        ("hf-hub:laion/CLIP-ViT-B-32", ("hf-hub:laion/CLIP-ViT-B-32", None)),
    ],
)
def test_spec_is_split_into_model_and_weights(monkeypatch, name, expected):
    asked = []
    monkeypatch.setattr(FrozenCLIP, "__init__", lambda self, *arguments: asked.append(arguments))
    FrozenCLIP.from_spec(name)
    assert asked == [expected]


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no open_clip_config\.json"):
        FrozenCLIP(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = write_clip(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        FrozenCLIP(str(folder))


def test_the_same_folder_gives_the_same_model(byte_pair_clip, images):
    again = FrozenCLIP(**byte_pair_clip.config())
    assert torch.equal(again.encode_image(images), byte_pair_clip.encode_image(images))
    assert torch.equal(again.encode_text(["a cat"]), byte_pair_clip.encode_text(["a cat"]))


def test_mid_grey_is_one_half_before_the_mean_is_subtracted(byte_pair_clip):
    grey = byte_pair_clip.preprocess(torch.zeros(1, 3, 32, 32))
    expected = (0.5 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.25])
    torch.testing.assert_close(grey.mean((0, 2, 3)), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_longer_than_the_context_warns(shapes_clip, caplog, monkeypatch):
    monkeypatch.setattr(shapes_clip, "num_truncation_warnings", 0)
    sentence = "a large blue ring on a white background"
    shapes_clip.encode_text([sentence])
    assert not caplog.messages
    shapes_clip.encode_text([" ".join([sentence] * 3)])
    (message,) = caplog.messages
    assert message.startswith("This CLIP reads 16 tokens of a text, and not the end of 'a large blue ring")


@pytest.mark.parametrize(("words", "cut"), [(5, False), (6, False), (7, True), (30, True)])
def test_byte_pairs_that_fill_the_context_exactly_are_not_called_cut(byte_pair_clip, caplog, monkeypatch, words, cut):
    """Of 8 tokens, two mark the beginning and the end."""
    monkeypatch.setattr(byte_pair_clip, "num_truncation_warnings", 0)
    byte_pair_clip.encode_text([" ".join(["cat"] * (words - 1) + ["dog"])])
    assert [("not the end of" in message) for message in caplog.messages] == [True] * cut


def test_warnings_of_long_prompts_end(shapes_clip, caplog, monkeypatch):
    monkeypatch.setattr(shapes_clip, "num_truncation_warnings", 0)
    long = "a large blue ring on a white background " * 2
    shapes_clip.encode_text([long + "ring " * i for i in range(1, 40)])
    assert len(caplog.messages) == 10 and "Further texts are not" in caplog.messages[-1]
