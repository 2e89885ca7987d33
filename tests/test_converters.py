"""Published checkpoints give the indices and images of their own modules, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import train_clip
from commands import command
from conftest import changed, weights_of

from clipgen.checkpoint import pickle_stubs, safe_load, taming
from clipgen.models.lpips import lpips_from_state
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN


def load(folder: Path) -> VQGAN:
    if folder.name.startswith("taming"):
        return VQGAN.from_taming(folder / "last.ckpt", folder / "model.yaml")
    return VQGAN.from_hfailab(folder / "vqgan.pt")


@pytest.fixture(params=["taming_vqgan", "taming_gumbel", "hfailab_clip_gen"])
def folder(request, shared) -> Path:
    return shared / "parity" / request.param


@torch.no_grad()
def test_published_tokenizers_match_their_expected_outputs(folder):
    vqgan = load(folder)
    expected = {name: torch.from_numpy(array) for name, array in np.load(folder / "expected.npz").items()}
    z = vqgan.encode_latents(expected["images"])
    assert torch.equal(vqgan.encode(expected["images"]), expected["indices"])
    for ours, name in (
        (z, "z"),
        (vqgan.active_model.quantize(z).z_q, "z_q"),
        (vqgan(expected["images"]), "reconstruction"),
        (vqgan.decode(expected["indices"]), "reconstruction"),
    ):
        if name in expected:
            torch.testing.assert_close(ours, expected[name], atol=1e-4, rtol=0)
    assert expected["reconstruction"].std() > 0.01  # nothing that would agree by being zero


@torch.no_grad()
def test_a_converted_folder_is_the_same_bit_for_bit(folder, tmp_path, images):
    vqgan = load(folder)
    again = VQGAN.load(vqgan.save(tmp_path / "bare"))
    assert again.discriminator is None and vqgan.discriminator is not None
    assert torch.equal(again(images), vqgan(images))
    loaded = VQGAN.load(vqgan.save(tmp_path / "whole", training=True))
    assert not changed(loaded, weights_of(vqgan))


def test_published_weights_can_be_trained_further(folder, fit):
    vqgan = load(folder)
    before = weights_of(vqgan)
    vqgan.loss_config = replace(vqgan.loss_config, perceptual_weight=0.0)
    vqgan.gan_config = replace(vqgan.gan_config, start_step=0)
    vqgan.optimizer_config = replace(vqgan.optimizer_config, learning_rate=1e-4)
    fit(vqgan, 1, batch=2)
    moved = changed(vqgan, before)
    assert any(name.startswith("discriminator") for name in moved)
    assert any(name.startswith("autoencoder.encoder") for name in moved)
    # They were trained with beta on the codebook loss.
    assert vqgan.loss_config.commitment_weight == 1 and vqgan.loss_config.codebook_weight < 1


CONFIG = {
    "model": {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 8,
            "n_embed": 16,
            "ddconfig": {
                "double_z": False,
                "z_channels": 8,
                "resolution": 64,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2, 1],
                "num_res_blocks": 2,
                "attn_resolutions": [64, 16],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        },
    }
}


def checkpoint_of(vqgan: VQGAN, path: Path, **others: object) -> Path:
    """taming's layout: our names of the tokenizer are theirs."""
    torch.save({"state_dict": dict(vqgan.autoencoder.state_dict()) | others}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"resamp_with_conv": False}])
def test_converted_model_matches_for_any_ddconfig(tmp_path, images, change):
    params = CONFIG["model"]["params"]
    config = {"model": CONFIG["model"] | {"params": params | {"ddconfig": params["ddconfig"] | change}}}
    theirs = VQGAN(**taming.convert_config(config)).eval()
    ours = VQGAN.from_taming(checkpoint_of(theirs, tmp_path / "last.ckpt"), config)
    assert ours.downsampling == 4 and len(ours.autoencoder.encoder.down[0].attn) == 2
    assert [name for name in ours.state_dict() if "sample" in name] == [] or not change
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(VQGAN.load(ours.save(tmp_path / "folder"))(images), ours(images))
    assert ours.discriminator is None


def test_a_ddconfig_may_leave_out_what_taming_has_a_value_for():
    params = CONFIG["model"]["params"]
    net = {name: value for name, value in params["ddconfig"].items() if name not in ("ch_mult", "dropout")}
    arguments = taming.convert_config({"model": CONFIG["model"] | {"params": params | {"ddconfig": net}}})
    assert (
        arguments["autoencoder"]["ch_mult"],
        arguments["autoencoder"]["dropout"],
        arguments["autoencoder"]["resamp_with_conv"],
    ) == ([1, 2, 4, 8], 0.0, True)


