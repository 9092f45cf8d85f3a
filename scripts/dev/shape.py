"""Print the shape of the code: lines, files, imports, walks, comments and prose, beside commit c8a7215 and the targets.

    python scripts/dev/shape.py               # the table, then the single-importer files and the long files by name
    python scripts/dev/shape.py --json        # the same for machines
    python scripts/dev/shape.py --no-walks    # without the three traced runs: seconds instead of a minute

Lines and files. Python files of the three packages and of scripts/; tests/ is left out everywhere. A function's length
runs from `def` to its last line, docstring included.

Imports are read from the source, not executed. What a training entry pulls in is itself and everything it imports at
module level, transitively; TYPE_CHECKING blocks are not followed, `__init__` files are not counted. "With imports in
functions" follows those too; imports by string are not seen. A single-importer file is imported by exactly one other
file outside tests/; entry points (`if __name__ == "__main__"`) and `__init__` files are not listed.

Walks are real runs, traced in all threads: the main job on one bundled clip with the shipped weights (`main`, data
decoded in the same process); one pass of the training loop with GAN and alignment, batch and step, random encoders; one
clip sampled with the shipped GPT and decoded, models already loaded. A file is entered if one of its named functions is
called; bodies of modules and classes, lambdas, comprehensions and templates do not count. For the returns, list each
function once, at its first call, in the order of the run; replace it by its file and merge equal neighbours. An entry
into a file that is already on the list is a return: returns = entries - files. It is how often a reader who follows the
run goes back to a file that was closed. All figures of c8a7215 were computed with this script; a walk should not be
longer than there.

Prose is README.md, scripts/README.md, configs/README.md (without code) and all docstrings and comments.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "autoregressive", "evaluations")
FOLDERS = (*PACKAGES, "scripts")
ENTRIES = ("tokenizer.train", "autoregressive.train", "tokenizer.router.train")
COMMENTED = ("tokenizer/blocks", "tokenizer/losses", "tokenizer/router", "autoregressive/sampler.py")
PAGES = ("README.md", "scripts/README.md", "configs/README.md")
WALKS = {"report": "clip -> report", "step": "training step", "sample": "sampled clip"}
LONG_FILE = 450  # lines


@dataclass
class Source:
    """One Python file: its path from the root, its text, its syntax tree, its lines."""

    path: str
    text: str
    tree: ast.Module
    num_lines: int

    @property
    def module(self) -> str:
        """tokenizer/blocks/attention.py -> tokenizer.blocks.attention; an __init__ has the name of its package."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def is_init(self) -> bool:
        return self.path.endswith("/__init__.py")

    @property
    def is_entry(self) -> bool:
        return "\nif __name__ ==" in self.text


def read_sources(root: Path) -> list[Source]:
    """All Python files of the packages and of scripts/, in the order of their paths."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    files = zip(paths, texts, strict=True)
    return [Source(p.relative_to(root).as_posix(), t, ast.parse(t), len(t.splitlines())) for p, t in files]


def function_lengths(sources: list[Source]) -> list[int]:
    """Lines of every function, shortest first."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for source in sources for node in ast.walk(source.tree))
    return sorted((node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, kinds))


Imports = tuple[set[str], set[str]]
"""Project modules that a file imports when it is loaded, and when one of its functions runs."""


def read_imports(source: Source, modules: set[str]) -> Imports:
    """`from a import b` imports a.b if that is a module, else a. TYPE_CHECKING blocks are passed over."""
    at_load, in_functions = set[str](), set[str]()

    def visit(node: ast.AST, names: set[str]) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names = in_functions
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in modules else str(node.module) for name in deeper)
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(source.tree, at_load)
    return at_load & modules, in_functions & modules


