"""Model folders: what is refused, and that a failing write costs nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import changed, weights_of

from clipgen.checkpoint import model_folder
from clipgen.checkpoint.model_folder import load_arguments_and_state
from clipgen.pipeline import TextToImage
from clipgen.storage import atomic_folder
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

STATE = {"weight": torch.arange(6.0).view(2, 3), "counts": torch.tensor([1, 2])}


def saved(path: Path, **arguments) -> Path:
    return model_folder.save_folder(path, "VQGAN", {"ch": 32}, STATE, **arguments)


# ------------------------------------------------------------------------------------------------------- there and back


def test_saved_folder_loads_identically(tmp_path):
    arguments, state = load_arguments_and_state(saved(tmp_path / "deep" / "vqgan"), "VQGAN")
    assert arguments == {"ch": 32} and set(state) == set(STATE)
    assert all(torch.equal(state[name], STATE[name]) and state[name].dtype == STATE[name].dtype for name in STATE)
    assert sorted(p.name for p in (tmp_path / "deep" / "vqgan").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "deep/vqgan/config.json").read_text())["model"] == "VQGAN"


def test_half_halves_floats_only(tmp_path):
    _, state = load_arguments_and_state(saved(tmp_path / "vqgan", half=True), "VQGAN")
    assert state["weight"].dtype == torch.float32 and torch.equal(state["weight"], STATE["weight"])
    assert state["counts"].dtype == torch.int64


def test_shared_and_strided_memory(tmp_path):
    """Tied weights, a transposed view and a slice: safetensors takes none of them as they are."""
    full = torch.arange(12.0).view(3, 4)
    state = {"a": full, "tied": full, "transposed": full.T, "slice": full[:, 1]}
    _, again = load_arguments_and_state(model_folder.save_folder(tmp_path / "m", "VQGAN", {}, state), "VQGAN")
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_the_folder_that_is_replaced_is_gone(tmp_path):
    path = saved(tmp_path / "vqgan")
    model_folder.save_folder(path, "VQGAN", {"ch": 64}, {"other": torch.zeros(1)})
    arguments, state = load_arguments_and_state(path, "VQGAN")
    assert arguments == {"ch": 64} and set(state) == {"other"}
    assert [p.name for p in tmp_path.iterdir()] == ["vqgan"]


def test_names_of_the_bundled_model_and_of_the_hub(tmp_path, monkeypatch):
    """Each part is found by the name of the whole; a path is a path, whatever it is called."""
    pipe = TextToImage.load("shapes")
    uploaded = {"me/shapes": str(pipe.save(tmp_path / "hub"))}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: uploaded[name])
    for name in ("shapes", "hf-hub:me/shapes"):
        assert not changed(VQGAN.load(name), weights_of(pipe.vqgan))
        assert not changed(ConditionalTransformer.load(name), weights_of(pipe.transformer))
    with pytest.raises(FileNotFoundError, match="shapes does not exist"):
        VQGAN.load(Path("shapes"))


@pytest.mark.parametrize("error", [OSError("no route"), huggingface_hub.errors.HFValidationError("no route")])
def test_a_name_that_the_hub_does_not_give(monkeypatch, error):
    def failing(name, **_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    for model in (VQGAN, TextToImage):
        with pytest.raises(FileNotFoundError, match=r"^hf-hub:me/none could not be downloaded: no route$"):
            model.load("hf-hub:me/none")


def test_other_folders_are_not_replaced(tmp_path):
    """A wrong path must not delete other files."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "notes").write_text("precious")
    for name in ("thesis", "notes"):
        with pytest.raises(FileExistsError, match=name):
            saved(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == (tmp_path / "notes").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert load_arguments_and_state(saved(tmp_path / "empty"), "VQGAN")[0] == {"ch": 32}


def test_finished_model_precedes_best_and_last_checkpoint(tmp_path, tiny_vqgan, fit):
    """The finished model first, then the best checkpoint, then the last."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    trained = VQGAN(**dict(tiny_vqgan.hparams))
    fit(trained, 1, batch=2).save_checkpoint(last)
    assert model_folder.find_model(tmp_path, "VQGAN") == last and not changed(VQGAN.load(tmp_path), weights_of(trained))
    last.with_name("best.ckpt").write_bytes(last.read_bytes())
    assert model_folder.find_model(tmp_path, "VQGAN").name == "best.ckpt"
    tiny_vqgan.save(tmp_path / "vqgan")
    assert model_folder.find_model(tmp_path, "VQGAN") == tmp_path / "vqgan"
    assert not changed(VQGAN.load(tmp_path), weights_of(tiny_vqgan))


# ------------------------------------------------------------------------------------------------------- failing writes


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    """A real one: the system refuses files of more than 4 kB."""
    resource = pytest.importorskip("resource")
    path, large = saved(tmp_path / "vqgan"), {"weight": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError):
            model_folder.save_folder(path, "VQGAN", {"ch": 64}, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_arguments_and_state(path, "VQGAN")[0] == {"ch": 32}
    assert [p.name for p in tmp_path.iterdir()] == ["vqgan"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("method", ["write_bytes", "write_text", "rename"])
def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch, method, existing):
    """Wherever it strikes, even between two moves where folders cannot be exchanged."""
    path = saved(tmp_path / "vqgan") if existing else tmp_path / "vqgan"
    original = getattr(Path, method)

    def fail(self: Path, *arguments, **options):
        if method == "rename" and "new" not in self.parts[-2:]:
            return original(self, *arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # in the middle of a file the system names none

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        patch.setattr(atomic_folder, "exchange", lambda *_: False)
        with pytest.raises(OSError, match=r"No space left.*vqgan"):
            model_folder.save_folder(path, "VQGAN", {"ch": 64}, STATE)
    assert [p.name for p in tmp_path.iterdir()] == (["vqgan"] if existing else [])
    if existing:
        arguments, state = load_arguments_and_state(path, "VQGAN")
        assert arguments == {"ch": 32} and torch.equal(state["weight"], STATE["weight"])


# ------------------------------------------------------------------------------------------------ the wrong thing given


@pytest.mark.parametrize(
    ("model", "command"),
    [(VQGAN, "clipgen-train stage=vqgan"), (ConditionalTransformer, "clipgen-train stage=transformer")],
)
def test_a_missing_path_names_the_command(tmp_path, model, command):
    for path in (tmp_path / "none", tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            model.load(path)
        assert str(path) in str(error.value) and command in str(error.value)


def test_model_of_the_other_stage_is_refused(tmp_path, tiny_vqgan, tiny_transformer, fit):
    tiny_vqgan.save(tmp_path / "vqgan")
    tiny_transformer.save(tmp_path / "transformer")
    fit(VQGAN(**dict(tiny_vqgan.hparams)), 1, batch=2).save_checkpoint(tmp_path / "vqgan.ckpt")
    for path in (tmp_path / "vqgan", tmp_path / "vqgan.ckpt"):
        with pytest.raises(ValueError, match=r"is a VQGAN checkpoint .*but a ConditionalTransformer is needed"):
            ConditionalTransformer.load(path)
    with pytest.raises(ValueError, match=r"is a ConditionalTransformer checkpoint .*but a VQGAN is needed"):
        VQGAN.load(tmp_path / "transformer")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b'{"model": "VQGAN"}'),
        ("config.json", b'{"model": "VQGAN", "arguments": {"no_such_argument": 1}}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage" * 100),
        ("model.safetensors", None),
        ("model.safetensors", "half"),
        ("model.safetensors", "other"),
    ],
)
def test_damaged_folders_are_refused_by_name(tmp_path, tiny_vqgan, name, content):
    path = tiny_vqgan.save(tmp_path / "vqgan")
    file = path / name
    if content is None:
        file.unlink()
    elif content == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif content == "other":  # a whole file, of another model
        file.write_bytes((saved(tmp_path / "other") / name).read_bytes())
    else:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        VQGAN.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 no zip", bytes(range(256)) * 20, b"\x80\x02.", b"(lp0\n.", "half", "flipped"],
)
def test_damaged_checkpoints_are_refused_by_name(tmp_path, tiny_vqgan, fit, content):
    path = tmp_path / "last.ckpt"
    if isinstance(content, str):
        fit(VQGAN(**dict(tiny_vqgan.hparams)), 1, batch=2).save_checkpoint(path)
        full = path.read_bytes()
        middle = len(full) // 2
        content = full[:middle] if content == "half" else full[:64] + b"\0" * 512 + full[576:]
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        VQGAN.load(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 500


def test_other_peoples_checkpoints_are_named_as_such(tmp_path):
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(3), {"clipgen_model": "Something"}):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(
            ValueError,
            match=r"other.ckpt is not a (clipgen|readable) checkpoint(, but a VQGAN is|: it contains a)",
        ):
            VQGAN.load(tmp_path / "other.ckpt")