def test_a_pipeline_keeps_nothing_for_training(tmp_path):
    ran = command("clipgen-convert", "hfailab", "a.pt", "b.pt", "--training", "--output", "pair", cwd=tmp_path)
    assert ran.returncode == 1 and "--training is only for a tokenizer alone" in ran.stderr


@pytest.mark.slow
def test_lpips_of_the_file_is_used(tmp_path, images, fit):
    """With VGG in the checkpoint no other weights are needed: there are none here."""
    torch.manual_seed(1)
    from torchmetrics.functional.image.lpips import _LPIPS

    lpips = _LPIPS(net="vgg", pnet_rand=True).eval()
    theirs = {f"loss.perceptual_loss.{k}": v for k, v in lpips.state_dict().items() if not k.startswith("lins")}
    theirs |= {"loss.perceptual_loss.scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    path = checkpoint_of(VQGAN(**taming.convert_config(CONFIG)), tmp_path / "last.ckpt", **theirs)
    vqgan = VQGAN.from_taming(path, CONFIG)
    loaded_lpips = vqgan._lpips[0]
    assert not loaded_lpips.training and not any(p.requires_grad for p in loaded_lpips.parameters())
    assert torch.equal(loaded_lpips(images, -images), lpips(images, -images))
    metrics = fit(vqgan, 1, batch=2).callback_metrics
    assert metrics["train/perceptual_loss"] > 0
    again = VQGAN.load(vqgan.save(tmp_path / "folder", training=True))
    assert torch.equal(again._lpips[0](images, -images), lpips(images, -images))


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path, layout):
    trap = tmp_path / "it ran"
    content = {"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}, "callbacks": Bomb(trap)}
    path = tmp_path / "last.ckpt"
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    for read in (lambda: VQGAN.from_taming(path, CONFIG), lambda: VQGAN.from_hfailab(path), lambda: VQGAN.load(path)):
        with pytest.raises(
            ValueError,
            match=r"last\.ckpt is not a readable checkpoint: it references (\w+\.mkdir|torch\.storage\.\w+),",
        ):
            read()
    assert not trap.exists()
    pickle.loads(path.read_bytes()) if layout == "pickle" else torch.load(path, weights_only=False)
    assert trap.exists()  # it would have run


def test_lightnings_old_callbacks_are_named_and_not_run(tmp_path):
    """What ModelCheckpoint stands for in an old file is an inert class of ours."""

    class Fake:
        pass

    Fake.__module__, Fake.__qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"
    import pytorch_lightning.callbacks.model_checkpoint as real

    original, real.ModelCheckpoint = real.ModelCheckpoint, Fake
    try:
        torch.save({"callbacks": {Fake: {"best": 1.0}}, "state_dict": {}}, tmp_path / "old.ckpt")
    finally:
        real.ModelCheckpoint = original
    assert list(safe_load.read_checkpoint(tmp_path / "old.ckpt")["callbacks"]) == [pickle_stubs.PickleStub]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(target="taming.models.cond_transformer.Net2NetTransformer"),
            "target must be VQModel or GumbelVQ.*got Net2",
        ),
        (dict(params={}), "not a configuration of a taming-transformers tokenizer: KeyError.*ddconfig"),
        *[
            (dict(params=CONFIG["model"]["params"] | {"lossconfig": loss}), "disc_loss is hinge or vanilla, got")
            for loss in ({"params": {"disc_loss": "wgan"}}, [1])
        ],
    ],
)
def test_other_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        taming.convert_config({"model": CONFIG["model"] | change})


