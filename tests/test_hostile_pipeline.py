"""A pipeline's folder is one thing: never a mixture, never published with strangers' files, never a reason to crash."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from safetensors.torch import save_file

from clipgen import TextToImage
from clipgen.bundled import BUNDLED
from clipgen.clip import FrozenCLIP
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.model_card import cell, settings_of, training_settings
from clipgen.storage import atomic_folder, files
from clipgen.storage.files import atomic_write, flush_to_disk, read_json, read_yaml, write_json
from clipgen.tokenizer_identity import vqgan_identity
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN


@pytest.fixture
def other(pipe) -> TextToImage:
    """Return a pipeline of the same sizes with a projector."""
    torch.manual_seed(1)
    parts = make_vqgan(**VQGAN_SIZES).eval(), make_transformer(**TRANSFORMER_SIZES).eval()
    return TextToImage(*parts, pipe.clip, EmbeddingProjector(shift=torch.ones(64)))


def entries(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir()}


def killed(work) -> bool:
    """Do something in another process; return whether it was killed (exit code 9)."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def kill_at_move(number: int, monkeypatch) -> None:
    """Let this process end without a word before one of a swap's moves."""
    rename, seen = Path.rename, []

    def count(self: Path, target: Path) -> Path:
        if ".swapping" in f"{self} {target}":
            seen.append(self)
            if len(seen) > number:
                os._exit(9)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", count)


# --------------------------------------------------------------------------------------------------------- one thing

EVERY = [pytest.param(foreign, range(40), marks=pytest.mark.slow) for foreign in (False, True)]


@pytest.mark.parametrize(("foreign", "numbers"), [(False, [3, 40]), (True, [0, 40]), *EVERY])
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new(pipe, other, tmp_path, monkeypatch, foreign, numbers):
    """Where two folders cannot be exchanged: the moves that are missing are made by the next load."""
    monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
    first = pipe.save(tmp_path / "first")
    if foreign:
        (first / "checkpoints").mkdir()
    for number in numbers:
        root = shutil.copytree(first, tmp_path / str(number))

        def save(number=number, root=root) -> None:
            kill_at_move(number, monkeypatch)
            other.save(root)

        ended = killed(save)
        expected = pipe if number == 0 else other
        assert TextToImage.load(root).fingerprint == expected.fingerprint
        assert TextToImage.load(other.save(root)).fingerprint == other.fingerprint
        assert entries(root) == entries(first) | {"projector.safetensors"}
        assert not list(tmp_path.glob(".*"))
        if not ended:
            break
    assert not ended and number > 6


def test_a_pipeline_is_exchanged_in_one_step(pipe, other, tmp_path, monkeypatch):
    root, moments = pipe.save(tmp_path / "pipe"), []
    exchange = atomic_folder.exchange

    def watch(new: Path, path: Path) -> bool:
        moments.append(TextToImage.load(root).fingerprint)
        done = exchange(new, path)
        moments.append(TextToImage.load(root).fingerprint)
        return done

    monkeypatch.setattr(atomic_folder, "exchange", watch)
    other.save(root)
    assert moments[0] == pipe.fingerprint and TextToImage.load(root).fingerprint == other.fingerprint
    if exchange(tmp_path / "pipe" / "vqgan", tmp_path / "pipe" / "transformer"):  # a system that can
        assert moments[1] == other.fingerprint
    assert entries(tmp_path) == {"pipe"}


def test_a_save_that_fails_leaves_the_old_pipeline_and_nothing_else(pipe, other, tmp_path, monkeypatch):
    root = pipe.save(tmp_path / "pipe")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ConditionalTransformer, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*pipe"):
        other.save(root)
    assert TextToImage.load(root).fingerprint == pipe.fingerprint and entries(tmp_path) == {"pipe"}


