"""The house rules that can be read off the imports: one direction, no cycles, no entry imported, nothing undeclared."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from autoregressive import flags, presets
from evaluations.metrics import frechet
from evaluations.quality_cost import flags as cost_flags
from evaluations.quality_cost import video_codecs
from tokenizer.common import cli, device
from tokenizer.frozen import download

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenizer", "autoregressive", "evaluations")

# Inside `tokenizer`, a room may import itself and the layers before its own. `assignment` stands early because its
# Packing is what the attention blocks speak.
LAYERS = (
    {"common"},
    {"assignment", "viz"},
    {"blocks", "frozen"},
    {"data"},
    {"budget", "tokens"},
    {"streaming", "token_file"},
    {"model"},
    {"presets"},
    {"training"},
    {"losses"},
    {"router"},
    {"train", "tokenize", "detokenize", "convert"},
)
LAYER_OF = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}

# The same for the files of `autoregressive`.
GPT_LAYERS = (
    {"flags", "sequence", "cpu_kernel", "decode_kernel", "draw_kernel", "logits", "condition"},
    {"attention", "token_archive"},
    {"cuda_graph"},
    {"model", "batches", "sample_folder"},
    {"presets", "sampler"},
    {"sample_grid"},
    {"sample_job", "extract_codes", "train", "convert"},
    {"sample_c2v", "sample_frame_prediction"},
)
GPT_LAYER_OF = {room: height for height, rooms in enumerate(GPT_LAYERS) for room in rooms}

# Libraries that `python -m` also runs: to list the named sizes, to recompute the shipped figures, to check an archive.
LIBRARIES_WITH_A_COMMAND = {
    "tokenizer.presets",
    "autoregressive.presets",
    "tokenizer.viz.plots",
    "tokenizer.router.curate",
    "autoregressive.token_archive",
    "evaluations.report",
    "evaluations.protocols",
}

NO_FLAGS = {"tokenizer.data.safe_decode", "tokenizer.data.decode_worker"}  # started by the product itself

# The list of all named sizes is one command.
UPWARDS = {"tokenizer.presets imports tokenizer.router.model"}

# What a machine with the core dependencies only does not have; decord has wheels for one platform.
NOT_CORE = (
    "transformers",
    "stlpips_pytorch",
    "skvideo",
    "tensorboard",
    "pytest",
    "hypothesis",
    "decord",
    "triton",
    "vizdoom",
    "gradio",
)
COMES_WITH_TORCH = {"triton"}  # on some platforms; whoever imports it looks first


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of TYPE_CHECKING blocks: streaming.py names the class that calls it, and imports nothing."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from executed(node)


def imports(tree: ast.AST, typing_too: bool = False) -> Iterator[str]:
    """Every imported module, those inside functions too. `from a import b` gives a.b where that is a module of ours."""
    for node in ast.walk(tree) if typing_too else executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name instead of a relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else str(node.module)


def room(module: str) -> str:
    """tokenizer.blocks.attention -> blocks; the face of the package, `tokenizer` itself, -> ''."""
    return module.partition(".")[2].partition(".")[0]


def is_entry(tree: ast.Module) -> bool:
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return any("__name__" in ast.unparse(test) for test in tests)


def test_packages_import_only_what_stands_before_them() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in TREES.items()
        for target in imports(tree, typing_too=True)
        if target.split(".")[0] in PACKAGES
        and PACKAGES.index(target.split(".")[0]) > PACKAGES.index(name.split(".")[0])
    ]
    assert not wrong, wrong


def test_rooms_of_the_tokenizer_import_only_what_stands_before_them() -> None:
    wrong = []
    for name, tree in TREES.items():
        here = room(name)
        if not name.startswith("tokenizer.") or name == "tokenizer":
            continue
        assert here in LAYER_OF, f"give {here!r} a place in LAYERS"
        for target in imports(tree):
            if target.split(".")[0] != "tokenizer" or room(target) == here:
                continue
            if room(target) not in LAYER_OF or LAYER_OF[room(target)] >= LAYER_OF[here]:
                wrong.append(f"{name} imports {target}")
    assert set(wrong) == UPWARDS, wrong


def test_files_of_the_gpt_import_only_what_stands_before_them() -> None:
    wrong = []
    for name, tree in TREES.items():
        if not name.startswith("autoregressive."):
            continue
        assert room(name) in GPT_LAYER_OF, f"give {room(name)!r} a place in GPT_LAYERS"
        targets = [target for target in imports(tree) if target.startswith("autoregressive.")]
        wrong += [
            f"{name} imports {target}"
            for target in targets
            if GPT_LAYER_OF.get(room(target), len(GPT_LAYERS)) >= GPT_LAYER_OF[room(name)]
        ]
    assert not wrong, wrong


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {target for target in imports(tree) if target in MODULES} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the ring


def test_nobody_imports_an_entry_point() -> None:
    entries = {name for name, tree in TREES.items() if is_entry(tree)} - LIBRARIES_WITH_A_COMMAND
    wrong = [
        f"{name} imports {target}" for name, tree in TREES.items() for target in imports(tree) if target in entries
    ]
    assert not wrong, wrong


def test_only_the_config_module_imports_omegaconf() -> None:
    users = [
        name
        for name, tree in TREES.items()
        if any(t.split(".")[0] == "omegaconf" for t in imports(tree, typing_too=True))
    ]
    assert users == ["tokenizer.common.config"]


@pytest.mark.parametrize("folder", [*PACKAGES, "scripts", "tests"])
def test_nobody_bends_the_path(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bends = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sys.path"
            assert not bends, f"{path.relative_to(ROOT)}:{node.lineno} touches sys.path"


# Its command is `python -m tokenizer.tokenize`. It would hide Python's own tokenize from a file of its folder that is
# run by path; the one file that is run by path is in another folder.
MAY_SHARE_A_NAME = {"tokenizer.tokenize"}


def test_no_file_hides_a_library() -> None:
    """A script run by path puts its own folder first on the path: a logging.py beside it would be imported instead."""
    libraries = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    hiding = {name for name in MODULES if "." in name and name.rpartition(".")[2] in libraries}
    assert hiding == MAY_SHARE_A_NAME, hiding


def test_nobody_runs_a_file_beside_tokenize_by_path() -> None:
    texts = [
        path for end in ("*.sh", "*.md", "*.sbatch", "*.py") for path in ROOT.rglob(end) if ".venv" not in path.parts
    ]
    by_path = re.compile(r"python3? tokenizer/\w+\.py")
    assert not [path for path in texts if by_path.search(path.read_text(encoding="utf-8"))]


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {normal(re.split(r"[^\w.-]", need, maxsplit=1)[0]) for need in needs}
    distributions = importlib.metadata.packages_distributions()
    ours = sys.stdlib_module_names | set(PACKAGES) | COMES_WITH_TORCH
    undeclared = set()
    for name, tree in TREES.items():
        for top in {target.split(".")[0] for target in imports(tree, typing_too=True)} - ours:
            if not declared & {normal(distribution) for distribution in distributions.get(top, [top])}:
                undeclared.add(f"{name} imports {top}")
    assert not undeclared, sorted(undeclared)


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_module_imports_with_the_core_dependencies() -> None:
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_CORE!r}))\n"
        f"for name in {sorted(MODULES)!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "a module prints while it is imported"


def test_help_of_every_entry_imports_no_torch() -> None:
    """One process asks all entries for help in turn: torch alone would take seconds each time."""
    code = (
        "import runpy, sys\n"
        f"for name in {sorted(name for name, tree in TREES.items() if is_entry(tree) and name not in NO_FLAGS)!r}:\n"
        "    sys.argv = [name, '--help']\n"
        "    try: runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end: assert not end.code, name\n"
        "    heavy = {'torch', 'transformers', 'torchvision', 'scipy'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} --help imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr


def test_choices_of_flags_are_those_of_the_code() -> None:
    """They are written twice, so that flags need no torch."""
    assert tuple(presets.PRESETS) == flags.GPT_SIZES
    assert tuple(frechet.NAMES) == cli.EXTRACTORS
    assert tuple(device.PRECISIONS) == cli.PRECISION_NAMES
    assert tuple(video_codecs.CODECS) == cost_flags.CODEC_NAMES
    assert tuple(download.FAMILIES) == ("vjepa2", "videomae")
