"""The text-to-image pipeline: generation, reranking, prompts, saving and loading."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from models import TRANSFORMER_SIZES, make_transformer
from PIL import Image

import clipgen
from clipgen import TextToImage
from clipgen.bundled import BUNDLED
from clipgen.clip import FrozenCLIP
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.images import from_pil, to_pil
from clipgen.models.kv_cache import CompiledDecoder
from clipgen.sampling_params import SamplingParams
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

PROMPT = "a large blue ring on a white background"


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_pipeline_returns_rgb_images(pipe):
    results = pipe(PROMPT, num_images=3, seed=0)
    assert len(results) == 3 and pixels(results).shape == (3, 32, 32, 3)
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in results)
    assert pixels(results).std() > 1


def test_pipeline_matches_its_parts(pipe):
    """Prompt -> embedding -> indices -> image, by hand."""
    e = pipe.clip.encode_text([PROMPT])
    indices = pipe.transformer.sample(e, seed=9, top_k=5)
    with torch.no_grad():
        image = pipe.vqgan.decode(indices.view(1, 4, 4)).clamp(-1, 1)[0]
    expected = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(pipe(PROMPT, seed=9, top_k=5)[0]), expected)


def test_seed_determines_the_images(pipe):
    first = pixels(pipe(PROMPT, num_images=2, seed=4))
    torch.manual_seed(99)  # the global state has no influence
    assert np.array_equal(pixels(pipe(PROMPT, num_images=2, seed=4)), first)
    assert not np.array_equal(pixels(pipe(PROMPT, num_images=2, seed=5)), first)
    assert not np.array_equal(pixels(pipe("a small red star on a black background", num_images=2, seed=4)), first)


def test_image_i_uses_seed_plus_i(pipe, monkeypatch):
    monkeypatch.setattr("clipgen.generation.generator.DECODE_BATCH_SIZE", 2)  # three batches
    together = pixels(pipe(PROMPT, num_images=5, seed=20))
    alone = np.concatenate([pixels(pipe(PROMPT, seed=20 + j)) for j in range(5)])
    assert np.array_equal(together, alone)
    assert len(np.unique(together.reshape(5, -1), axis=0)) > 1


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (dict(rerank_from=5), dict(outpaint=True, keep_fraction=0.25))
        ),
    ],
)
def test_images_of_a_prompt_do_not_depend_on_the_batch(pipe, monkeypatch, options):
    monkeypatch.setattr("clipgen.generation.generator.DECODE_BATCH_SIZE", 4)  # batches end within a prompt
    prompts = [PROMPT, {PROMPT: 1.0, "a red star": -0.3}, pipe(PROMPT, seed=8)[0], pipe.embed("a red star")[0]]
    options = options | dict(seed=3, outpaint=prompts[2] if "outpaint" in options else None)
    together = pipe(prompts, 3, **options)
    alone = []
    for prompt in prompts:
        alone += pipe(prompt, 3, **options)
    assert [image.info for image in together] == [image.info for image in alone]
    assert np.array_equal(pixels(together), pixels(alone))
    assert len(np.unique(pixels(together).reshape(12, -1), axis=0)) > 4


def test_random_seed_is_recorded(pipe):
    image = pipe(PROMPT)[0]
    assert np.array_equal(np.asarray(pipe(PROMPT, seed=image.info["seed"])[0]), np.asarray(image))


def test_metadata_reproduces_the_image(pipe):
    settings = dict(temperature=0.9, top_k=7, top_p=0.8, guidance_scale=2.0, guidance_power=1.0)
    for i, image in enumerate(pipe(PROMPT, num_images=2, seed=3, **settings)):
        model = dict(clipgen=clipgen.__version__, model=pipe.fingerprint)
        assert image.info == dict(prompt=PROMPT, prompt_kind="text", seed=3 + i, **settings, **model)
        again = pipe(PROMPT, seed=image.info["seed"], **settings)[0]
        assert np.abs(np.asarray(again).astype(int) - np.asarray(image)).max() <= 1


def test_params_and_keywords_generate_the_same(pipe):
    settings = dict(temperature=0.9, top_k=7, top_p=0.8, guidance_scale=2.0, guidance_power=1.0)
    by_name = pixels(pipe(PROMPT, num_images=2, seed=3, **settings))
    assert np.array_equal(pixels(pipe(PROMPT, 2, SamplingParams(**settings), seed=3)), by_name)
    other = SamplingParams(**(settings | {"top_k": 1}))
    assert np.array_equal(pixels(pipe(PROMPT, 2, other, seed=3, top_k=7)), by_name)


def test_reranking_returns_the_highest_scores(pipe):
    """All candidates are scored by hand."""
    candidates = pipe(PROMPT, num_images=12, seed=0)
    images = torch.from_numpy(pixels(candidates)).permute(0, 3, 1, 2) / 127.5 - 1
    scores = (pipe.clip.encode_image(images) @ pipe.clip.encode_text([PROMPT]).T)[:, 0]
    best = scores.argsort(descending=True)[:3].tolist()
    chosen = pipe(PROMPT, num_images=3, rerank_from=12, seed=0)
    assert [image.info["seed"] for image in chosen] == best
    assert np.array_equal(pixels(chosen), pixels([candidates[i] for i in best]))
    assert best != [0, 1, 2]


def test_reranking_uses_the_unprojected_embedding(pipe):
    """The projector only affects generation."""
    pipe.projector = EmbeddingProjector(shift=5 * torch.nn.functional.normalize(torch.randn(64), dim=0))
    images = pipe.generate(pipe.embed(PROMPT).expand(12, -1), 0)
    scores = pipe.clip_scores(images, pipe.clip.encode_text([PROMPT]).expand(12, -1))
    assert torch.allclose(scores, (pipe.clip.encode_image(images) @ pipe.clip.encode_text([PROMPT]).T)[:, 0])
    chosen = pipe(PROMPT, num_images=3, rerank_from=12, seed=0)
    assert [image.info["seed"] for image in chosen] == scores.argsort(descending=True)[:3].tolist()


def test_generation_changes_no_gradients_or_modes(pipe):
    pipe(PROMPT, rerank_from=2)
    for part in (pipe.vqgan, pipe.transformer, pipe.clip):
        assert not part.training and not any(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=""), "prompt must not be empty, got ''"),
        (dict(prompt=" \n"), "prompt must not be empty"),
        (dict(prompt=[]), "prompt must contain at least one prompt, got an empty list"),
        (dict(prompt=PROMPT, num_images=0), "num_images must be at least 1, got 0"),
        (dict(prompt=PROMPT, num_images=4, rerank_from=3), r"rerank_from must be at least num_images \(4\), got 3"),
        (dict(prompt=PROMPT, rerank_from=0), "rerank_from must be at least"),
        (dict(prompt=PROMPT, top_p=1.3), r"top_p must be in \(0, 1\], got 1.3"),
        (dict(prompt=PROMPT, top_k=0), "top_k must be a whole number of at least 1, got 0"),
        (dict(prompt=PROMPT, temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (dict(prompt=PROMPT, guidance_scale=-2.0), "guidance_scale must be at least 0"),
    ],
)
def test_invalid_requests_raise(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_mismatched_parts_raise(tiny_vqgan, shapes_clip):
    for name, value in (("codebook_size", 17), ("clip_dim", 3), ("num_tokens", 15)):
        with pytest.raises(ValueError, match=name):
            TextToImage(tiny_vqgan, make_transformer(**(TRANSFORMER_SIZES | {name: value})), shapes_clip)


def test_saved_pipeline_generates_identical_images(tmp_path, pipe):
    again = TextToImage.load(pipe.save(tmp_path / "deep" / "pipe"))
    assert sorted(p.name for p in (tmp_path / "deep" / "pipe").iterdir()) == [
        "README.md",
        "clip.json",
        "sampling.json",
        "transformer",
        "vqgan",
    ]
    assert np.array_equal(pixels(again(PROMPT, 2, seed=1)), pixels(pipe(PROMPT, 2, seed=1)))
    again.save(tmp_path / "deep" / "pipe")  # onto itself
    assert np.array_equal(
        pixels(TextToImage.load(tmp_path / "deep" / "pipe")(PROMPT, seed=1)), pixels(pipe(PROMPT, seed=1))
    )


def test_default_sampling_parameters_are_saved_and_used_where_a_call_gives_none(tmp_path, pipe):
    greedy = TextToImage(pipe.vqgan, pipe.transformer, pipe.clip, params=SamplingParams(top_k=1, temperature=0.5))
    again = TextToImage.load(greedy.save(tmp_path / "pipe"))
    assert again.params == greedy.params and pipe.params == SamplingParams()
    assert again(PROMPT, seed=1)[0].info["top_k"] == 1 and again(PROMPT, seed=1, top_k=7)[0].info["top_k"] == 7
    assert again(PROMPT, seed=1, top_k=7)[0].info["temperature"] == 0.5
    assert again(PROMPT, seed=1, params=SamplingParams())[0].info["top_k"] == 300
    expected = pixels(pipe(PROMPT, seed=1, top_k=1, temperature=0.5))
    assert np.array_equal(pixels(again(PROMPT, seed=1)), expected)
    assert np.array_equal(pixels(to_pil(again.generate(again.encode_text([PROMPT]), seed=1))), expected)


@pytest.mark.parametrize("content", ['{"top_k": 0}', '{"beauty": 1}', '{"top_p": "1"}', "[]", "{"])
def test_damaged_default_sampling_parameters_are_named(tmp_path, pipe, content):
    path = pipe.save(tmp_path / "pipe")
    (path / "sampling.json").write_text(content)
    with pytest.raises(ValueError, match=r"sampling\.json is damaged"):
        TextToImage.load(path)


def test_clip_folder_is_saved_with_the_pipeline(tmp_path, pipe):
    """The pipeline can be moved to another place."""
    own = shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "own_clip")
    path = TextToImage(pipe.vqgan, pipe.transformer, FrozenCLIP(str(own))).save(tmp_path / "pipe")
    shutil.rmtree(own)
    moved = path.rename(tmp_path / "moved")
    assert json.loads((moved / "clip.json").read_text()) == {"model_name": "clip", "pretrained": None}
    again = TextToImage.load(moved)
    assert np.array_equal(pixels(again(PROMPT, seed=1)), pixels(pipe(PROMPT, seed=1)))
    final = again.save(tmp_path / "final")
    assert np.array_equal(pixels(TextToImage.load(final)(PROMPT, seed=1)), pixels(pipe(PROMPT, seed=1)))
    again.save(moved)  # onto itself
    assert np.array_equal(pixels(TextToImage.load(moved)(PROMPT, seed=1)), pixels(pipe(PROMPT, seed=1)))


def test_save_removes_the_files_of_an_older_clip(tmp_path, pipe):
    """A vocabulary of another CLIP would silently give wrong tokens."""
    root = tmp_path / "pipe"
    shutil.copytree(BUNDLED["shapes"] / "clip", root / "clip")
    (root / "clip" / "leftover.json").write_text("{}")
    own = shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "own_clip")
    TextToImage(pipe.vqgan, pipe.transformer, FrozenCLIP(str(own))).save(root)
    assert {p.name for p in (root / "clip").iterdir()} == {p.name for p in own.iterdir()}


def test_half_precision_pipeline(tmp_path, pipe):
    again = TextToImage.load(pipe.save(tmp_path / "pipe", half=True))
    assert np.asarray(again(PROMPT, seed=1)[0]).shape == (32, 32, 3)


def test_missing_parts_are_named(tmp_path, pipe):
    with pytest.raises(FileNotFoundError, match="clipgen-train stage=transformer"):
        TextToImage.load(tmp_path / "none")
    pipe.vqgan.save(tmp_path / "run" / "vqgan")
    with pytest.raises(FileNotFoundError, match="it contains a VQGAN"):
        TextToImage.load(tmp_path / "run")
    pipe.transformer.save(tmp_path / "run" / "transformer")
    with pytest.raises(FileNotFoundError, match=r"no clip.json in .*run"):
        TextToImage.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------- prompts


STAR = "a small red star on a black background"


def test_embed_accepts_texts_mixtures_images_and_embeddings(pipe, images):
    text = pipe.clip.encode_text([PROMPT, STAR])
    mixed = torch.nn.functional.normalize(0.7 * text[:1] - 0.2 * text[1:], dim=-1)
    torch.testing.assert_close(pipe.embed({PROMPT: 0.7, STAR: -0.2}), mixed)
    torch.testing.assert_close(pipe.embed(PROMPT), text[:1])
    torch.testing.assert_close(pipe.embed(3 * text[0]), text[:1])
    image = to_pil(images[:1])[0]
    torch.testing.assert_close(pipe.embed(image), pipe.clip.encode_image(images[:1]), atol=0.02, rtol=0)  # 8 bits


def test_image_and_mixture_prompts(pipe, images):
    image = to_pil(images[:1])[0]
    e = pipe.clip.encode_image(from_pil(image))
    by_hand = to_pil(pipe.generate(e, 5))[0]
    assert np.array_equal(np.asarray(pipe(image, seed=5)[0]), np.asarray(by_hand))
    mixed = pipe({PROMPT: 0.5, STAR: 0.5}, seed=5)[0]
    assert mixed.info["prompt_mix"] == {PROMPT: 0.5, STAR: 0.5} and mixed.info["prompt"] == f"0.5 {PROMPT} + 0.5 {STAR}"
    with pytest.raises(ValueError, match="prompt must not be empty"):
        pipe({})


@torch.no_grad()
def test_outpainting_keeps_the_upper_indices(pipe, images):
    image = to_pil(images[:1])[0]
    indices = []
    sample = pipe.transformer.sample
    pipe.transformer.sample = lambda *a, **k: indices.append(sample(*a, **k)) or indices[-1]
    pipe(PROMPT, num_images=3, outpaint=image, seed=1)
    kept = pipe.vqgan.encode(from_pil(image)).flatten(1)[:, :8]  # two rows of four
    assert torch.equal(indices[0][:, :8], kept.expand(3, -1))
    assert len(indices[0][:, 8:].unique(dim=0)) > 1
    assert pipe.upper_indices(image, 0.95).shape == (1, 12)  # the last row is generated
    assert pipe.upper_indices(image, 0.05).shape == (1, 4)
    with pytest.raises(ValueError, match=r"keep_fraction must be in \(0, 1\), got 1"):
        pipe(PROMPT, outpaint=image, keep_fraction=1)


def test_previews_are_the_upper_rows_of_the_image(pipe):
    """A decoder without attention depends on neighboring rows only, so the first rows can be decoded early."""
    seen = []
    pipe(PROMPT, num_images=2, seed=2, preview=seen.append)
    assert [tuple(images.shape) for images in seen] == [(2, 3, 8 * rows, 32) for rows in (1, 2, 3, 4)]
    final = pipe.generate(pipe.embed(PROMPT).expand(2, -1), [2, 3])
    assert torch.equal(seen[-1], final)


def test_progress_needs_no_decoding(pipe, monkeypatch):
    """A row of two images is half an image of work; each image is decoded once, at the end."""
    rows, decoded, decode = [], [], pipe.vqgan.decode
    monkeypatch.setattr(pipe.vqgan, "decode", lambda indices: decoded.append(tuple(indices.shape)) or decode(indices))
    pipe(PROMPT, num_images=2, seed=2, progress=rows.append)
    assert rows == [0.5] * 4 and decoded == [(1, 4, 4)] * 2
    strip = pipe.interpolate(PROMPT, STAR, steps=3, seed=7, progress=rows.append)
    assert sum(rows) == 5 and len(decoded) == 5 and "progress" not in strip[0].info


def test_interpolation_starts_and_ends_at_the_prompts(pipe):
    strip = pipe.interpolate(PROMPT, STAR, steps=5, seed=7)
    assert len(strip) == 5
    for image, prompt in ((strip[0], PROMPT), (strip[-1], STAR)):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(pipe(prompt, seed=7)[0])).max() <= 1
    info = pipe.interpolate({PROMPT: 1.0}, STAR, steps=2, seed=7, top_k=5)[1].info
    request = {"interpolate": [{PROMPT: 1.0}, STAR], "steps": 2, "seed": 7, "model": pipe.fingerprint}
    assert info.items() >= (request | asdict(SamplingParams()) | {"top_k": 5}).items()
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        pipe.interpolate(PROMPT, STAR, steps=1)


def test_out_of_memory_halves_the_batch_and_loses_no_image(pipe, monkeypatch):
    expected = pipe.generate(pipe.embed(PROMPT).expand(7, -1), 3)
    sample = pipe.transformer.sample
    sizes = []

    def sample_at_most_two(condition, params, **options):
        sizes.append(len(condition))
        if len(condition) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(condition, params, **options)

    monkeypatch.setattr(pipe.transformer, "sample", sample_at_most_two)
    images = pipe.generate(pipe.embed(PROMPT).expand(7, -1), 3)
    assert sizes == [7, 4, 2, 2, 2, 1]
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(
        pipe.transformer, "sample", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        pipe(PROMPT)


def test_batch_size_follows_the_free_gpu_memory(pipe, monkeypatch):
    """An image needs 2 x 2 layers x 16 positions x 32 channels x 4 bytes; half of the free memory is used."""
    row, pipe = 2 * 2 * 16 * 32 * 4, copy.deepcopy(pipe)
    assert pipe.batch_size(guided=False) == clipgen.generation.generator.DECODE_BATCH_SIZE
    monkeypatch.setattr(ConditionalTransformer, "device", torch.device("cuda"))
    for name, value in (("memory_reserved", 9 * row), ("memory_allocated", 3 * row)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for free, guided, expected in (
        (94, False, 32),
        (94, True, 16),
        (0, True, 1),
        (10**6, False, clipgen.generation.generator.MAX_GPU_BATCH_SIZE),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * row, 10**9 * row))
        assert pipe.batch_size(guided) == expected
    pipe.transformer.decoders = {
        "kept": CompiledDecoder(pipe.transformer.eval_model, 32)
    }  # is there for the next batch
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * row, 10**9 * row))
    assert pipe.batch_size(guided=False) == 32


def test_bfloat16_gives_nearly_the_same_images(pipe):
    half, settings = copy.deepcopy(pipe).to(dtype=torch.bfloat16), dict(top_k=1, seed=0)
    assert half.transformer.gpt.head.weight.dtype == torch.bfloat16 and half.fingerprint == pipe.fingerprint
    first = pipe.transformer.sample(pipe.embed(PROMPT), **settings)
    assert (half.transformer.sample(half.embed(PROMPT), **settings) == first).float().mean() > 0.5
    decoded = half.decode(first), pipe.decode(first)
    assert decoded[0].dtype == torch.float32 and (decoded[0] - decoded[1]).abs().mean() < 0.02
    guided = half(PROMPT, guidance_scale=2.0, seed=0)[0]
    assert guided.info["dtype"] == "bfloat16" and "dtype" not in pipe(PROMPT, seed=0)[0].info


def test_compiled_batches_are_padded_to_powers_of_two(pipe, monkeypatch):
    """Each size is compiled once. The compiler itself is tested in test_kv_cache.py."""
    compiled_functions = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled_functions.append(function) or function)
    compiled = copy.deepcopy(pipe).compile()
    assert compiled_functions.pop().__self__ is compiled.vqgan.active_model.decoder
    decoder = compiled.vqgan.active_model.decoder
    decoded = []
    hook = decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output)))
    for batch_size, guidance in ((3, 1.0), (4, 1.0), (1, 1.0), (3, 2.0)):
        e, settings = pipe.embed(PROMPT).expand(batch_size, -1), dict(seed=0, guidance_scale=guidance)
        torch.testing.assert_close(compiled.generate(e, **settings), pipe.generate(e, **settings), atol=1e-4, rtol=0)
    assert [function.__self__.cache_shape[0] for function in compiled_functions] == [4, 1, 8]
    assert decoded == [4, 4, 1, 4]
    hook.remove()
    other = copy.deepcopy(compiled)
    torch.nn.init.normal_(other.transformer.gpt.head.weight)
    assert other.transformer.decoders == {} and len(compiled.transformer.decoders) == 3
    e = pipe.embed(PROMPT)
    indices = other.transformer.sample(e, seed=0)
    other.transformer.compiled = False
    assert torch.equal(indices, other.transformer.sample(e, seed=0))  # the copy uses its own weights
    pickle.loads(pickle.dumps(compiled.transformer))


def test_to_accepts_the_loaded_dtype_or_bfloat16(pipe):
    half = copy.deepcopy(pipe).to(dtype=torch.bfloat16)
    assert half.to("cpu", torch.bfloat16) is half
    assert TextToImage(half.vqgan, half.transformer, half.clip).dtype == torch.bfloat16
    for wrong, message in (
        (dict(dtype=torch.float32), "got torch.float32 after torch.bfloat16"),
        (dict(dtype=torch.float16), "got torch.float16"),
        (dict(device=torch.bfloat16), r"to\(dtype=torch.bfloat16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            half.to(**wrong)


def test_previews_are_decoded_in_batches(pipe, monkeypatch):
    sizes, decode = [], pipe.vqgan.decode
    monkeypatch.setattr(clipgen.generation.generator, "DECODE_BATCH_SIZE", 2)
    monkeypatch.setattr(type(pipe), "batch_size", lambda self, guided: 5)
    monkeypatch.setattr(pipe.vqgan, "decode", lambda indices: sizes.append(len(indices)) or decode(indices))
    assert len(pipe(PROMPT, 5, seed=0, preview=lambda images: None)) == 5
    assert set(sizes) == {1}  # one at a time on a CPU, so that images do not depend on the batch
    monkeypatch.setattr(pipe.transformer, "compiled", True)
    assert pipe.decode(torch.zeros(5, 16, dtype=torch.int64)).shape[0] == 5 and set(sizes) == {1, 2}


def test_mixture_weights_are_numbers_and_not_all_zero(pipe):
    of_ints = pipe.embed({"a red star": 1, "a blue ring": 2})
    of_floats = pipe.embed({"a red star": 1.0, "a blue ring": 2.0})
    assert torch.equal(of_ints, of_floats)
    for mixture in ({"a red star": 0}, {"a red star": 1, "a blue ring": float("nan")}):
        with pytest.raises(ValueError, match="finite weights that are not all 0"):
            pipe(mixture)


@pytest.mark.parametrize("prompt", [None, ["a red star", 7], [["a red star"]], 3])
def test_other_types_of_prompts_raise(pipe, prompt):
    with pytest.raises(TypeError, match="prompt must be a text, a mixture, an image or an embedding, got"):
        pipe(prompt)


def test_missing_device_moves_nothing(pipe):
    with pytest.raises((RuntimeError, AssertionError)):  # of torch with CUDA, and without
        pipe.to("cuda:99")
    assert pipe(PROMPT, seed=0)


def test_embedding_prompt_must_be_a_single_vector(pipe):
    with pytest.raises(ValueError, match=r"an embedding must be \(64,\), got \(2, 32\)"):
        pipe(torch.randn(2, 32))


def test_generate_scales_embeddings_to_unit_norm(pipe):
    embedding = pipe.embed(PROMPT)
    expected = pipe.generate(embedding, 3)
    for scale in (10, 0.1):
        assert torch.allclose(pipe.generate(scale * embedding, 3), expected, atol=1e-3)
    with pytest.raises(ValueError, match="clip_embedding must be finite, got NaN or infinity"):
        pipe.generate(torch.full((1, 64), torch.nan))


def test_fingerprint_includes_the_projector(pipe, tmp_path):
    plain = pipe(PROMPT, seed=0)[0].info["model"]
    pipe.projector = EmbeddingProjector(shift=torch.full((64,), 0.1))
    projected = pipe(PROMPT, seed=0)[0].info["model"]
    assert projected != plain and TextToImage.load(pipe.save(tmp_path / "pipe")).fingerprint == projected
    pipe.projector.neighbors += 1
    assert pipe.fingerprint not in (plain, projected)
    pipe.projector = None
    assert pipe(PROMPT, seed=0)[0].info["model"] == plain
    assert TextToImage.load(pipe.save(tmp_path / "pipe")).projector is None


def test_push_to_hub_and_load(pipe, monkeypatch, tmp_path):
    """A local folder stands for the hub."""
    import huggingface_hub

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, name, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def create_branch(self, repo_id, branch, exist_ok):
            calls.append(("branch", branch))

        def upload_folder(self, repo_id, folder_path, delete_patterns, revision, commit_message):
            calls.append(("revision", revision))
            calls.append(("message", commit_message))
            for old in [file for pattern in delete_patterns for file in (tmp_path / repo_id).glob(pattern)]:
                old.unlink()
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    pipe.projector = EmbeddingProjector(shift=torch.ones(64))
    for projector in (pipe.projector, None):  # the second upload removes the projector of the first
        pipe.projector = projector
        assert pipe.push_to_hub("me/shapes") == "https://huggingface.co/me/shapes"
        assert TextToImage.load("hf-hub:me/shapes").fingerprint == pipe.fingerprint
    card = (tmp_path / "me" / "shapes" / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "| transformer | n_layer | 2 |" in card
    assert "| trainer |" not in card
    assert 'TextToImage.from_pretrained("me/shapes")' in card
    assert not [path for path in (tmp_path / "me").rglob("*") if path.suffix in (".ckpt", ".pt", ".pkl", ".bin")]
    assert set(calls) == {("token", None), ("revision", None), ("message", None)}
    calls.clear()
    pipe.push_to_hub("me/shapes", revision="v2", token="hf_x", commit_message="Longer training")
    assert calls == [("token", "hf_x"), ("branch", "v2"), ("revision", "v2"), ("message", "Longer training")]


def test_from_pretrained_takes_paths_and_names_on_the_hub(pipe, monkeypatch, tmp_path):
    """A local folder stands for the hub; a folder in the working directory takes precedence over it."""
    import huggingface_hub

    requests = []

    def snapshot_download(name, revision, token):
        requests.append((name, revision, token))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert pipe.save_pretrained(tmp_path / "hub", half=False) == tmp_path / "hub"
    assert TextToImage.from_pretrained("me/model", revision="v2", token="hf_x").fingerprint == pipe.fingerprint
    assert VQGAN.from_pretrained("me/model@v1").codebook_size == 16
    assert ConditionalTransformer.from_pretrained("hf-hub:me/model").gpt_config.n_layer == 2
    assert TextToImage.load("hf-hub:me/model@v1").fingerprint == pipe.fingerprint
    expected = [("me/model", "v2", "hf_x"), *[("me/model", name, None) for name in ("v1", None, "v1")]]
    assert requests == expected
    pipe.save_pretrained("me/model")
    assert TextToImage.from_pretrained("me/model").fingerprint == pipe.fingerprint
    assert TextToImage.from_pretrained("shapes").image_size == 32
    assert requests == expected


def test_revision_of_a_local_model_is_refused(pipe, tmp_path):
    pipe.save(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"revision must be None for .*pipe, which is not on the hub, got v1"):
        TextToImage.load(tmp_path / "pipe", revision="v1")
    with pytest.raises(ValueError, match=r"revision must be v1, as in hf-hub:a/b@v1, got v2"):
        VQGAN.load("hf-hub:a/b@v1", revision="v2")
