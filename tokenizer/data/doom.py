"""Walks through the levels of Freedoom, rendered by ViZDoom: textured rooms, and a camera whose motion is known.

No monsters, weapon or HUD. A clip is one walk whose camera may pause, start, change its speed or its motion, at borders
of temporal blocks and elsewhere; the motion is its label:

    still   nothing changes, to the bit
    walk    forward, sometimes backward
    turn    on the spot
    strafe  to a side
    both    forward and turning at once
    mixed   two of walk, turn, strafe and both, one after the other

Steady walks are the first five, at one speed from the first frame to the last. While the camera pauses the world does,
too, so paused frames are equal to the bit. Levels are split, not walks: no room of one split is seen in another.

Needs the package vizdoom (`pip install 'evatok[scenes]'`), which brings the engine and the levels (BSD-3-Clause).
Letters: T frames, H W rows and columns, C colours, P points.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.common.device import rng_for
from tokenizer.common.errors import UserError
from tokenizer.data.video_io import resize_center_crop

MOTIONS = ("still", "walk", "turn", "strafe", "both", "mixed")
STEADY_MOTIONS = MOTIONS[:-1]
SPLITS = ("train", "validation", "test")
LEVELS = (*(f"E{e}M{m}" for e in range(1, 5) for m in range(1, 10)), *(f"MAP{m:02d}" for m in range(1, 33)))
FRAMES_PER_BLOCK = 4
TICS = 2  # of the engine, 35 a second, between two frames
WALK_SPEED = (0.4, 9.0)  # map units a frame, log-uniform; a door is 64 to 128 wide
TURN_SPEED = (0.15, 3.0)  # degrees a frame, log-uniform
DARKEST, FLATTEST = 32.0, 12.0  # grey levels: mean and deviation below which a frame shows no room
NEAREST = (7, 18)  # depth, 0 to 255, whose median and 90 % quantile a first frame must reach, or it shows a wall
MAX_DRAWS = 300  # places tried for one walk

_VARIABLES = ("POSITION_X", "POSITION_Y", "ANGLE", "VELOCITY_X", "VELOCITY_Y")
_GAMMA = 1.8  # of the engine, whose own 1.0 is made for dark rooms
_FRICTION = 0.90625  # velocity kept by a tic, after the push of that tic
_UNITS_PER_PUSH = 32.0  # of the two move buttons for one map unit a tic
_SETTLE = 12  # tics after an episode begins or the camera is put somewhere: the engine ignores buttons at first
_MARGIN = 0.6  # share of the intended way that must be covered, or the walk ran into something


def level_split(level: str) -> str:
    """Every eighth level is for tests, another eighth for validation."""
    return {3: "test", 6: "validation"}.get(LEVELS.index(level) % 8, "train")


def levels_of(split: str) -> tuple[str, ...]:
    return tuple(level for level in LEVELS if level_split(level) == split)


@dataclass(frozen=True)
class Step:
    """What the camera does between two frames: map units forward and to the right, degrees clockwise."""

    forward: float = 0.0
    right: float = 0.0
    turn: float = 0.0

    @property
    def rests(self) -> bool:
        return self == Step()


@dataclass(frozen=True)
class Walk:
    """A rendered walk: uint8 [T, H, W, 3], its motion, its level, its steps, and how many places were tried."""

    frames_THWC: np.ndarray
    motion: str
    level: str
    steps: tuple[Step, ...]
    draws: int


def render_doom_walk(seed: int, split: str, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, str]:
    """Walk number `seed` of a split: (frames_THWC uint8 [num_frames, size, size, 3], motion).

    Motions take turns in consecutive seeds, and levels after each round of motions, since opening one takes as long as
    a walk.
    """
    walk = draw_walk(seed, split, size, num_frames)
    return walk.frames_THWC, walk.motion


def render_steady_walk(seed: int, split: str, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, str]:
    """The same, of walks that keep one motion and one speed."""
    walk = draw_walk(seed, split, size, num_frames, steady=True)
    return walk.frames_THWC, walk.motion


def draw_walk(seed: int, split: str, size: int = 64, num_frames: int = 16, steady: bool = False) -> Walk:
    """Walk number `seed`: places are tried until one shows a lit room and leaves the camera its way."""
    rng = rng_for(seed, "steady doom walk" if steady else "doom walk", split)
    motions = STEADY_MOTIONS if steady else MOTIONS
    turn, motion = seed // len(motions), motions[seed % len(motions)]
    levels = levels_of(split)
    for draw in range(MAX_DRAWS):
        if draw % 10 == 0:  # a level may be dark all over; another one then
            level = levels[(turn + draw // 10) % len(levels)]
            engine = _engine(level, size)
            engine.enter(level, int(rng.integers(2**31)))
        steps = draw_steps(motion, num_frames, rng, steady)
        frames_THWC = engine.walk(steps, rng)
        if frames_THWC is not None:
            return Walk(resize_center_crop(frames_THWC, size), motion, level, steps, draw + 1)
    raise RuntimeError(f"doom:{split} {seed}: {MAX_DRAWS} places, and none shows a room")


def draw_steps(motion: str, num_frames: int, rng: np.random.Generator, steady: bool = False) -> tuple[Step, ...]:
    """The steps that lead to frames 1 .. num_frames - 1: segments that rest or move, each at a speed of its own."""
    if motion == "still":
        return (Step(),) * (num_frames - 1)
    cuts = [] if steady else _draw_cuts(num_frames, rng, at_least=int(motion == "mixed"))
    bounds = [1, *cuts, num_frames]
    num_segments = len(bounds) - 1
    # whether segment k moves: rest and motion in turn, or a change from one motion or speed to another
    moving = [True] if num_segments == 1 else _draw_moving(num_segments, motion, rng)
    kinds = _draw_kinds(moving, motion, rng)
    steps: list[Step] = []
    for kind, begin, end in zip(kinds, bounds[:-1], bounds[1:], strict=True):
        steps += [_draw_step(kind, rng)] * (end - begin)
    return tuple(steps)


def _draw_cuts(num_frames: int, rng: np.random.Generator, at_least: int) -> list[int]:
    """Frames at which the camera begins to do something else: first frames of blocks three times in five."""
    borders = np.arange(FRAMES_PER_BLOCK, num_frames, FRAMES_PER_BLOCK)
    anywhere = np.arange(2, num_frames - 1)
    frames = borders if rng.random() < 0.6 else anywhere
    most = min(3, len(frames))
    return sorted(rng.choice(frames, int(rng.integers(min(at_least, most), most + 1)), replace=False).tolist())


def _draw_moving(num_segments: int, motion: str, rng: np.random.Generator) -> list[bool]:
    if motion == "mixed":
        moving = [True, True] + [bool(rng.random() < 0.5) for _ in range(num_segments - 2)]
        return [bool(m) for m in rng.permutation(moving)]
    first = bool(rng.random() < 0.5)
    moving = [first == (k % 2 == 0) for k in range(num_segments)]
    return [True] * num_segments if rng.random() < 0.2 else moving


def _draw_kinds(moving: list[bool], motion: str, rng: np.random.Generator) -> list[str]:
    if motion != "mixed":
        return [motion if moves else "still" for moves in moving]
    pair = rng.choice(["walk", "turn", "strafe", "both"], 2, replace=False).tolist()
    kinds, turn = [], 0
    for moves in moving:
        kinds.append(pair[turn % 2] if moves else "still")
        turn += moves
    return kinds


def _draw_step(kind: str, rng: np.random.Generator) -> Step:
    speed, degrees = (float(np.exp(rng.uniform(*np.log(span)))) for span in (WALK_SPEED, TURN_SPEED))
    side, ahead = (-1.0 if rng.random() < share else 1.0 for share in (0.5, 0.25))
    return {
        "still": Step(),
        "walk": Step(forward=ahead * speed),
        "turn": Step(turn=side * degrees),
        "strafe": Step(right=side * speed),
        "both": Step(forward=ahead * speed, turn=side * degrees),
    }[kind]


class _Engine:
    """ViZDoom with one open level. Everything it shows after `enter` depends on the arguments given since then."""

    def __init__(self, wad: str, size: int) -> None:
        try:
            import vizdoom
        except ImportError as error:
            raise UserError("doom scenes need ViZDoom: pip install 'evatok[scenes]'") from error
        self._vizdoom = vizdoom
        self._wad = str(Path(vizdoom.__file__).parent / wad)
        self._side = 120 if size <= 120 else 240 if size <= 240 else 480
        self._starts: dict[str, list[np.ndarray]] = {}  # level -> walls of each sector that a camera fits into
        self._level, self._seed = "", 0
        self._process = os.getpid()
        self._folder = tempfile.TemporaryDirectory(prefix="evatok-vizdoom-")
        self._game: Any = None

    def enter(self, level: str, seed: int) -> None:
        """Begin an episode of a level."""
        if self._game is None:
            self._open(level)
        self._game.set_seed(seed)
        self._game.set_doom_map(level)
        self._game.new_episode()
        self._level, self._seed = level, seed
        if level not in self._starts:
            self._starts[level] = _open_sectors(self._game.get_state().sectors)
        self._act(Step(), _SETTLE)

    def walk(self, steps: tuple[Step, ...], rng: np.random.Generator) -> np.ndarray | None:
        """Frames [len(steps) + 1, H, W, 3] of a walk from a drawn place; None if it is dark or flat or blocked."""
        x, y = _draw_place(self._starts[self._level], rng)
        self._game.send_game_command(f"warp {x:.0f} {y:.0f}")
        self._act(Step(turn=rng.uniform(0, 360)), 1)
        self._act(Step(), _SETTLE)
        if self._game.is_episode_finished():  # put into an exit, or crushed
            self.enter(self._level, self._seed)
            return None
        moving = next((step for step in steps if not step.rests), None)
        if moving is not None:  # up to speed, before the first frame
            for _ in range(3):
                self._move(Step(moving.forward, moving.right))
            if self._game.is_episode_finished():
                self.enter(self._level, self._seed)
                return None
        frame = self._frame(first=True)
        frames: list[np.ndarray] = []
        for step in steps:
            if frame is None:
                return None
            frames.append(frame)
            if step.rests:
                continue
            before = self._variables()
            self._move(step)
            if self._game.is_episode_finished():
                self.enter(self._level, self._seed)
                return None
            after = self._variables()
            way, wanted = np.hypot(after[0] - before[0], after[1] - before[1]), np.hypot(step.forward, step.right)
            if not _MARGIN * wanted - 1.5 <= way <= wanted + 6:  # a wall; a teleporter or a lift
                return None
            frame = self._frame()
        return None if frame is None else np.stack([*frames, frame])

    def close(self) -> None:
        if self._game is not None and self._process == os.getpid():
            self._game.close()
            self._game = None

    def _open(self, level: str) -> None:
        vizdoom, game = self._vizdoom, self._vizdoom.DoomGame()
        buttons = vizdoom.Button
        game.set_doom_game_path(self._wad)
        game.set_doom_map(level)
        game.set_doom_config_path(os.path.join(self._folder.name, "vizdoom.ini"))
        game.set_window_visible(False)
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{self._side * 4 // 3}X{self._side}"))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for shown in ("hud", "weapon", "crosshair", "messages", "decals", "particles", "screen_flashes"):
            getattr(game, f"set_render_{shown}")(False)
        game.set_available_buttons(
            [buttons.MOVE_FORWARD_BACKWARD_DELTA, buttons.MOVE_LEFT_RIGHT_DELTA, buttons.TURN_LEFT_RIGHT_DELTA]
        )
        game.set_depth_buffer_enabled(True)
        game.set_sectors_info_enabled(True)
        game.set_episode_timeout(1_000_000)
        game.add_game_args(
            f"-nomonsters +gamma {_GAMMA} +sv_cheats 1 +movebob 0 +con_midtime 0 +cl_showsecretmessage 0"
        )
        with contextlib.chdir(self._folder.name):  # the engine makes a folder where it starts
            game.init()
        self._game = game
        self._guard = _guard_engines()
        atexit.register(self.close)

    def _act(self, step: Step, tics: int) -> None:
        self._game.make_action([step.forward, step.right, step.turn], tics)

    def _move(self, step: Step) -> None:
        """The tics of one frame; the push of each is what brings the velocity to the wanted one."""
        for _ in range(TICS):
            _, _, angle, vx, vy = self._variables()
            cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
            ahead, right = vx * cos + vy * sin, vx * sin - vy * cos
            forward, side = (
                (wanted / TICS / _FRICTION - now) * _UNITS_PER_PUSH
                for wanted, now in ((step.forward, ahead), (step.right, right))
            )
            self._act(Step(forward, side, step.turn / TICS), 1)

    def _variables(self) -> list[float]:
        """Place, angle in degrees, velocity in map units a tic."""
        return [self._game.get_game_variable(getattr(self._vizdoom.GameVariable, name)) for name in _VARIABLES]

    def _frame(self, first: bool = False) -> np.ndarray | None:
        """The picture, [H, W, 3], or None if it is too dark or too flat (the first also: too near) for a room."""
        state = self._game.get_state()
        if first and (np.quantile(state.depth_buffer, (0.5, 0.9)) < NEAREST).any():
            return None
        frame_HWC = state.screen_buffer.copy()
        side = frame_HWC.shape[0]
        left = (frame_HWC.shape[1] - side) // 2
        frame_HWC = frame_HWC[:, left : left + side]
        small = frame_HWC[::4, ::4].mean(axis=2)
        return frame_HWC if small.mean() >= DARKEST and small.std() >= FLATTEST else None


def _open_sectors(sectors: list[Any]) -> list[np.ndarray]:
    """Walls [P, 2, 2] (end, coordinate) of the sectors that are high enough for the camera and not tiny."""
    found = []
    for sector in sectors:
        if sector.ceiling_height - sector.floor_height >= 64 and len(sector.lines) >= 3:
            walls = np.asarray([[(line.x1, line.y1), (line.x2, line.y2)] for line in sector.lines])
            if np.ptp(walls.reshape(-1, 2), axis=0).min() >= 64:
                found.append(walls)
    return found


def _draw_place(sectors: list[np.ndarray], rng: np.random.Generator) -> tuple[float, float]:
    """A point inside a sector; each is as likely as the square root of its extent, so that halls do not take all."""
    extents = np.asarray([np.sqrt(np.ptp(walls.reshape(-1, 2), axis=0).prod()) for walls in sectors])
    while True:
        walls = sectors[int(rng.choice(len(sectors), p=extents / extents.sum()))]
        low, high = walls.reshape(-1, 2).min(axis=0), walls.reshape(-1, 2).max(axis=0)
        x, y = rng.uniform(low + 24, high - 24)
        (x1, y1), (x2, y2) = walls[:, 0].T, walls[:, 1].T
        crosses = (y1 > y) != (y2 > y)
        at = x1 + (y - y1) / np.where(y1 == y2, 1, y2 - y1) * (x2 - x1)
        if np.count_nonzero(crosses & (at > x)) % 2:  # a ray to the right leaves the sector
            return float(x), float(y)


def _guard_engines() -> subprocess.Popen[bytes] | None:
    """A shell that kills this process's engines when this process is gone: an engine on its own would wait for ever.

    It reads a pipe that only ends with this process. Without /proc (not Linux) there is none.
    """
    own = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except OSError:  # it ended meanwhile
            continue
        name, facts = rest.rsplit(") ", 1)
        if name == "vizdoom" and int(facts.split()[1]) == os.getpid():
            own.append(pid)
    if not own:
        return None
    kill = f"trap '' INT TERM; read -r _; kill -9 {' '.join(own)} 2>/dev/null"
    return subprocess.Popen(["/bin/sh", "-c", kill], stdin=subprocess.PIPE)


_engines: dict[tuple[int, str, int], _Engine] = {}  # by process: one that a fork inherits is not its own


def _engine(level: str, size: int) -> _Engine:
    """This process's engine for the file that holds the level; at most two are open at once."""
    key = (os.getpid(), "freedoom1.wad" if level.startswith("E") else "freedoom2.wad", size)
    if key not in _engines:
        _engines[key] = _Engine(key[1], size)
    return _engines[key]
