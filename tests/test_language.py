"""Plain technical English and short functions: the rules that a program can check, over package, scripts and pages."""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "clipgen").rglob("*.py"))
PYTHON = [*PACKAGE, *sorted((ROOT / "scripts").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").glob("*.py"))
YAML = sorted((ROOT / "configs").rglob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github").rglob("*.md"))]

# "file: matched text" -> why it stays
EXCEPTIONS = {
    "clipgen/data/memory_budget.py: hold": "threads hold memory",
    "clipgen/data/memory_budget.py: Hold": "threads hold memory",
    "clipgen/data/memory_budget.py: holds": "threads hold memory",
}

PER_UNITS = "batch|caption|class|code|dimension|epoch|image|layer|panel|pixel|position|process|prompt|rank|row|sample"
PER_UNITS += "|second|shard|step|token|worker"
COUNTED = "batches|bytes|captions|codes|crops|epochs|images|indices|numbers|seconds|seeds|steps"
COUNTED += "|tensors|times|tokens|values|views|seed|panel|tensor|GB|GiB|MB"
BRITISH_STEMS = "central|general|initial|maxim|memor|minim|normal|optim|organ|parallel|quant|real|recogn|regular"
BRITISH_STEMS += "|serial|special|summar|synchron|token|util|visual"

NO_LONGER = "better|faster|larger|longer|more|other|slower|smaller|worse"  # "is no longer" and the like are English

# Name of the rule -> regular expression; a space matches any white space
PHRASES = {
    "say resume or continue": r"\b(go|goes|went|going) on\b",
    "say again, or from the beginning": r"\banew\b",
    "say atomically": r"\bwhole or not at all\b",
    "say is not a": rf"(?<!there )\b(is|are|was|were) (no(?! ({NO_LONGER}))|(?-i:none)(?! of))\b",
    "say if or when": r"(?<!stay )(?<!stays )\bwhere (there (is|are)|it is)\b",
    "say per": rf"\b({COUNTED}) an? ({PER_UNITS})\b(?!')",
    "say image": r"(?<![/.])\bpictures?\b(?![/.])",
    "say generate or sample": r"\bpaint(s|ed|er|ing)?\b",
    "say start": r"\bwakes? up\b",
    "say given, reported or stated": r"\btold\b",
    "say evaluator": r"\bjudge[ds]?\b",
    "say that number": r"\bso many\b",
    "spell as Americans do": (
        rf"colour|\bgrey|\bcentre|neighbour|behaviour|({BRITISH_STEMS})is(e|ed|er|es|ing|ation)s?\b"
    ),
}
# The same for everything except the tests
PLAIN_PHRASES = {
    "say Return whether": r"\breturn True if\b",
    "name the value that is returned": r"\b(return|yield) (how|what|where|which|why)\b",
    "say None uses or None disables": r"(?-i:\bNone): ",
    "say contain": r"\bholds?\b(?! out\b)",
    "say next to, in addition to or compared with": r"\bbeside\b",
    "say also": r", too(?=[.,;:)]|$)",
    "say regardless of": r"\bwhatever\b",
    "say should": r"\bshall\b",
    "say consecutive": r"\bin a row\b",
    "say precede or name": r"\bstands? (before|for)\b",
    "say training run, or run": (
        r"\b(a|each|every|one|resumed|this) training\b"
        r"(?! (and|batch|checkpoint|data|image|run|sample|seed|set|side|step|stream))|\btrainings\b"
    ),
    "say accurate or correct": r"\b(is|are) right\b",
    "say python -m clipgen NAME": r"\bscripts/\w+\.py\b",
}
# Names at the start of a comment that begin with a small letter
LOWERCASE_NAMES = {"fp16", "numpy", "pickle", "polars", "tarfile", "torch", "webdataset"}
PRONOUN_NAMES = {"each", "every", "found", "given", "one", "some", "told", "whole"}
NOUN_PHRASE_STARTS = {"What", "Whether", "Which", "Where", "How"}
NON_VERBS = NOUN_PHRASE_STARTS | {"A", "An", "The", "Of", "This", "It", "That", "For", "From"}


def place(path: Path, line: int, text: str) -> str:
    """Return ``file:line: text``, the text in one line."""
    return f"{path.relative_to(ROOT).as_posix()}:{line}: {' '.join(text.split())}"


def python_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of the comments and of the strings with more than one word."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, re.sub(r"``[^`]+``", "``", node.value)


def yaml_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of the comments."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        comment = re.search(r"(?:^|\s)#(.*)", line)
        if comment:
            yield number, comment[1]


def page_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the text of a page with its code blanked out, so that lines keep their numbers."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    yield 1, re.sub(r"`[^`\n]+`|\]\([^)\n]*\)", "`", text)


def all_prose() -> Iterator[tuple[Path, int, str]]:
    """Yield file, line and text of everything that people read."""
    readers: list[tuple[list[Path], Callable[[Path], Iterator[tuple[int, str]]]]] = [
        (PYTHON, python_prose),
        (YAML, yaml_prose),
        (PAGES, page_prose),
    ]
    for paths, read in readers:
        for path in paths:
            for line, text in read(path):
                yield path, line, text
    for path in TESTS:
        if path.name != Path(__file__).name:
            for line, text in python_prose(path):
                yield path, line, text


PROSE = list(all_prose())


def uses_of_phrase(pattern: str, prose: list[tuple[Path, int, str]]) -> list[str]:
    """Return the places where a pattern matches, without the exceptions."""
    # A look-behind must have a fixed width, so there a space stays a space
    parts = re.split(r"(\(\?<!.*?\))", pattern)
    pattern = "".join(part if part.startswith("(?<!") else part.replace(" ", r"\s+") for part in parts)
    failures = []
    for path, first_line, text in prose:
        for match in re.finditer(pattern, text, re.IGNORECASE):
            line = first_line + text.count("\n", 0, match.start())
            if f"{path.relative_to(ROOT).as_posix()}: {match[0]}" not in EXCEPTIONS:
                context = text[max(0, match.start() - 30) : match.end() + 30]
                failures.append(place(path, line, context))
    return failures


@pytest.mark.parametrize("rule", PHRASES)
def test_phrase_is_not_used(rule):
    failures = uses_of_phrase(PHRASES[rule], PROSE)
    assert not failures, f"{rule}:\n" + "\n".join(failures)


@pytest.mark.parametrize("rule", PLAIN_PHRASES)
def test_phrase_is_not_used_outside_of_tests(rule):
    failures = uses_of_phrase(PLAIN_PHRASES[rule], [entry for entry in PROSE if entry[0] not in TESTS])
    assert not failures, f"{rule}:\n" + "\n".join(failures)


def full_line_comments(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield first line number and lines of each block of comments that have lines of their own."""
    block: list[str] = []
    number = 0
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        text = line.strip()
        if text.startswith("# "):
            block.append(text)
        elif block:
            yield number - len(block), block
            block = []


def test_comments_are_sentences():
    failures = []
    for path in PYTHON:
        for number, block in full_line_comments(path):
            is_heading = re.match(r"# -{10}", block[0])
            first = re.match(r"# (\w*)(.?)", block[0])
            # A name in code, such as `torch.save` or "data/", may begin a sentence
            is_lowercase = first[1].islower() and first[1] not in LOWERCASE_NAMES and first[2] in (" ", ",", ":")
            ends_badly = not block[-1].endswith((".", ":"))
            if not is_heading and (ends_badly or (is_lowercase and "_" not in first[1])):
                failures.append(place(path, number, " ".join(block)))
    assert not failures, "\n".join(failures)


# ---------------------------------------------------------------------------------------------------------- docstrings


def is_property(node: ast.AST) -> bool:
    """Return whether a definition is a property."""
    names = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(name.rsplit(".")[-1] in ("property", "cached_property") for name in names)


def docstrings(path: Path) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield each definition or module with a docstring, its line and the docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node, node.body[0].lineno, docstring


def starts_badly(node: ast.AST, docstring: str) -> bool:
    """Return whether a docstring begins with a word that its kind of definition must not begin with."""
    word = re.split(r"\W", docstring, maxsplit=1)[0]
    if is_property(node):
        returns_bool = ast.unparse(getattr(node, "returns", None) or ast.Constant("")) == "bool"
        return word in NOUN_PHRASE_STARTS and not (word == "Whether" and returns_bool)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return word in NON_VERBS
    return word in NOUN_PHRASE_STARTS


def test_docstrings_start_with_a_verb():
    failures = [
        place(path, line, docstring.partition("\n")[0])
        for path in PYTHON
        for node, line, docstring in docstrings(path)
        if starts_badly(node, docstring)
    ]
    assert not failures, "\n".join(failures)


def test_names_in_docstrings_are_between_double_backticks():
    single = re.compile(r"(?<!`)`[^`\n]+`(?!`)")
    failures = []
    for path in PYTHON:
        for _, line, docstring in docstrings(path):
            failures += [place(path, line, match[0]) for match in single.finditer(docstring)]
    assert not failures, "\n".join(failures)


