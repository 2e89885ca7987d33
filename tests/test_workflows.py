"""The workflows, issue forms and the release: they are valid, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository_address import repository_name

import clipgen

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]


def steps_of(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def load(name: str) -> Any:
    return yaml.safe_load((GITHUB / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_valid(path):
    """Jobs have few permissions and a time limit, need jobs that exist, and use actions of a fixed version.

    The actions of others than GitHub are fixed to a commit.
    """
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert True in workflow  # YAML reads the key "on" as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        needed = job.get("needs", [])
        needs = {needed} if isinstance(needed, str) else set(needed)
        assert needs <= set(workflow["jobs"])
        assert job["timeout-minutes"] <= 60
    for step in steps_of(workflow):
        assert ("run" in step) != ("uses" in step), step
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+|[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_ci_runs_the_tests_that_need_an_extra_and_none_may_be_skipped():
    """The tests of the extra ``docs`` are run by docs.yml, and those of ``eval`` by all jobs."""
    steps = load("workflows/ci.yml")["jobs"]["extras"]["steps"]
    commands = " ".join(step["run"] for step in steps if "run" in step)
    named = set(re.findall(r"tests/(test_\w+)\.py", commands))
    assert named and all((ROOT / "tests" / f"{name}.py").is_file() for name in named)
    needs = re.compile(r"""\[(app|hub|sweep|notebooks)\]['"]|import .*served_page|pip install cog""")
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path != Path(__file__) and needs.search(path.read_text(encoding="utf-8")):
            assert path.stem in named, path.name
    assert "! grep SKIPPED" in commands


def test_release_tests_the_wheel_on_every_supported_python_and_system():
    jobs = load("workflows/release.yml")["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert matrix["python"] == classifiers
    assert [name.partition("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert jobs["publish"]["needs"] == "test" and jobs["test"]["needs"] == "build"


def test_release_tests_the_wheel_on_the_cpu():
    """The macOS runners of GitHub offer MPS, and fail at every allocation on it."""
    steps = load("workflows/release.yml")["jobs"]["test"]["steps"]
    commands = {step["run"].split()[0]: step["run"] for step in steps if "run" in step}
    assert "--device cpu" in commands["clipgen-sample"]
    assert "trainer.accelerator=cpu" in commands["clipgen-demo"]


def test_release_publishes_tags_only_and_without_a_token():
    publish = load("workflows/release.yml")["jobs"]["publish"]
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text()


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == clipgen.__version__
    assert f"version = {{{clipgen.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_is_valid(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_reports_of_errors_ask_for_the_information_that_the_command_prints():
    for name in ("bug", "result"):
        fields = {field["id"]: field for field in load(f"ISSUE_TEMPLATE/{name}.yml")["body"]}
        assert "clipgen-train --info" in fields["info"]["attributes"]["label"]
        assert fields["info"]["validations"]["required"] is True


def test_dependabot_watches_packages_and_actions():
    config = load("dependabot.yml")
    assert {update["package-ecosystem"] for update in config["updates"]} == {"pip", "github-actions"}


def test_dependabot_groups_its_updates():
    assert all(update["groups"] for update in load("dependabot.yml")["updates"])


def test_vulnerabilities_are_not_reported_as_issues():
    (link,) = load("ISSUE_TEMPLATE/config.yml")["contact_links"]
    assert link["url"] == f"https://github.com/{repository_name()}/security/policy"
    assert {"name", "url", "about"} == set(link) and (GITHUB / "SECURITY.md").is_file()
