"""No text of the repository names a file that is not there."""

from __future__ import annotations

import ast
import io
import re
import tokenize

from test_docs import FILES, ROOT

CITED = re.compile(
    r"(?<![\w./<>*{}-])"
    r"((?:[\w-]+/)*[\w-]+\.(?:md|py|sh|sbatch)|(?:configs|ckpts)/[\w./-]+\.\w+)\b(?![*{])"
)
NOT_HERE = {
    "scripts/set_env_vars.sh": "made by the user",
    "set_env_vars.sh": "made by the user",
    "tables.md": "written by evaluations.report",
    "logging.py": "a name that no file may have",
    "random.py": "the standard module, or one that shadows it",
    "scripts/bench/NAME.py": "stands for any bench",
}


def prose(name: str) -> str:
    """The text of a page; of a script or config its comments; of Python also its docstrings."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith((".md", ".sbatch")):
        return text
    if not name.endswith(".py"):
        return "\n".join(re.findall(r"(?:^|\s)#(.*)$", text, re.M))
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "\n".join([*comments, *docstrings])


def test_no_text_names_a_file_that_is_not_there() -> None:
    known = {"/".join(parts[start:]) for parts in (name.split("/") for name in FILES) for start in range(len(parts))}
    lost = []
    for name in FILES:
        if name.endswith((".md", ".py", ".sh", ".sbatch", ".yaml", ".toml")):
            lost += [f"{name}: {cited}" for cited in CITED.findall(prose(name)) if cited not in known | NOT_HERE.keys()]
    assert not lost, "\n".join(lost)
