"""The rules of the tree: what is packaged, what may not shadow another package, what the compiler may not know."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Where the sources of each importable package stand.
SOURCES = {"rewriter": "rewriter", "rewriter.kernels": "kernels", "rewriter.patterns": "patterns"}

# The compiler goes by what a graph computes: a family's name in it would be a special case for one model. Names that
# are also words of the trade (clip, opt, phi, sam) are left out.
FAMILIES = frozenset(
    """albert bart beit bert chatglm cohere dbrx deberta deepseek deit dinov2 distilbert electra ernie falcon
    gemma gemma2 gemma3 glm gpt gpt2 gptj gptneox internlm jamba llama llava longformer minilm mistral mixtral
    modernbert mpt olmo persimmon phi3 pythia qwen qwen2 qwen3 roberta siglip smollm smollm2 stablelm
    starcoder swin t5 vit wav2vec2 whisper xlnet""".split()  # noqa: SIM905
)
NAMES_A_MODEL = {
    "rewriter/demo/assets.py": "reads two pretrained models from packages that are called after them",
    "rewriter/bench/speech.py": "reads one from a file without names of the model's own",
    "rewriter/bench/vision.py": "reads one from a file that is called after it, and says what its weights belong to",
}


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file as (path inside the installed package, path in the checkout); links are not followed."""
    for package, top in SOURCES.items():
        for folder, _, names in os.walk(root / top):
            for file in (Path(folder, name) for name in names if not name.endswith(".pyc")):
                yield f"{package.replace('.', '/')}/{file.relative_to(root / top).as_posix()}", file


def words(file: Path) -> set[str]:
    """The lowercase words of a file's names and strings; comments and docstrings are for people and do not count."""
    found = set()
    starts = True
    with tokenize.open(file) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            docstring = starts and token.type == tokenize.STRING
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                starts = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            if token.type not in (tokenize.COMMENT, tokenize.OP) and not docstring:
                split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", token.string)
                found |= set(re.split(r"[^a-z0-9]+", split.lower()))
    return found


def imports(file: Path) -> set[str]:
    """The full names of the modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def test_every_package_is_listed(root: Path) -> None:
    listed = pyproject(root)["tool"]["setuptools"]["packages"]
    assert listed == sorted({Path(inside).parent.as_posix().replace("/", ".") for inside, _ in sources(root)})


def test_every_file_is_shipped(root: Path) -> None:
    shipped = ["*.py", *pyproject(root)["tool"]["setuptools"]["package-data"]["*"]]
    assert [inside for inside, file in sources(root) if not any(map(file.match, shipped))] == []


def test_every_import_is_declared(root: Path) -> None:
    project = pyproject(root)["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        for requirement in project["dependencies"] + extras["demo"] + extras["report"]
    }
    used = {name.split(".")[0] for _, file in sources(root) if file.suffix == ".py" for name in imports(file)}
    assert used - sys.stdlib_module_names - {"rewriter"} <= declared


@pytest.mark.parametrize(("folder", "other"), [("patterns", "kernels"), ("kernels", "patterns")])
def test_patterns_and_kernels_do_not_know_each_other(root: Path, folder: str, other: str) -> None:
    used = {name for file in (root / folder).rglob("*.py") for name in imports(file)}
    assert not [name for name in used if f"{name}.".startswith(f"rewriter.{other}.")]


def test_the_set_up_installs_what_the_demonstration_reads(root: Path) -> None:
    from rewriter.demo import assets

    needed = {value.requirement for value in vars(assets).values() if isinstance(value, assets.Package)}
    (line,) = re.findall(r"^ASSETS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split()) == needed


@pytest.mark.parametrize("folder", ["patterns", "kernels", "tests"])
def test_top_folders_are_not_packages(root: Path, folder: str) -> None:
    assert not list((root / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["patterns", "kernels"])
def test_links_are_relative_and_resolve(root: Path, folder: str) -> None:
    link = root / "rewriter" / folder
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve(strict=True) == (root / folder).resolve()


def test_kernels_means_somebody_elses(root: Path, tmp_path: Path) -> None:
    """From the root of the checkout, `import kernels` finds an installed package of that name, not our folder."""
    installed = tmp_path / "kernels" / "__init__.py"
    installed.parent.mkdir()
    installed.touch()
    script = "import kernels, sys; assert sys.path[0] == ''; print(kernels.__file__)"
    assert Path(run(sys.executable, "-c", script, cwd=root, PYTHONPATH=str(tmp_path))) == installed


def test_one_name_a_module(root: Path) -> None:
    """Loading all variants and patterns goes through `rewriter.`: under two names a module would be two objects."""
    script = (
        "import sys, rewriter.patterns, rewriter.variant as v; v.variants(); v.modules_of(rewriter.patterns); "
        "print([n for n in sys.modules if n.split('.')[0] in ('patterns', 'kernels')])"
    )
    assert run(sys.executable, "-c", script, cwd=root) == "[]"


def test_no_folder_that_pytest_would_import_as_kernels(root: Path) -> None:
    assert not (root / "tests" / "kernels").exists()
    assert not (root / "tests" / "patterns").exists()


@pytest.mark.parametrize("folder", ["rewriter", "patterns"])
def test_no_model_family_is_named(root: Path, folder: str) -> None:
    named = {
        path: sorted(words(file) & FAMILIES)
        for _, file in sources(root)
        if file.suffix == ".py" and (path := file.relative_to(root).as_posix()).startswith(f"{folder}/")
    }
    assert {path: found for path, found in named.items() if found and path not in NAMES_A_MODEL} == {}


def test_the_exceptions_are_needed(root: Path) -> None:
    assert [path for path in NAMES_A_MODEL if not words(root / path) & FAMILIES] == []


def test_family_names_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        '"""llama"""\nclass GPT2Model:\n    """bert"""\n    kind = "a_whisper-v2"  # gemma\n    berth = 1\n'
    )
    assert words(file) & FAMILIES == {"gpt2", "whisper"}


@pytest.mark.slow
def test_wheel_is_complete(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for name in ("rewriter", "patterns", "kernels"):
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    options = ("--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, copy, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {inside for inside, _ in sources(root)}
