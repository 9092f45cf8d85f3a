"""The manuals are true: commands exist with their flags, imports work, links and anchors resolve."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_OURS = {".git", ".venv", "results", "wandb", "build", "__pycache__", "shared"}


def repository_files() -> list[str]:
    """All files of the repository, without what environments and runs leave in it."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))]
        found += [Path(folder, name).relative_to(ROOT).as_posix() for name in files]
    return sorted(found)


FILES = repository_files()
MANUALS = [name for name in FILES if name.endswith(".md")]


def fenced(language: str) -> list[str]:
    """The fenced blocks of that language in all manuals."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in MANUALS]
    return [block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def commands() -> list[str]:
    lines = "\n".join(fenced("bash")).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.strip().startswith("#")))


@cache
def usage(*command: str) -> str:
    """What `python COMMAND --help` prints, from this process: torch is imported once."""
    out, words = io.StringIO(), sys.argv
    is_module, target = command[0] == "-m", command[1] if command[0] == "-m" else command[0]
    rest = command[2:] if is_module else command[1:]
    sys.argv = [target, *rest, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            if is_module:
                with warnings.catch_warnings(action="ignore"):  # about a module that is imported already
                    runpy.run_module(target, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / target), run_name="__main__")
    finally:
        sys.argv = words
    assert not end.value.code, f"{command} --help ended with {end.value.code}"
    return out.getvalue()


def python_command(words: list[str]) -> tuple[str, ...]:
    """`words` without what follows the program and its subcommand."""
    program, rest = (words[:2], words[2:]) if words[0] == "-m" else (words[:1], words[1:])
    is_subcommand = rest and re.fullmatch("[a-z]+", rest[0]) and f"{{{rest[0]}" in usage(*program).replace(",", "{")
    return (*program, rest[0]) if is_subcommand else tuple(program)


@pytest.mark.parametrize("command", commands())
def test_command_of_a_manual(command: str) -> None:
    assert subprocess.run(["bash", "-nc", command], timeout=60).returncode == 0
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case ["bash", script, *arguments]:
            assert script in FILES and script.endswith(".sh")
            started = re.findall(
                r"^(?:sample|run_workers) ([\w.]+) ", (ROOT / script).read_text(encoding="utf-8"), re.M
            )
            program: tuple[str, ...] = ("-m", started[0]) if started else ()
        case ["python" | "$PYPATH", *arguments]:
            program = python_command(arguments)
        case ["." | "cp" | "git" | "cd" | "pip" | "export" | "sbatch", *arguments]:
            program = ()
        case _:
            pytest.fail(f"this test does not know how to check {command!r}")
    if program and "evaluations.quality_cost" not in program:  # its --help is long and checked by its own test
        flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
        printed = usage(*program)
        assert not (missing := [flag for flag in flags if flag not in printed]), f"{program}: no {missing}"
    for word in words:
        if re.match(r"(configs|ckpts|tokenizer|scripts)/[\w./-]+$", word):
            assert (ROOT / word).exists() or word == "scripts/set_env_vars.sh", f"{word} does not exist"


def test_python_examples_import_names_that_exist() -> None:
    examples = fenced("python")
    assert examples
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", MANUALS)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{name}: {target}#{anchor}"


def test_every_data_file_of_a_package_is_installed() -> None:
    """pyproject.toml names what beside .py files a wheel must carry."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    patterns = [f"{package.replace('.', '/')}/{name}" for package, names in settings.items() for name in names]
    packages = ("tokenizer/", "autoregressive/", "evaluations/")
    data = [name for name in FILES if name.startswith(packages) and not name.endswith((".py", ".pyc"))]
    assert not [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)]