def test_unreadable_files_are_named(tmp_path, tiny_vqgan):
    good = checkpoint_of(VQGAN(**taming.convert_config(CONFIG)), tmp_path / "good.ckpt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, config, message in (
        ("none.ckpt", CONFIG, "no checkpoint .*none.ckpt"),
        ("other.ckpt", CONFIG, "other.ckpt is not a checkpoint of taming-transformers"),
        ("list.ckpt", CONFIG, "it contains a list"),
        ("cut.ckpt", CONFIG, "cut.ckpt is not a readable checkpoint"),
        ("good.ckpt", tmp_path / "none.yaml", "none.yaml"),
        ("good.ckpt", tmp_path / "bad.yaml", "bad.yaml is damaged"),
        ("good.ckpt", tmp_path / "list.yaml", "list.yaml must contain a mapping"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            VQGAN.from_taming(tmp_path / name, config)
    other_size = {"model": CONFIG["model"] | {"params": CONFIG["model"]["params"] | {"n_embed": 17}}}
    with pytest.raises(ValueError, match=r"good\.ckpt does not fit the VQGAN .*size mismatch for quantize"):
        VQGAN.from_taming(good, other_size)


@pytest.mark.slow
def test_convert_command_writes_an_identical_model(shared, tmp_path, images):
    folder = shared / "parity" / "taming_vqgan"
    ran = command(
        "clipgen-convert", "taming", folder / "last.ckpt", folder / "model.yaml", "--output", "f4", cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(VQGAN.load(tmp_path / "f4")(images), load(folder)(images))
    none = (folder / "none.ckpt", folder / "model.yaml")
    ran = command("clipgen-convert", "taming", *none, "--output", "other", cwd=tmp_path)
    assert ran.returncode == 1 and "none.ckpt" in ran.stderr and len(ran.stderr.splitlines()) == 1


@torch.no_grad()
def test_hfailab_transformer_logits_match_the_published_module(shared):
    folder = shared / "parity" / "hfailab_clip_gen"
    expected = {name: torch.from_numpy(array) for name, array in np.load(folder / "expected.npz").items()}
    transformer = ConditionalTransformer.from_hfailab(folder / "gpt.pt", n_head=4)
    logits = transformer(expected["indices"].flatten(1), expected["clip_embedding"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert expected["logits"].std() > 0.01
    # the decode loop is over the same weights: bias of the head and exact gelu included
    greedy = transformer.sample(expected["clip_embedding"], temperature=0)
    again = transformer(greedy, expected["clip_embedding"]).argmax(-1)
    assert torch.equal(greedy, again)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["encoder.conv_in", "encoder.", "e"])
def test_incomplete_hfailab_tokenizer_is_refused(shared, tmp_path, kept):
    full = torch.load(next((shared / "parity/hfailab_clip_gen").glob("vqgan*.pt")), weights_only=True)
    model = {name: tensor for name, tensor in full["model"].items() if name.startswith(kept)}
    torch.save(full | {"model": model}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part.pt does not fit the VQGAN"):
        VQGAN.from_hfailab(tmp_path / "part.pt")


@pytest.mark.slow
def test_hfailabs_pair_is_sampled_by_one_command(shared, tmp_path):
    """Their CLIP would be OpenAI's; a tiny one of the width that the fixture wants stands in."""
    folder = shared / "parity" / "hfailab_clip_gen"
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
    sizes = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    train_clip.write_config(tmp_path / "clip", sizes, ["a bus"], (0.5,) * 3, (0.5,) * 3)
    train_clip.save(open_clip.create_model(f"local-dir:{tmp_path / 'clip'}", load_weights=False), tmp_path / "clip")
    files = (folder / "vqgan.pt", folder / "gpt.pt", "--n-head", 4, "--clip", "clip")
    ran = command("clipgen-convert", "hfailab", *files, "--output", "pair", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    ran = command("clipgen-sample", "--checkpoint", "pair", "--prompt", "a bus", "--num-images", 1, cwd=tmp_path)
    assert ran.returncode == 0 and (tmp_path / "samples" / "grid.png").is_file(), ran.stderr


@pytest.mark.parametrize("option", [("--n-head", 4), ("--clip", "shapes")])
def test_settings_of_a_transformer_need_one(call, tmp_path, option):
    result = call("clipgen-convert", "hfailab", "vqgan.pt", *option, "--output", "model")
    assert result.code == 1 and "--n-head and --clip are settings of the transformer" in result.stderr


@pytest.mark.slow
def test_command_trains_a_converted_model_further(shared, tmp_path):
    vqgan = load(shared / "parity" / "taming_vqgan")
    vqgan.save(tmp_path / "f4", training=True)
    arguments = [
        "stage=vqgan",
        "init_from=f4",
        "output=run",
        "model.loss.perceptual_weight=0",
        "trainer.max_steps=1",
        "model.gan.weight=0.8",
        "model.gan.start_step=0",
        "model.optimizer.learning_rate=0",
        "data.train_size=32",
        "data.batch_size=4",
        "trainer.val_check_interval=1",
        "logger=none",
    ]
    ran = command("clipgen-train", *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    trained = VQGAN.load(tmp_path / "run")
    assert not changed(trained.autoencoder.encoder, weights_of(vqgan.autoencoder.encoder))
    assert trained.loss_config.codebook_weight == 1.0  # of the new training, not of the file


def test_lpips_of_a_state_is_frozen():
    from torchmetrics.functional.image.lpips import _LPIPS

    state = {k: v for k, v in _LPIPS(net="vgg", pnet_rand=True).state_dict().items() if not k.startswith("lins")}
    assert not lpips_from_state(state).training