def keyword_strings(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of the strings that calls pass by a keyword."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == name:
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def test_help_texts_name_the_noun_before_of():
    failures = []
    for path in PYTHON:
        for line, text in keyword_strings(ast.parse(path.read_text(encoding="utf-8")), "help"):
            if re.match(r"(of|and|or)\b", text):
                failures.append(place(path, line, text))
    assert not failures, "\n".join(failures)


def test_comments_behind_code_name_the_noun_before_of():
    failures = []
    for path in PYTHON:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\S\s+# (of|and) ", line):
                failures.append(place(path, number, line))
    assert not failures, "\n".join(failures)


# --------------------------------------------------------------------------------------------------------- names, code


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each variable and parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_names_are_not_pronouns():
    failures = []
    for path in chain(PYTHON, TESTS):
        for line, name in bound_names(ast.parse(path.read_text(encoding="utf-8"))):
            if name in PRONOUN_NAMES:
                failures.append(place(path, line, name))
    assert not failures, "\n".join(failures)


def is_parallel(node: ast.Assign) -> bool:
    """Return whether an assignment has several targets and values; swaps are not counted."""
    target, value = node.targets[0], node.value
    if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
        return False
    return {ast.unparse(element) for element in target.elts} != {ast.unparse(element) for element in value.elts}


def test_parallel_assignments_are_swaps():
    failures = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and is_parallel(node):
                failures.append(place(path, node.lineno, ast.unparse(node)))
    assert not failures, "\n".join(failures)


def test_parallel_assignments_are_rare():
    parallel = []
    number = 0
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign):
                number += 1
                if is_parallel(node):
                    parallel.append(place(path, node.lineno, ast.unparse(node)))
    assert len(parallel) <= 0.03 * number, f"{len(parallel)} of {number}:\n" + "\n".join(parallel)