def test_what_a_running_process_writes_is_left_alone(pipe, tmp_path):
    root = pipe.save(tmp_path / "pipe")
    names = [
        f".pipe.{files.host_name()}.{os.getppid()}.ab12.partial",
        ".pipe.another-machine.1.ab12.partial",
        ".pipe.mine.partial",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f".pipe.{files.host_name()}.4194305.ab12.partial").mkdir()  # more than Linux's largest process id
    pipe.save(root)
    assert entries(tmp_path) == {"pipe", *names}


def test_a_strangers_unfinished_swap_moves_nothing_out_of_the_folder(pipe, tmp_path):
    root = pipe.save(tmp_path / "pipe")
    swapping = root / f".pipe.{files.host_name()}.4194305.ab12.swapping"
    (tmp_path / "outside").mkdir()
    (swapping / "new").mkdir(parents=True)
    (swapping / "old").symlink_to(tmp_path / "outside")
    write_json(swapping / "names.json", {"names": ["vqgan"], "entries": ["vqgan"]})
    assert TextToImage.load(root).fingerprint == pipe.fingerprint
    assert entries(tmp_path / "outside") == set()
    (swapping / "old").unlink()
    (swapping / "old").mkdir()
    for names in (["../../outside"], ["/etc/passwd"], [5], [".."]):
        write_json(swapping / "names.json", {"names": names, "entries": names})
        with pytest.raises(ValueError, match=r"names.json must contain names without folders"):
            TextToImage.load(root)
    assert (tmp_path / "outside").is_dir() and entries(root) >= {"vqgan", "transformer", "clip.json"}