def reachable(start: str, imports: dict[str, Imports], deep: bool = False) -> set[str]:
    """Modules that importing `start` loads, itself included; `deep`: with what its functions import later."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += set().union(*imports[module]) if deep else imports[module][0]
    return seen


def single_importers(sources: list[Source], imports: dict[str, Imports]) -> dict[str, str]:
    """Path of each file of the packages with one importer -> path of that importer."""
    path_of = {source.module: source.path for source in sources}
    importers: dict[str, list[str]] = {module: [] for module in path_of}
    for module, (at_load, in_functions) in imports.items():
        for target in (at_load | in_functions) - {module}:
            importers[target].append(path_of[module])
    listed = [s for s in sources if s.path.startswith(PACKAGES) and not s.is_entry and not s.is_init]
    return {s.path: importers[s.module][0] for s in listed if len(importers[s.module]) == 1}


def in_cycles(imports: dict[str, Imports]) -> list[str]:
    """Modules that import themselves through others, imports in functions included."""
    behind = {m: [reachable(target, imports, deep=True) for target in set().union(*its)] for m, its in imports.items()}
    return [module for module, sets in behind.items() if module in set().union(*sets)]


_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|pragma|mypy:|!)")
_NEGATION = re.compile(r"\b(?:no|not|never|none|nothing|nobody|nor|neither|cannot)\b|n't\b", re.IGNORECASE)
_PHRASES = {
    '"where"': re.compile(r"\bwhere\b", re.IGNORECASE),
    '"what is/was", "stands"': re.compile(r"\bwhat\s+(?:is|are|was|were)\b|\bstands?\b|\bstood\b", re.IGNORECASE),
    '"say(s)"': re.compile(r"\bsays?\b", re.IGNORECASE),
}
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string that opens a module, class or function, and strings that are a statement by themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def comments_and_code(source: Source) -> tuple[list[str], int]:
    """Comments without directives such as noqa, and the number of lines that hold code (no docstring, no blank)."""
    comments: list[str] = []
    code: set[int] = set()
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            comments += [] if _DIRECTIVE.match(token.string) else [token.string.lstrip("# ")]
        elif token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    for string in docstrings(source.tree):
        code.difference_update(range(string.lineno, (string.end_lineno or string.lineno) + 1))
    return comments, len(code)


def comment_density(sources: list[Source]) -> float | None:
    """Comments per 100 lines of code; None if there is no code."""
    counts = [(len(comments), code) for comments, code in map(comments_and_code, sources)]
    total = sum(code for _, code in counts)
    return round(100 * sum(comments for comments, _ in counts) / total, 1) if total else None


def read_prose(root: Path, sources: list[Source]) -> str:
    """The three pages, all docstrings, all comments; code blocks and `code` taken out."""
    pages = [(root / page).read_text(encoding="utf-8") for page in PAGES if (root / page).is_file()]
    texts = [re.sub(r"(?ms)^```.*?^```", "", page) for page in pages]
    for source in sources:
        texts += [str(string.value) for string in docstrings(source.tree)] + comments_and_code(source)[0]
    return "\n\n".join(re.sub(r"`[^`\n]*`", "x", text) for text in texts)


class Trace:
    """A profile function that records (file, function) of every call of project code.

    With the name of a function: recording begins at its first call, and each return from it closes a window and opens
    the next one. Without: everything is one window.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.windows: list[list[tuple[str, str]]] = [] if name else [[]]
        self._calls = None if name else self.windows[0]
        self._paths: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event not in ("call", "return") or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return  # only functions are optimized: bodies of classes and modules run when something is imported
        if (path := self._path(frame.f_code.co_filename)) is None:
            return
        name = frame.f_code.co_name
        if event == "call":
            if self._calls is None and name == self.name:
                self._calls = []
            if self._calls is not None and not name.startswith("<"):
                self._calls.append((path, f"{frame.f_code.co_qualname}:{frame.f_code.co_firstlineno}"))
        elif self._calls is not None and name == self.name:
            self.windows.append(self._calls)
            self._calls = []

    def _path(self, filename: str) -> str | None:
        if filename not in self._paths:
            path = os.path.relpath(filename)
            self._paths[filename] = path if path.startswith(PACKAGES) and path.endswith(".py") else None
        return self._paths[filename]