def own_walruses(statement: ast.stmt) -> int:
    """Return the number of ``:=`` in a statement, without those of the statements in its body."""
    pending: list[ast.AST] = [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    number = 0
    while pending:
        node = pending.pop()
        number += isinstance(node, ast.NamedExpr)
        pending.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt))
    return number


def test_statements_have_at_most_one_walrus():
    failures = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.stmt) and own_walruses(node) > 1:
                failures.append(place(path, node.lineno, ast.unparse(node).partition("\n")[0]))
    assert not failures, "\n".join(failures)


def test_formatter_is_never_switched_off():
    mark = "fmt: " + "skip"  # in two parts, so that this file passes
    failures = []
    for path in chain(PYTHON, TESTS):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if mark in line or mark.replace("skip", "off") in line:
                failures.append(place(path, number, line))
    assert not failures, "\n".join(failures)


# ---------------------------------------------------------------------------------------------------------------- size


def functions(paths: list[Path]) -> Iterator[tuple[int, str]]:
    """Yield length and place of each function."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, place(path, node.lineno, node.name)


def test_functions_are_short():
    lengths = [length for length, _ in functions(PACKAGE)]
    assert statistics.median(lengths) < 12
    assert statistics.quantiles(lengths, n=10)[-1] < 30


def test_no_function_is_longer_than_50_lines():
    failures = []
    for length, text in functions(PYTHON):
        # Replicate reads the inputs of a model from the signature of this function.
        if length > 50 and not text.startswith("scripts/replicate/runner.py"):
            failures.append(f"{text}, {length} lines")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("paths", "limit"), [(PACKAGE, 0.02), (PYTHON, 0.021)], ids=["package", "with scripts"])
def test_comprehensions_are_rare(paths, limit):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    lines = 0
    densities = []
    total = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        number = sum(isinstance(node, kinds) for node in ast.walk(ast.parse(source)))
        length = source.count("\n")
        total += number
        lines += length
        densities.append((number - limit * length, place(path, 1, f"{number} in {length} lines")))
    densest = "\n".join(text for _, text in sorted(densities, reverse=True)[:15])
    assert total <= limit * lines, f"{total} comprehensions in {lines} lines; the densest files:\n{densest}"
