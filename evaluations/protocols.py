"""Named, frozen protocols: everything that decides a number besides the weights. A number is worth its protocol card.

    python -m evaluations.protocols [NAME ...] [--json]      # list them, or print their cards

A protocol is never changed after its release: another rule is another name. What a command line overrides (another
extractor, fewer clips) gives a protocol that is marked as changed, under another hash.
"""

from __future__ import annotations

import argparse

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("List the evaluation protocols, or print the cards of some.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="protocols to show in full (default: list all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: name -> card")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from evaluations.metrics.frechet import COVARIANCES, NAMES
from tokenizer.common.clip_shape import Size, fitted, sides, size_text
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.sources import SCENES

TASKS = ("reconstruction", "class_to_video", "frame_prediction")
DATASETS = ("ucf101", "k600", "webvid", "folder", "mini")
CLIP_RULES = {
    "first": "the first {frames} frames of each video",
    "random": "one window of {frames} consecutive frames of each video, its start drawn from seed {seed} and the name",
    "windows": "all windows of {frames} frames that do not overlap, of all videos; {count} of them drawn, seed {seed}",
}
CHANGEABLE = ("extractor", "perceptual", "count", "seed", "draws", "num_frames", "size")


@dataclass(frozen=True)
class Protocol:
    """See the fields. `changed` names those that differ from the named protocol.

    sources: of the miniature, as `tokenizer.data.clips` reads them. listed: how many videos the official list has.
    count: clips that are scored (windows: drawn), None for all. score_size: both sides are resized to it before
    scoring. condition_scored: given frames are scored too. draws: of the bootstrap of means; distances take
    a twentieth.
    """

    name: str
    task: str
    about: str
    dataset: str
    split: str
    clip_rule: str = "first"
    sources: tuple[str, ...] = ()
    listed: int | None = None
    num_frames: int = 16
    fps: float | None = None  # None: the rate of each file
    size: Size = 128  # pixels of a square or [height, width]; see `fitted`; bilinear, antialiased
    score_size: int | None = None
    count: int | None = None
    seed: int = 42
    condition_frames: int = 0
    condition_scored: bool = True
    extractor: str = "i3d"
    perceptual: str = "lpips_vgg"
    covariance: str = "n"
    draws: int = 1000
    miniature: bool = False
    changed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (
            ("task", TASKS),
            ("dataset", DATASETS),
            ("clip_rule", tuple(CLIP_RULES)),
            ("extractor", (*NAMES, "none")),
            ("covariance", tuple(COVARIANCES)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"protocol {self.name}: {name} = {getattr(self, name)!r} is none of {', '.join(allowed)}"
                )
        if self.count is not None and self.count < 1:
            raise UserError(f"protocol {self.name}: count = {self.count} must be at least 1")

    @property
    def paired(self) -> bool:
        """Whether each clip has an original to be compared with; a sample of a class has none."""
        return self.task != "class_to_video"

    @property
    def hash(self) -> str:
        """Of every field that decides a number; a longer `about` is the same protocol."""
        fields = dataclasses.asdict(self) | {"about": ""}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def real_side_hash(self) -> str:
        """Of what decides the features of the real clips: protocols that agree in it share their statistics."""
        names = ("dataset", "split", "sources", "clip_rule", "num_frames", "fps", "size", "score_size", "count", "seed")
        fields = {name: getattr(self, name) for name in (*names, "extractor")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def change(self, **fields: Any) -> Protocol:
        """The same with other values of CHANGEABLE fields (None leaves one as it is), marked if they differ."""
        wanted = {name: value for name, value in fields.items() if value is not None and value != getattr(self, name)}
        if strange := set(wanted) - set(CHANGEABLE):
            raise UserError(f"protocol {self.name}: {sorted(strange)[0]} is fixed; choose another protocol")
        marked = tuple(sorted({*self.changed, *wanted}))
        return dataclasses.replace(self, **wanted, changed=marked) if wanted else self

    @property
    def notes(self) -> list[str]:
        """What a reader of its numbers must know: which fields were changed, if any."""
        notes = [f"not the protocol {self.name}: {', '.join(self.changed)} changed"] if self.changed else []
        if self.score_size is None and len(set(sides(self.size))) > 1 and self.extractor in ("i3d", "videomae"):
            notes.append(f"{self.extractor} squeezes the {size_text(self.size)} pixels of a frame into a square")
        return notes

    def clip_words(self) -> str:
        """The clip rule in words."""
        count = "all" if self.count is None else f"{self.count:,}"
        return CLIP_RULES[self.clip_rule].format(frames=self.num_frames, seed=self.seed, count=count)


_UCF_TRAIN: dict[str, Any] = {"dataset": "ucf101", "split": "train (trainlist01)", "listed": 9537}
_K600_VAL: dict[str, Any] = {"dataset": "k600", "split": "val"}
_MINI: dict[str, Any] = {
    "dataset": "mini",
    "split": f"held-out sources (scenes of version {SCENES})",
    "size": 64,
    "extractor": "effnet",
    "perceptual": "stlpips_alex",
    "miniature": True,
}

_ALL = (
    Protocol(
        "ucf101-recon-train", "reconstruction", "rFVD, LPIPS, PSNR on UCF-101 (paper: tables 2, 3, 5)", **_UCF_TRAIN
    ),
    Protocol(
        "ucf101-recon-train-larp",
        "reconstruction",
        "LARP's clip rule: a random window of each video; LARP draws it unseeded, here it is seeded",
        clip_rule="random",
        **_UCF_TRAIN,
    ),
    Protocol(
        "webvid-recon-val",
        "reconstruction",
        "rFVD, LPIPS, PSNR on WebVid val or any set of its layout, at 3 frames a second (paper: tables 1, 6)",
        dataset="webvid",
        split="val",
        fps=3.0,
    ),
    Protocol("folder-recon", "reconstruction", "any folder or manifest of videos", dataset="folder", split="all"),
    Protocol(
        "ucf101-c2v-10k",
        "class_to_video",
        "gFVD on UCF-101: as many samples as real windows, each with the label of its window (paper: tables 3, 4)",
        clip_rule="windows",
        count=10_000,
        **_UCF_TRAIN,
    ),
    Protocol(
        "k600-fp-50k-64px",
        "frame_prediction",
        "FVD on Kinetics-600: 5 frames given, all 16 scored, both sides resized to 64 pixels (paper: table 4)",
        clip_rule="windows",
        count=50_000,
        score_size=64,
        condition_frames=5,
        **_K600_VAL,
    ),
    Protocol(
        "mini-recon",
        "reconstruction",
        "the shipped miniature on real and rendered clips of held-out sources; compares with nothing published",
        sources=("bundled:heldout", "synthetic:heldout:226"),
        **_MINI,
    ),
    Protocol(
        "mini-c2v",
        "class_to_video",
        "the miniature's classes, held-out scenes; compares with nothing published",
        sources=("duotone:heldout:256",),
        **_MINI,
    ),
    Protocol(
        "mini-fp",
        "frame_prediction",
        "the miniature continues held-out scenes of its classes; compares with nothing published",
        sources=("duotone:heldout:256",),
        condition_frames=5,
        **_MINI,
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str, task: str | None = None) -> Protocol:
    """By name. UserError for an unknown one, and for one of another task than `task`."""
    fitting = [each.name for each in _ALL if task in (None, each.task)]
    if name not in PROTOCOLS:
        raise UserError(f"no protocol {name!r}; there are {', '.join(fitting)}")
    if name not in fitting:
        raise UserError(
            f"protocol {name} is for {PROTOCOLS[name].task}, not {task}; for this there are {', '.join(fitting)}"
        )
    return PROTOCOLS[name]


def card_of(protocol: Protocol, **facts: Any) -> dict[str, Any]:
    """The protocol card: the protocol with its hash, and what the run knows (list, weights, code version)."""
    fixed = dataclasses.asdict(protocol) | {"sources": list(protocol.sources), "changed": list(protocol.changed)}
    return {"protocol": fixed, "protocol_hash": protocol.hash, "clip_words": protocol.clip_words(), **facts}


def card_text(card: dict[str, Any]) -> str:
    """The card for people, one fact a line."""
    protocol = card["protocol"]
    name = f"{protocol['name']} ({card['protocol_hash']})"
    if protocol["changed"]:
        name += f"; CHANGED in {', '.join(protocol['changed'])}, so not this protocol any more"
    rate = "native" if protocol["fps"] is None else f"{protocol['fps']:g} frames a second"
    size = fitted(protocol["size"])
    if protocol["score_size"]:
        size += f"; both sides resized to {protocol['score_size']} for scoring"
    given = "none"
    if protocol["condition_frames"]:
        given = (
            f"{protocol['condition_frames']} frames, {'scored too' if protocol['condition_scored'] else 'not scored'}"
        )
    distance = (card.get("extractor") or {}).get("distance") or NAMES.get(protocol["extractor"], "none")
    lines = [
        ("protocol", name),
        ("about", protocol["about"]),
        ("data", f"{protocol['dataset']}, {protocol['split']} {' '.join(protocol['sources'])}".rstrip()),
        ("clips", card["clip_words"]),
        ("frames", f"{rate}; {size}"),
        ("given frames", given),
        ("scored", "uint8, as a lossless file holds them"),
        ("distance", f"{distance}, covariance over {protocol['covariance']}"),
        *_quality_lines(protocol),
        ("tokens", "counted without and with the length tokens, one a temporal block"),
    ]
    if protocol["miniature"]:
        lines.append(("miniature", "shows that the parts work; no number of it compares with the paper"))
    shown = {"protocol", "protocol_hash", "clip_words", "perceptual"}
    lines += [(name.replace("_", " "), _plain(value)) for name, value in card.items() if name not in shown]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def _quality_lines(protocol: dict[str, Any]) -> list[tuple[str, str]]:
    if protocol["task"] == "class_to_video":
        return [("image quality", "none: a sample of a class has no original")]
    return [
        ("perceptual", f"{protocol['perceptual']}, per frame, mean"),
        ("psnr", "mean over clips of the clip's dB; psnr_of_mean_mse is the dB of the mean error"),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return "none" if value is None else str(value)


def main() -> None:
    args = parse_arguments()
    shown = [find_protocol(name) for name in args.names] or list(_ALL)
    if args.json:
        print(json.dumps({each.name: card_of(each) for each in shown}, indent=1))
    elif args.names:
        print("\n\n".join(card_text(card_of(each)) for each in shown))
    else:
        for each in shown:
            print(f"{each.name:<26}{each.task:<18}{each.about}")


if __name__ == "__main__":
    run_cli(main)
