"""Views of a clip for a router's training: whole clips, whole planes, and the same for any number of processes."""

import torch
from torch import Tensor

from tokenizer.common.distributed import BatchShard
from tokenizer.router.train import draw_patches, recolour, zoom_and_turn


def random_clips(num_clips: int) -> Tensor:
    return torch.rand(num_clips, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_augmentation_flips_turns_or_zooms_whole_clips() -> None:
    clips, shard = random_clips(64), BatchShard(list(range(64)), 64)

    def views(crop_scale: float, flip: bool, turns: bool) -> Tensor:
        return zoom_and_turn(clips, crop_scale, flip, turns, torch.Generator().manual_seed(0), shard)

    def kinds(seen: Tensor) -> list[int]:
        """How often each of the eight views of a square was met; every clip must be one of them, whole."""
        ways = [clips, clips.flip(-1), clips.flip(-2), clips.flip(-1, -2)]
        ways += [way.transpose(-1, -2) for way in ways]
        same_BV = torch.stack([(seen - way).abs().amax(dim=(1, 2, 3, 4)) < 1e-3 for way in ways], dim=1)
        assert (same_BV.sum(dim=1) == 1).all()
        return same_BV.sum(dim=0).tolist()

    assert kinds(views(1.0, False, False)) == [64, 0, 0, 0, 0, 0, 0, 0]
    kept, mirrored, *others = kinds(views(1.0, True, False))
    assert kept and mirrored and not any(others)
    assert all(kinds(views(1.0, True, True)))
    zoomed = views(0.7, True, True)
    assert zoomed.shape == clips.shape and zoomed.min() >= 0 and zoomed.max() <= 1


def test_recoloured_clips_keep_their_planes_or_show_their_negatives() -> None:
    clips = random_clips(16)
    seen = recolour(clips, torch.Generator().manual_seed(0), BatchShard(list(range(16)), 16))
    for clip, new in zip(clips, seen, strict=True):
        planes = [plane for base in (clip, 1 - clip) for plane in base]
        found = [next(i for i, plane in enumerate(planes) if torch.equal(plane, shown)) for shown in new]
        assert sorted(found) in ([0, 1, 2], [3, 4, 5])
    assert not torch.equal(seen, clips)


def test_what_is_drawn_for_a_clip_does_not_depend_on_who_draws() -> None:
    clips, both, last = random_clips(4), BatchShard([0, 1, 2, 3], 4), BatchShard([2, 3], 4)

    def views(shard: BatchShard) -> list[Tensor]:
        draws, own = torch.Generator().manual_seed(1), clips[shard.rows]
        turned = zoom_and_turn(own, 0.8, True, True, draws, shard)
        return [turned, recolour(own, draws, shard), draw_patches(8, 0.5, draws, shard)]

    for whole, part in zip(views(both), views(last), strict=True):
        assert torch.equal(whole[2:], part)


def test_whole_frames_are_turned_without_interpolation() -> None:
    """Bit for bit, and the same views as the general path gives."""
    clips, shard = random_clips(64), BatchShard(list(range(64)), 64)
    exact, general = (
        zoom_and_turn(clips, scale, True, True, torch.Generator().manual_seed(3), shard) for scale in (1.0, 1 - 1e-7)
    )
    torch.testing.assert_close(exact, general, atol=1e-3, rtol=0)
    assert set(exact.flatten().tolist()) == set(clips.flatten().tolist())