def test_a_model_folders_save_is_completed_by_the_next_load(pipe, other, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
    root = pipe.vqgan.save(tmp_path / "vqgan")

    def save() -> None:
        kill_at_move(4, monkeypatch)
        other.vqgan.save(root)

    assert killed(save) and entries(root) == {"config.json"}
    assert vqgan_identity(VQGAN.load(root)) == vqgan_identity(other.vqgan)
    assert entries(tmp_path) == {"vqgan"}


def test_files_of_others_stay(pipe, other, tmp_path):
    """In a run's folder; and a card that somebody wrote, in whatever encoding."""
    root = pipe.save(tmp_path / "run")
    (root / "checkpoints").mkdir()
    (root / "config.yaml").write_text("seed: 0\n")
    (root / "README.md").write_bytes("mine, caf\xe9".encode("latin-1"))
    other.save(root)
    assert {"checkpoints", "config.yaml"} <= entries(root)
    assert (root / "README.md").read_bytes() == b"mine, caf\xe9"
    assert TextToImage.load(root).fingerprint == other.fingerprint


@pytest.mark.parametrize("part", ["vqgan", "transformer", "clip"])
def test_a_part_that_is_something_else_is_not_removed(pipe, tmp_path, part):
    (tmp_path / "pipe" / part).mkdir(parents=True)
    (tmp_path / "pipe" / part / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="move it away, or name another place"):
        pipe.save(tmp_path / "pipe")
    assert (tmp_path / "pipe" / part / "thesis.txt").read_text() == "mine"


def test_the_working_folder_can_be_saved_to(pipe, other, tmp_path, monkeypatch):
    monkeypatch.chdir(pipe.save(tmp_path / "pipe"))
    other.save(".")
    assert TextToImage.load(".").fingerprint == other.fingerprint and entries(tmp_path) == {"pipe"}


# ------------------------------------------------------------------------------------------------------- mixed parts


@pytest.mark.parametrize("half", [False, True])
def test_a_tokenizer_of_another_pipeline_is_refused(pipe, other, tmp_path, half):
    first, second = pipe.save(tmp_path / "first", half), other.save(tmp_path / "second", half)
    assert TextToImage.load(first) and TextToImage.load(second)
    shutil.rmtree(first / "vqgan")
    shutil.copytree(second / "vqgan", first / "vqgan")
    with pytest.raises(ValueError, match="first/transformer was trained with another tokenizer than the one next"):
        TextToImage.load(first)


def test_a_tokenizer_with_its_codes_permuted_is_refused(pipe, tmp_path):
    """It has the same sizes, loads, and would generate nonsense."""
    root = pipe.save(tmp_path / "pipe")
    (codebook,) = [v for k, v in pipe.vqgan.active_model.state_dict().items() if "quantize" in k and v.shape == (16, 8)]
    codebook.copy_(codebook.flip(0))
    pipe.vqgan.save(root / "vqgan")
    with pytest.raises(ValueError, match="another tokenizer"):
        TextToImage.load(root)


def test_the_bundled_pipeline_is_bound():
    root = BUNDLED["shapes"]
    assert "vqgan" in read_json(root / "transformer" / "config.json")
    TextToImage.load("shapes")


@pytest.mark.parametrize(
    "shift",
    [torch.full((64,), float("nan")), torch.zeros(64, dtype=torch.int8), torch.zeros(2, 64), torch.zeros(0)],
    ids=["nan", "int8", "matrix", "empty"],
)
def test_invalid_projector_is_refused(pipe, tmp_path, shift):
    root = pipe.save(tmp_path / "pipe")
    save_file({"shift": shift}, root / "projector.safetensors", {"neighbors": "8", "temperature": "0.01"})
    with pytest.raises(ValueError, match=r"the projector .*projector.safetensors is damaged: shift must"):
        TextToImage.load(root)


@pytest.mark.parametrize(("name", "shape"), [("shift", (1,)), ("shift", (128,)), ("memory", (3, 128))])
def test_projector_of_another_clip_is_refused(pipe, tmp_path, name, shape):
    root = pipe.save(tmp_path / "pipe")
    tensors = {name: torch.ones(shape)}
    save_file(tensors, root / "projector.safetensors", {"neighbors": "8", "temperature": "0.01"})
    with pytest.raises(ValueError, match=rf"{name} of the projector must be 64 wide"):
        TextToImage.load(root)


@pytest.mark.parametrize("metadata", [{"neighbors": "x", "temperature": "1"}, {"neighbors": "8", "temperature": "nan"}])
def test_invalid_projector_settings_name_the_file(pipe, tmp_path, metadata):
    root = pipe.save(tmp_path / "pipe")
    save_file({"shift": torch.zeros(64)}, root / "projector.safetensors", metadata)
    with pytest.raises(ValueError, match=r"the projector .*projector.safetensors is damaged"):
        TextToImage.load(root)


# -------------------------------------------------------------------------------------------------- what is published


def test_nothing_but_a_pipeline_is_published(pipe, tmp_path, monkeypatch):
    """Links and other files of a stranger's folder stay where they are."""
    import huggingface_hub

    own = shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "own")
    root = TextToImage(pipe.vqgan, pipe.transformer, FrozenCLIP(str(own))).save(tmp_path / "pipe")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("PRIVATE KEY")
    for link in ("clip/assets", "assets"):
        (root / link).symlink_to(tmp_path / "home")
    for link in ("clip/LICENSE", "LICENSE", "vqgan/more.json"):
        (root / link).symlink_to(tmp_path / "home" / "id_rsa")
    (root / "README.md").unlink()
    (root / "README.md").symlink_to(tmp_path / "home" / "id_rsa")
    published = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, repo_id, folder_path, **_):
            for path in Path(folder_path).rglob("*"):
                assert not path.is_symlink()
                if path.is_file():
                    published[path.relative_to(folder_path).as_posix()] = path.read_bytes()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    TextToImage.load(root).push_to_hub("me/model")
    assert not any(b"PRIVATE KEY" in content for content in published.values())
    model = {f"{part}/{name}" for part in ("vqgan", "transformer") for name in ("config.json", "model.safetensors")}
    clip = {f"clip/{path.name}" for path in own.iterdir()}
    assert set(published) == model | clip | {"clip.json", "sampling.json", "README.md"}


