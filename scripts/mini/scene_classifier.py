"""A small classifier of the miniature's classes: trained on true clips, asked about generated ones.

It answers one question: does a clip that was generated for a class show that class? It is trained on freshly rendered
scenes and real clips of the training split alone, in some minutes, from a fixed seed; no weights are kept. So that it
judges shape and motion and not how sharp a codec is, it looks at small pictures, and what it learns from is disturbed
as any codec of blocks disturbs: each clip, by another amount, is held still within its temporal blocks, flattened
within its patches, and overlaid with spots and patches of wrong colour, others in each block.

Letters: B clips, C T H W, A classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tokenizer.common.device import derive_seed
from tokenizer.data.classed_scenes import CLASS_NAMES
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.loader import batches

REAL = "real"  # the class of every clip that no one rendered
NAMES = (*CLASS_NAMES, REAL)
_SIDE = 16  # pixels that the classifier looks at
_BLOCKS, _PATCHES = 4, 8  # of a codec: temporal blocks of a clip, patches along a side
_SPOTS, _SPECKS = 0.08, 0.08  # deviation, at most, of wrong colours in a block: over soft 4x4 spots, over patches
_STEPS, _BATCH, _RATE = 700, 32, 2e-3


class SceneClassifier(nn.Module):
    """Three strided 3D convolutions over a clip and its change from frame to frame, then the mean and the maximum."""

    def __init__(self, num_classes: int, width: int = 24) -> None:
        super().__init__()
        widths, strides = (6, width, 2 * width, 4 * width), ((1, 2, 2), (2, 2, 2), (2, 2, 2))
        layers: list[nn.Module] = []
        for (w_in, w_out), stride in zip(itertools.pairwise(widths), strides, strict=True):
            layers += [nn.Conv3d(w_in, w_out, 3, stride, padding=1), nn.GroupNorm(4, w_out), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], num_classes)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels in [0, 1], any size -> logits_BA."""
        frames = video_BCTHW.flatten(1, 2)  # B C*T H W
        small = F.interpolate(frames, (_SIDE, _SIDE), mode="area").view(*video_BCTHW.shape[:3], _SIDE, _SIDE)
        change = F.pad(small.diff(dim=2), (0, 0, 0, 0, 1, 0))  # B C T H W, 0 for the first frame
        x = self.features(torch.cat([small - 0.5, 4 * change], dim=1))
        return self.head(torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1))


def train_scene_classifier(size: int = 64, num_frames: int = 16, steps: int = _STEPS, seed: int = 0) -> SceneClassifier:
    """A classifier of `NAMES`, trained on rendered scenes that never repeat and on the real training clips."""
    torch.manual_seed(derive_seed(seed, "scene classifier"))
    scenes = f"duotone:train:{10 * len(CLASS_NAMES)}"
    clips = build_dataset(DataConfig([scenes, "bundled:train"], num_frames, size, crop_scale=0.7), seed)
    model = SceneClassifier(len(NAMES))
    optimizer = torch.optim.AdamW(model.parameters(), _RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for batch in tqdm(batches(clips, _BATCH, seed, steps=steps), "classifier", steps, unit="step"):
        class_B = torch.tensor([NAMES.index(label if label in CLASS_NAMES else REAL) for label in batch.labels])
        loss = F.cross_entropy(model(_disturbed(batch.video_BCTHW)), class_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _disturbed(video_BCTHW: Tensor) -> Tensor:
    """Clips as a codec of temporal blocks and patches might show them, each clip disturbed by another amount."""
    num_clips, _, num_frames, height, width = video_BCTHW.shape
    in_blocks = video_BCTHW.unflatten(2, (_BLOCKS, num_frames // _BLOCKS))  # B C N t H W
    hold, flatten, spots, specks = torch.rand(4, num_clips, 1, 1, 1, 1)
    shown = torch.lerp(in_blocks, in_blocks.mean(dim=3, keepdim=True), hold[..., None]).flatten(2, 3)  # B C T H W
    patches = F.adaptive_avg_pool3d(shown, (num_frames, _PATCHES, _PATCHES))
    shown = torch.lerp(shown, F.interpolate(patches, shown.shape[2:]), flatten)
    soft = F.interpolate(torch.randn(num_clips, 3, _BLOCKS, 4, 4), (_BLOCKS, height, width), mode="trilinear")
    hard = F.interpolate(torch.randn(num_clips, 3, _BLOCKS, _PATCHES, _PATCHES), (_BLOCKS, height, width))
    wrong = _SPOTS * spots * soft + _SPECKS * specks * hard
    return shown + wrong.repeat_interleave(num_frames // _BLOCKS, dim=2)


@torch.no_grad()
def accuracy(model: SceneClassifier, video_BCTHW: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Share of clips recognised as named in `names`, of each class that occurs and of all ("all")."""
    found_B = torch.cat([model(some).argmax(dim=1) for some in video_BCTHW.split(_BATCH)])
    right_B = found_B == torch.tensor([NAMES.index(name) for name in names])
    of_class = {
        name: right_B[[i for i, other in enumerate(names) if other == name]].double().mean().item()
        for name in dict.fromkeys(names)
    }
    return {**of_class, "all": right_B.double().mean().item()}
