"""scripts/dev/shape.py on a made-up tree, with answers counted by hand. The traced runs are not made here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "dev" / "shape.py"
FILES = {
    "tokenizer/__init__.py": "",
    "tokenizer/train.py": (
        '"""Train. It says what is there, where a file lies, and nothing where none is."""\n'
        "from typing import TYPE_CHECKING\n\n"
        "from tokenizer import model\n"
        "from tokenizer.common import Config\n\n"
        "if TYPE_CHECKING:\n    from tokenizer.typed import Typed\n\n\n"
        "def main():\n    from tokenizer.late import run  # loaded late\n\n    run(model, Config)\n\n\n"
        'if __name__ == "__main__":\n    main()\n'
    ),
    "tokenizer/model.py": "import tokenizer.common  # noqa: F401\n",
    "tokenizer/common.py": "# why\nclass Config: ...\n",
    "tokenizer/late.py": "import tokenizer.ring\n\n\ndef run(*args): ...\n",
    "tokenizer/ring.py": "def back():\n    import tokenizer.late\n",
    "tokenizer/typed.py": "\n" * 451,
    "tokenizer/losses/gan.py": "x = 1  # [B]\ny = 2\n",
    "scripts/dev/count.py": "import tokenizer.losses.gan\n",
    "tests/test_model.py": "import tokenizer.late, tokenizer.ring\n" * 9,
    "README.md": "# A page\n\nIt is not long; see where it ends.\n```\nwhere no one looks\n```\nDon't stop.\n",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def shape() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shape", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.modules["shape"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_figures_of_a_made_up_tree(tree: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--root", str(tree), "--no-walks", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    now = {name.strip(): row["now"] for name, row in found["measures"].items()}
    assert now["Python files"] == 9
    assert now["Python lines outside tests/"] == 16 + 1 + 2 + 4 + 2 + 451 + 2 + 1 + 2
    assert now["lines in scripts"] == 1
    assert found["long files"] == {"tokenizer/typed.py": "451 lines"} and now["files over 450 lines"] == 1
    assert now["files that tokenizer.train pulls in"] == 3  # itself, model, common; not what only type checkers see
    assert now["with imports in functions, tokenizer.train"] == 5
    assert found["single-importer files"] == {
        "tokenizer/model.py": "tokenizer/train.py",
        "tokenizer/ring.py": "tokenizer/late.py",
        "tokenizer/losses/gan.py": "scripts/dev/count.py",
    }
    assert now["files in import cycles"] == 2  # late and ring
    assert now["function length, longest"] == 4
    assert now["comments in tokenizer/losses"] == 50 and now["comments in tokenizer/router"] is None
    assert now["README lines"] == 7 and now["README negations"] == 3


def test_a_return_is_an_entry_into_a_file_that_was_left(shape: ModuleType) -> None:
    calls = [("a", "f"), ("b", "g"), ("b", "h"), ("a", "f"), ("c", "k"), ("a", "m"), ("b", "g"), ("b", "n")]
    # first calls: a.f b.g b.h c.k a.m b.n -> a b c a b
    assert shape.walk_figures(calls) == {"files": 3, "returns": 2, "functions": 6}