@pytest.mark.parametrize(
    "link", ["vqgan", "transformer/config.json", "vqgan/model.safetensors", "projector.safetensors", "sampling.json"]
)
def test_links_out_of_a_pipeline_are_refused(other, tmp_path, link):
    root = other.save(tmp_path / "pipe")
    (root / link).rename(tmp_path / "elsewhere")
    (root / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"must lie in .*pipe, got a link to .*elsewhere"):
        TextToImage.load(root)


def test_settings_of_another_run_are_not_published(pipe, tmp_path, caplog):
    root = pipe.save(tmp_path / "pipe")
    (tmp_path / "config.yaml").write_text("data: {secret: 1}\n")
    (root / "config.yaml").symlink_to(tmp_path / "config.yaml")
    assert TextToImage.load(root).training == {} and "got a link to" in caplog.text


def test_a_card_holds_no_markup_of_others(pipe, tmp_path):
    root = pipe.save(tmp_path / "pipe")
    evil = "x | y |\n\n# Title\n<script>alert(1)</script> [click](x) `code` ![p](q)"
    settings = {
        "data": {"kind": evil, "a|b\n<b>": 1, "root": "/home/me", "batch_size": 8},
        "evil\n|": {"a": 1},
        "trainer": 5,
    }
    (root / "training.json").write_text(json.dumps(settings))
    once = TextToImage.load(root).save(tmp_path / "once")
    card = (once / "README.md").read_text()
    table = card.partition("|---|---|---|\n")[2].splitlines()
    assert "| data | batch_size | 8 |" in table
    assert all(row.replace(r"\|", "").count("|") == 4 for row in table if row)
    assert "<script>" not in card and "[click]" not in card and "evil" not in card and "/home" not in card
    assert read_json(once / "training.json").keys() == {"data"}
    assert "\n" not in cell(evil) and "<" not in cell(evil)


@pytest.mark.parametrize(
    "text",
    [
        "seed: 0\n",
        "data: null\n",
        "data: [1]\n",
        "a: !!python/object/apply:os.mkdir [x]\n",
        "{",
        "[" * 5000,
        "- 1\n",
        "a: &a [1]\nb: [*a, *a]\n",
        "a: 2001-99-99\n",
        "\0",
    ],
)
def test_what_only_the_card_needs_never_prevents_loading(pipe, tmp_path, text):
    root = pipe.save(tmp_path / "run")
    (root / "config.yaml").write_text(text)
    assert TextToImage.load(root).training == {}
    for damaged in ("{", '{"data": 1}', "[]", "[" * 10**5):
        (root / "training.json").write_text(damaged)
        assert TextToImage.load(root).training == {}


def test_settings_that_a_card_cannot_hold_are_left_out():
    assert settings_of({"data": {"a": 1, "b": None, "c": [1], "d": "/x", "e": "x" * 300, 5: 1}}) == {"data": {"a": 1}}
    assert settings_of(None) == settings_of([1]) == {}


# ------------------------------------------------------------------------------------------------------------- files


