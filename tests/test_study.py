"""The study: equal budgets, tuning on a split that is not reported, intervals, and a run of every table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import study as study_script
import torch
from studies import rows as study_rows
from studies import workspace
from studies.budget import equal_flops_steps, flops_per_step
from studies.results import clip_note, evaluator_error, markdown, sampling_cost, tuned_rate, with_interval
from studies.rows import RECIPES, Row, curve_rows, gap_rows, system_rows
from studies.search_tables import real_search, search_fid, training_score
from studies.workspace import SEED_STRIDE, Study, best_images, split_prompts, spread
from train_classifier import load_images
from train_shapes_clip import seen_attributes

from clipgen.data.shapes import ALL_ATTRIBUTES, held_out_attributes
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.evaluation.shapes_evaluator import matches
from clipgen.sampling_params import SamplingParams

TINY = {
    "--steps": 2,
    "--num-images": 8,
    "--num-optimized": 4,
    "--num-tuning": 4,
    "--num-reference": 40,
    "--train-size": 64,
    "--search-images": 3,
    "--optimization-steps": 1,
    "--cutouts": 1,
    "--seeds": 0,
    "--weights": 3,
}


def tiny_args(output: Path, rows: str = "systems") -> list[str]:
    options = [str(part) for pair in TINY.items() for part in pair]
    return ["shapes", "--output", str(output), "--second-clip", "shapes", "--rows", rows, *options]


@pytest.fixture
def tiny_study(tmp_path) -> Study:
    return Study(study_script.make_parser().parse_args(tiny_args(tmp_path)))


def test_every_row_has_a_recipe_that_exists():
    for rows in (system_rows(), gap_rows(study_rows.SHAPES), curve_rows()):
        assert rows[0].system == "real"
        assert all(row.recipe in RECIPES for row in rows if row.system in ("pipeline", "class", "search"))
        assert len({row.name for row in rows}) == len(rows)


def test_table_has_muon_and_adamw_rows_of_both_recipes():
    optimizers = {name: [s for s in RECIPES[name].settings if "optimizer.name" in s][-1] for name in RECIPES}
    for muon, adamw in (("paper_muon", "no_clip_loss"), ("modern", "modern_adamw")):
        assert (optimizers[muon], optimizers[adamw]) == ("optimizer.name=muon", "optimizer.name=adamw")
        assert {muon, adamw} <= {row.recipe for row in system_rows()}


def test_hfailab_row_has_the_settings_of_its_configuration():
    from clipgen.cli.config import compose_config

    published = compose_config(
        "stage=transformer", "experiment=coco", "recipe=hfailab_transformer", "data.root=x", "vqgan=x"
    )
    row = compose_config("stage=transformer", *(f"model.{setting}" for setting in study_rows.HFAILAB))
    names = ("dropout", "mlp_dropout", "tie_embeddings", "lm_head_bias", "activation", "weight_init", "scale_condition")
    assert all(row.model[name] == published.model[name] for name in names)
    for name in ("name", "betas", "weight_decay", "decay_embeddings"):
        assert row.model.optimizer[name] == published.model.optimizer[name]
    assert pytest.approx(published.model.optimizer.learning_rate) == study_rows.HFAILAB_RATE


def test_prompts_are_tuned_and_reported_on_different_halves():
    prompts = [str(attributes) for attributes in ALL_ATTRIBUTES]
    tuning, reported = split_prompts(prompts)
    assert len(tuning) == len(reported) == 144 and set(tuning) | set(reported) == set(prompts)
    assert {caption.split()[-2] for caption in spread(reported, 48)} == {"white", "gray", "black"}


def test_equal_flops_give_fewer_steps_to_dearer_recipes():
    assert equal_flops_steps(600, reference=10, cost=10) == 600
    assert equal_flops_steps(600, reference=10, cost=25) == 240
    assert equal_flops_steps(1, reference=1, cost=1000) == 1


def test_flops_of_a_step_include_decoder_and_clip(tiny_study):
    """A transformer of N weights in matrices takes about 6 N operations per token; the CLIP loss comes on top."""
    config = tiny_study.config("no_clip_loss", 1e-3, "constant", 0, 2)
    config.output = str(tiny_study.output / "unused")
    flops = flops_per_step(config)
    width, layers, codes, tokens = 128, 4, 512, 64
    matrices = layers * 12 * width**2 + width * codes
    assert flops == pytest.approx(6 * matrices * tokens * study_rows.BATCH_SIZE, rel=0.15)
    with_loss = tiny_study.config("paper", 1e-3, "constant", 0, 2)
    with_loss.output = config.output
    assert flops_per_step(with_loss) > 1.2 * flops


def test_rate_and_schedule_have_the_lowest_validation_loss(tiny_study, monkeypatch):
    losses = {(1e-3, "constant"): 3.0, (1e-3, "cosine"): 2.0, (4e-3, "constant"): 2.5, (4e-3, "cosine"): 4.0}
    monkeypatch.setattr(study_rows, "LEARNING_RATES", (1e-3, 4e-3))
    monkeypatch.setattr(Study, "run", lambda self, name, recipe, rate, schedule, seed: (rate, schedule))
    monkeypatch.setattr(workspace, "validation_loss", losses.__getitem__)
    assert tiny_study.tuned_training("modern") == (1e-3, "cosine")
    assert tiny_study.tuned_training("hfailab_rate") == (study_rows.HFAILAB_RATE, "cosine")
    recipe = curve_rows()[2].recipe
    assert tiny_study.tuned_training(recipe) == tiny_study.tuned_training("no_clip_loss")


def test_sampling_parameters_have_the_highest_score_on_the_tuning_split(tiny_study, monkeypatch):
    monkeypatch.setattr(Study, "tuning_score", lambda self, row, system, params: -abs(params.top_p - 0.9))
    assert tiny_study.tuned_params(Row("x", "no_clip_loss")) == SamplingParams(top_p=0.9)
    assert tiny_study.tuned_params(Row("x", "paper", params=SamplingParams())) == SamplingParams()
    grid = tiny_study.grid(Row("x", "modern"))
    assert {params.guidance_scale for params in grid} == set(study_rows.GUIDANCE_SCALES)
    assert {params.guidance_scale for params in tiny_study.grid(Row("x", "no_clip_loss"))} == {1.0}


def test_real_images_show_their_prompts_and_differ_by_seed(tiny_study):
    prompts = tiny_study.setting.prompts[:6]
    images = tiny_study.real_images(prompts, range(6))
    from clipgen.data.shapes import parse_caption

    assert matches(images, [parse_caption(prompt) for prompt in prompts]).all()
    again = tiny_study.real_images(prompts, range(6))
    others = tiny_study.real_images(prompts, range(100, 106))
    assert torch.equal(images, again) and not torch.equal(images, others)


def test_real_images_of_cifar10_are_of_their_class_and_held_out(labeled_shards, small_classifier, tmp_path):
    options = ["--data", str(labeled_shards), "--classifier", str(small_classifier), "--num-images", "8"]
    study = Study(study_script.make_parser().parse_args(["cifar10", "--output", str(tmp_path), *options]))
    assert study.setting.prompts == ["a photo of a red", "a photo of a blue"]
    captions = spread(study.setting.prompts, 8)
    images = study.real_images(captions, range(8))
    red, blue = images[:, 0].mean(dim=(1, 2)), images[:, 2].mean(dim=(1, 2))
    assert (red > blue).tolist() == [True, False] * 4
    held_out = load_images([labeled_shards / "train-000001.tar"], 32).floats(slice(None))
    assert torch.equal(images, held_out)
    assert evaluator_error(study).startswith("The accuracy of the classifier is ")
    assert study.metrics.classes == study.setting.prompts and study.metrics.features.num_classes == 2


def test_a_folder_holds_results_of_one_setting(tmp_path):
    parse = study_script.make_parser().parse_args
    study_script.require_same_settings(parse(["shapes", "--output", str(tmp_path), "--steps", "5"]))
    study_script.require_same_settings(parse(["shapes", "--output", str(tmp_path), "--steps", "5", "--seeds", "7"]))
    with pytest.raises(SystemExit, match="contains results computed with steps=5, not 6; choose another output folder"):
        study_script.require_same_settings(parse(["shapes", "--output", str(tmp_path), "--steps", "6"]))


def test_fids_of_the_search_are_kept_for_each_set_of_seeds_and_prompts(tiny_study, monkeypatch):
    calls = []

    def record(folder, source, metrics, reference):
        calls.append((folder, source.identity))
        return {"fid_0": 1.0}

    monkeypatch.setattr("studies.search_tables.evaluate", record)
    monkeypatch.setattr("studies.search_tables.search_reference", lambda study, prompts: None)
    images = torch.zeros(2, 3, 32, 32)
    for seeds, prompts in (([0], ["a"]), ([0], ["a"]), ([0, 1], ["a"]), ([2], ["a"]), ([0], ["b"])):
        tiny_study.args.seeds = seeds
        search_fid(tiny_study, prompts, "k = 1", images)
    folders = [folder for folder, _ in calls]
    assert folders[0] == folders[1] and len(set(folders)) == 4
    assert all(identity["seeds"] and identity["prompts"] for _, identity in calls)


def test_row_of_another_generator_has_another_folder_and_identity(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"a")
    (tmp_path / "b.pth").write_bytes(b"b")
    shutil.copy(tmp_path / "a.pth", tmp_path / "copy.pth")
    sources = []

    def stop_before_work(folder, source, metrics, reference):
        sources.append((folder, source.identity["generator"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "evaluate", stop_before_work)
    for name in ("a.pth", "copy.pth", "b.pth"):
        options = [*tiny_args(tmp_path, "biggan"), "--generator", f"biggan:{tmp_path / name}"]
        with pytest.raises(KeyboardInterrupt):
            Study(study_script.make_parser().parse_args(options)).measured(study_rows.BIGGAN_CLIP, 0)
    assert sources[0] == sources[1] and sources[0][0] != sources[2][0] and sources[0][1] != sources[2][1]


def test_best_images_are_the_highest_of_their_candidates():
    class Pipe:
        def encode_text(self, prompts):
            return torch.ones(1, 2)

        def generate(self, embeddings, seeds, params):
            return torch.tensor(seeds, dtype=torch.float32).view(-1, 1)

        def clip_scores(self, images, text):
            return images[:, 0] % 4  # the best of every four candidates have the seeds 3, 7, ...

    row = Row("x", best_of=4, keep=2)
    generate = best_images(Pipe(), SamplingParams(), row, num_prompts=2)
    # Two prompts in turn: images 0 and 2, 4 and 6 of the first share their candidates.
    images = generate(["a", "b"] * 4, list(range(8)))[:, 0].tolist()
    assert images[::2] == [3, 2, 7, 6]
    assert generate(["a"], [SEED_STRIDE])[0, 0] > 7


def test_seeds_of_different_runs_do_not_overlap():
    parser = study_script.make_parser()
    args = parser.parse_args(["shapes", "--output", "x"])
    assert max(args.num_images, args.num_reference, args.num_tuning) < SEED_STRIDE


def test_cells_show_mean_and_interval():
    groups = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    assert with_interval(groups, 100).startswith("75.0 (")
    text = markdown([("a", {"x": "1"}), ("b", {"x": "2", "y": "3"})])
    assert text == "| | x | y |\n|---|---|---|\n| a | 1 | - |\n| b | 2 | 3 |\n"


def test_clip_with_held_out_pairs_sees_no_caption_of_them():
    seen, hidden = seen_attributes(0.1), held_out_attributes(0.1)
    assert len(seen) + len(hidden) == len(ALL_ATTRIBUTES) and not set(seen) & set(hidden)


@pytest.fixture
def small_grids(monkeypatch):
    """Reduce the grids to two points each, so that a table takes seconds."""
    monkeypatch.setattr(study_rows, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(study_rows, "TOP_PS", (1.0,))
    monkeypatch.setattr(study_rows, "GUIDANCE_SCALES", (1.0, 3.0))
    monkeypatch.setattr(study_rows, "CURVE_FORMS", (("log", "straight_through"), ("cosine", "gumbel")))
    monkeypatch.setattr("studies.clip_loss_curve.CURVE_FORMS", study_rows.CURVE_FORMS)
    monkeypatch.setattr("studies.search_tables.SEARCH_PROMPTS", 2)
    monkeypatch.setattr("studies.search_tables.PAPER_KS", (1, 1000))


@pytest.mark.slow
@pytest.mark.usefixtures("small_grids", "reference_cache")
def test_all_tables_of_the_study_are_made(tmp_path):
    """Every system runs end to end in the smallest setting; the results mean nothing."""
    for rows in ("systems", "search", "curve"):
        study_script.main(tiny_args(tmp_path, rows))
    systems = (tmp_path / "systems.md").read_text()
    assert all(f"| {row.name} |" in systems for row in system_rows()) and "| real images | 8 | 100.0 " in systems
    assert "CLIP score (independent)" in systems and "The rules accept 100.00" in systems
    optimized = next(line for line in systems.splitlines() if "VQGAN-CLIP" in line)
    assert optimized.split("|")[2].strip() == "4" and optimized.count("| - ") >= 3  # no FID of other sets
    assert "effect shown" in (tmp_path / "systems_differences.md").read_text()
    search = (tmp_path / "search.md").read_text()
    assert "Threshold of the images needed, from the training set" in search and "| k = 144 |" not in search
    assert "| k = 288 |" in search and "| real images |" in search
    files = ("systems.png", "search.png", "curve.png", "curve_correct.png", "curve_clip_independent.png")
    assert all((tmp_path / name).is_file() for name in files)
    flops = json.loads((tmp_path / "flops.json").read_text())
    assert flops["paper"] > flops["no_clip_loss"] and flops["paper_muon"] > flops["no_clip_loss"]


def test_threshold_is_the_mean_score_of_the_training_images(tiny_study):
    """Computed image by image; the validation images, and images with one caption, have another mean."""
    text = tiny_study.clip.encode_text([str(attributes) for attributes in ALL_ATTRIBUTES])

    def mean_score(split: str) -> float:
        cache = TokenCacheDataset(tiny_study.token_cache / split)
        labels = [int(label) for number in range(len(cache.files)) for label in cache.shard(number)["label"]]
        scores = []
        for number, label in enumerate(labels):
            scores.append(float(cache[number]["condition"] @ text[label]))
        return sum(scores) / len(scores)

    score = training_score(tiny_study)
    assert score == pytest.approx(mean_score("train"), abs=1e-6)
    assert score != pytest.approx(mean_score("val"), abs=1e-5)


def test_search_table_has_real_images_as_its_floor(tiny_study):
    """Their best score over b images cannot fall, and is that of the images themselves."""
    prompts = tiny_study.setting.prompts[:2]
    row, images = real_search(tiny_study, prompts, threshold=2.0)
    assert len(images) == 2 * tiny_study.args.search_images and row.needed == [None]
    scores = (tiny_study.clip.encode_image(images) * tiny_study.clip.encode_text(prompts).repeat_interleave(3, 0)).sum(
        1
    )
    assert row.best == pytest.approx([scores.view(2, 3).amax(dim=1).mean().item()], abs=1e-5)
    assert row.curve.diff().min() >= 0


def test_rates_at_an_end_of_the_grid_are_marked(tiny_study, monkeypatch):
    monkeypatch.setattr(Study, "tuned_training", lambda self, recipe: (4e-3, "cosine"))
    assert tuned_rate(tiny_study, "modern") == "0.004, cosine (end of the grid)"
    assert tuned_rate(tiny_study, "hfailab_rate") == "0.004, cosine"  # its own rate
    monkeypatch.setattr(Study, "tuned_training", lambda self, recipe: (2e-3, "cosine"))
    assert tuned_rate(tiny_study, "modern") == "0.002, cosine"


def test_sampling_cost_counts_candidates_and_guidance(tiny_study):
    guided = SamplingParams(guidance_scale=3.0)
    assert sampling_cost(tiny_study, Row("x", "modern", params=SamplingParams())) == "1 pass"
    assert sampling_cost(tiny_study, Row("x", "modern", params=guided, best_of=64, keep=8)) == "16 passes"
    assert sampling_cost(tiny_study, Row("x", "class", "search", params=SamplingParams())) == "16 passes"
    assert sampling_cost(tiny_study, Row("x", None, "vqgan_clip")) == "1 steps of 1 views"


def test_missing_second_clip_is_stated(tiny_study):
    assert "independent CLIP (--second-clip) has" in clip_note(tiny_study)
    tiny_study.second_clip = None
    assert clip_note(tiny_study).startswith("There is no independent CLIP")