def walk_figures(calls: list[tuple[str, str]]) -> dict[str, int]:
    """Calls in order, as (file, function) -> files, functions and returns (defined in the head of this file)."""
    order = [path for path, _ in dict.fromkeys(calls)]
    entries = len(list(itertools.groupby(order)))
    return {"files": len(set(order)), "returns": entries - len(set(order)), "functions": len(set(calls))}


def traced(trace: Trace, run: Callable[[], object]) -> dict[str, int]:
    """Run under the profiler -> the figures of the window that calls the most functions."""
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if not trace.windows:
        raise RuntimeError(f"{trace.name} was never called, or did not return: has it another name now?")
    return max(map(walk_figures, trace.windows), key=lambda figures: figures["functions"])


def walk(name: str, out: str) -> dict[str, int]:
    """Make one traced run from the repository root, in a fresh process; results go to the folder `out`."""
    final, router, gpt_file = (f"ckpts/mini/{name}.safetensors" for name in ("final", "router", "gpt_c2v"))
    if name == "report":
        sys.argv = ["tokenizer/router/reconstruction_qual_with_router.py", "--save_dir", out, "--device", "cpu"]
        sys.argv += ["--vid_path", "tokenizer/data/bundled/tree_000.mp4", "--num-workers", "0"]
        sys.argv += ["--router_ckpt", router, "--router_config", "configs/mini/router.yaml"]
        sys.argv += ["--vq_ckpt", final, "--tok_config", "configs/mini/final.yaml"]
        return traced(Trace("main"), lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    if name == "step":
        sys.argv = ["tokenizer/train.py", "configs/debug/full/proxy.yaml", "--dry-run"]
        sys.argv += [f"run.dir={out}", "run.device=cpu"]
        return traced(Trace("train_step"), lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    return walk_sample(gpt_file, final)


def walk_sample(gpt_file: str, tokenizer_file: str) -> dict[str, int]:
    """Sample and decode one clip; loading the models is not traced."""
    from autoregressive import Request, Sampler, SamplingConfig, load_gpt, tokens_of
    from tokenizer import load_tokenizer

    gpt, tokenizer = load_gpt(gpt_file), load_tokenizer(tokenizer_file)

    def sample_clip() -> None:
        sampler = Sampler(gpt.model, SamplingConfig(slots=1, guidance=(2.25,)))
        samples = list(sampler.run([Request(("shape",), label=0)]))
        tokenizer.decode(tokens_of(samples, gpt.model.layout, tokenizer))

    return traced(Trace(), sample_clip)


def run_walk(name: str, root: Path) -> dict[str, int]:
    """The same in a process of its own, so that no run finds what another one has loaded or cached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).absolute()), "--walk", name, folder]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        sys.exit(f"error: the walk {WALKS[name]!r} failed; its output:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


BEFORE = Path(__file__).with_name("shape_c8a7215.json")  # name -> what --root CHECKOUT --json found
TARGETS = {
    "Python lines outside tests/": "<= 19830",
    **{f"files that {entry} pulls in": "<= 40" for entry in ENTRIES},
    "single-importer files": "<= 12",
    "files in import cycles": "<= 0",
    "function length, 95th percentile": "<= 24",
    "function length, longest": "<= 51",
    **{f"  comments in {place}": ">= 7" for place in COMMENTED},
    '  per 1000 words: "where"': "<= 2.3",
    '  per 1000 words: "what is/was", "stands"': "<= 0.6",
    '  per 1000 words: "say(s)"': "<= 0.4",
    "README lines": "<= 180",
    "README negations": "<= 8",
}


def measure(root: Path, walks: bool = True) -> dict[str, Any]:
    """All figures of the tree at `root`: {"measures": {name: value}}, and the files behind two of them."""
    sources = read_sources(root)
    modules = {source.module for source in sources}
    imports = {source.module: read_imports(source, modules) for source in sources}
    found: dict[str, float | None] = {"Python lines outside tests/": sum(s.num_lines for s in sources)}
    for folder in FOLDERS:
        found[f"  lines in {folder}"] = sum(s.num_lines for s in sources if s.path.startswith(f"{folder}/"))
    long_files = {s.path: f"{s.num_lines} lines" for s in sources if s.num_lines > LONG_FILE}
    found |= {"Python files": len(sources), f"files over {LONG_FILE} lines": len(long_files)}

    faces = {source.module for source in sources if source.is_init}
    for entry in filter(modules.__contains__, ENTRIES):
        found[f"files that {entry} pulls in"] = len(reachable(entry, imports) - faces)
        found[f"  with imports in functions, {entry}"] = len(reachable(entry, imports, deep=True) - faces)
    singles = single_importers(sources, imports)
    found |= {"single-importer files": len(singles), "files in import cycles": len(in_cycles(imports))}
    for name, title in WALKS.items() if walks else ():
        found |= {f"{title}, {what}": number for what, number in run_walk(name, root).items()}

    lengths = function_lengths(sources) or [0]
    found["function length, 95th percentile"] = lengths[int(0.95 * (len(lengths) - 1))]
    found["function length, longest"] = lengths[-1]
    found["comments per 100 code lines"] = comment_density(sources)
    for place in COMMENTED:
        chosen = [s for s in sources if s.path == place or s.path.startswith(f"{place}/")]
        found[f"  comments in {place}"] = comment_density(chosen)

    prose = read_prose(root, sources)
    counts = {name: len(pattern.findall(prose)) for name, pattern in _PHRASES.items()}
    found["words of prose"] = num_words = len(_WORD.findall(prose))
    found |= {f"  per 1000 words: {name}": round(1000 * n / max(1, num_words), 1) for name, n in counts.items()}
    readme = (root / "README.md").read_text(encoding="utf-8")
    found |= {"README lines": len(readme.splitlines()), "README words": len(readme.split())}
    found["README negations"] = len(_NEGATION.findall(readme))
    return {"measures": found, "single-importer files": singles, "long files": long_files}


def missed(value: float | None, target: str) -> bool:
    """Whether a figure fails a target such as "<= 40"; no figure and no target fail nothing."""
    sign, _, bound = target.partition(" ")
    return value is not None and bound != "" and (value > float(bound) if sign == "<=" else value < float(bound))


def print_table(found: dict[str, Any]) -> None:
    width = max(map(len, found["measures"]))
    print(f"{'':{width}} {'now':>7} {'c8a7215':>8}  target")
    for name, row in found["measures"].items():
        now, before = ("-" if row[key] is None else f"{row[key]:.7g}" for key in ("now", "c8a7215"))
        miss = "  MISSED" if missed(row["now"], row["target"]) else ""
        print(f"{name:{width}} {now:>7} {before:>8}  {row['target']}{miss}".rstrip())
    for title in ("single-importer files", "long files"):
        print(f"\n{title}", *(f"{path}: {what}" for path, what in found[title].items()), sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the shape of the code beside commit c8a7215 and the targets.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--no-walks", action="store_true", help="skip the three traced runs")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure (default: this one)")
    parser.add_argument("--walk", nargs=2, help=argparse.SUPPRESS)  # how a traced run is started
    args = parser.parse_args()
    if args.walk:
        return print(json.dumps(walk(*args.walk)))
    found = measure(args.root.absolute(), walks=not args.no_walks)
    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    limits = {name: f"<= {value}" for name, value in before.items() if name.endswith((", files", ", returns"))}
    found["measures"] = {
        name: {"now": value, "c8a7215": before.get(name), "target": TARGETS.get(name, limits.get(name, ""))}
        for name, value in found["measures"].items()
    }
    print(json.dumps(found, indent=2)) if args.json else print_table(found)


if __name__ == "__main__":
    main()