def test_yaml_with_aliases_is_refused_at_once(tmp_path):
    """Nine levels of nine: 520 bytes that unfold to billions of values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 11)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"bomb.yaml is damaged: aliases \(\*name\) are not allowed, got one in line 2"
    ):
        read_yaml(tmp_path / "bomb.yaml")


@pytest.mark.parametrize("text", ["{", "a: !!python/name:os.system", "[" * 10**5, "\0", "a: 2001-99-99"])
def test_damaged_yaml_is_named(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x.yaml is damaged") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


def test_plain_yaml_is_read_as_it_is(tmp_path):
    content = {"a": [1, 2.5, None, True], "b": {"c": "d"}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    assert read_yaml(tmp_path / "x.yaml") == content


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5])
def test_json_that_is_too_deep_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json is damaged: its values are nested too deeply"):
        read_json(tmp_path / "x.json")


def test_json_of_many_small_values_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [' + "[]," * 3_000_000 + "0]}")
    with pytest.raises(ValueError, match=r"a\.json is damaged: it must contain at most 4000000 values"):
        read_json(tmp_path / "a.json")


def test_files_that_are_too_large_to_parse_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 10)
    monkeypatch.setattr(files, "MAX_YAML", 10)
    (tmp_path / "x").write_text('{"a": "long"}')
    for read in (read_json, read_yaml):
        with pytest.raises(ValueError, match="x must have at most 10 bytes, got 13"):
            read(tmp_path / "x")


def test_partial_files_of_interrupted_processes_are_removed_at_the_next_write(tmp_path):
    dead, running = 4194305, os.getppid()
    kept = [f".a.json.{files.host_name()}.{running}.partial", f".a.json.another-host.{dead}.partial", ".mine.partial"]
    for name in [*kept, f".b.json.{files.host_name()}.{dead}.partial"]:
        (tmp_path / name).touch()
    write_json(tmp_path / "a.json", {})
    assert entries(tmp_path) == {"a.json", *kept}


@pytest.fixture
def flushed(monkeypatch) -> list[str]:
    """What is flushed to the disk, and renamed, in order."""
    events: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def name(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    monkeypatch.setattr(os, "fsync", lambda handle: events.append(f"flush {name(handle)}") or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append(f"rename to {to.name}") or replace(self, to))
    monkeypatch.setattr(Path, "rename", lambda self, to: events.append(f"rename to {to.name}") or rename(self, to))
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux for the names of open files")
def test_a_file_and_its_folder_are_flushed_around_the_rename(tmp_path, flushed):
    with atomic_write(tmp_path / "x") as partial:
        partial.write_text("content")
    assert flushed == [f"flush {partial.name}", "rename to x", f"flush {tmp_path.name}"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux for the names of open files")
def test_a_pipeline_is_flushed_before_it_is_put_in_its_place(pipe, tmp_path, flushed):
    pipe.save(tmp_path / "pipe")
    at = flushed.index("rename to pipe")
    assert {"flush model.safetensors", "flush clip.json", "flush README.md", "flush new"} <= set(flushed[:at])
    assert flushed[at + 1 :] == [f"flush {tmp_path.name}"]


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    flush_to_disk(tmp_path)


def test_training_settings_of_nothing(tmp_path):
    assert training_settings(tmp_path) == {}


# ----------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("clipgen-baseline", ["search"]), ("clipgen-baseline", ["biggan-clip"]), ("clipgen-eval", [])],
)
def test_the_help_says_what_is_code(call, command, arguments):
    text = " ".join(call(command, *arguments, "--help").stdout.split())
    assert "name only" in text and "that you trust" in text and "code" in text


def test_every_row_of_the_security_page_names_its_tests():
    root = Path(__file__).parents[1]
    page = (root / ".github" / "SECURITY.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "you open" not in line]
    assert len(rows) > 5
    for row in rows:
        modules = re.findall(r"`(test_\w+\.py)`", row.split("|")[-2])
        assert modules and all((root / "tests" / module).is_file() for module in modules), row


def test_training_a_loaded_tokenizer_reads_no_model_that_its_maker_named(tmp_path, fit, monkeypatch, caplog):
    """A folder must not make the program load a CLIP, or read a file, that its maker chose."""
    sizes = VQGAN_SIZES | dict(clip_perceptual_weight=1.0, clip_perceptual_model="hf-hub:evil/x")
    folder = make_vqgan(**sizes, vgg_weights="/etc/passwd").eval().save(tmp_path / "vqgan")
    monkeypatch.setattr(FrozenCLIP, "from_spec", lambda spec: pytest.fail(f"loads {spec}"))
    vqgan = VQGAN.load(folder)
    assert vqgan.loss_config.vgg_weights is None and vqgan.loss_config.clip_perceptual_model is None
    assert VQGAN.load(vqgan.save(tmp_path / "copy")).had_clip_perceptual_loss
    fit(vqgan, 1, batch=2)
    assert "was trained with a CLIP perceptual loss; training continues without it" in caplog.text
