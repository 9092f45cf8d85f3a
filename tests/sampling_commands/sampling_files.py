"""What the tests of the sampling commands share: debug models, their flags, and reading what was written."""

from dataclasses import replace
from pathlib import Path

import av
import torch

from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import PRESETS
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict

ROOT = Path(__file__).parents[2]
CLASSES = PRESETS["GPT-debug"]
FRAMES = replace(CLASSES, num_classes=0, condition_lengths=[8, 4])
CLASS_NAMES = ["square", "circle", "triangle", "star", "cross", "ring", "moon", "cube", "cone", "line", "real"]


def save_random_gpt(path: Path, config: GPTConfig, class_names: list[str]) -> None:
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    tokens = {"tokenizer_sha256": "", "class_names": class_names}
    save_model(path, model.state_dict(), {"model": to_dict(config), "tokens": tokens}, {"kind": "gpt"})


def common(models: Path, gpt: str, out: Path) -> list[str]:
    return [
        "--tok-config", str(ROOT / "configs/debug/final.yaml"), "--vq-ckpt", str(models / "tok.safetensors"),
        "--gpt-model", "GPT-debug", "--gpt-ckpt", str(models / f"{gpt}.safetensors"),
        "--sample-dir", str(out), "--per-proc-batch-size", "3", "--device", "cpu",
    ]  # fmt: skip


def contents(out: Path, pattern: str) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob(pattern))}
    assert found
    return found


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
