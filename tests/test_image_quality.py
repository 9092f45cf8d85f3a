"""PSNR, SSIM and motion against answers worked out by hand and against a slow loop."""

import math

import numpy as np
import pytest
import torch

from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import motion, psnr, ssim


def flat_clip(*grey: float) -> torch.Tensor:
    """One clip of 2 frames of 12x12 per grey value."""
    return torch.tensor(grey).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 12, 12)


def random_clip(seed: int, num_clips: int = 1) -> torch.Tensor:
    return torch.rand(num_clips, 3, 2, 13, 14, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_constant_errors() -> None:
    decibel_B = psnr(flat_clip(0.5, 0.5, 0.0, 0.5), flat_clip(0.6, 0.51, 1.0, 0.5))
    torch.testing.assert_close(decibel_B[:3], torch.tensor([20.0, 40.0, 0.0]), rtol=0, atol=1e-4)
    assert decibel_B[3] == math.inf


def test_psnr_takes_one_error_over_the_whole_clip() -> None:
    x = torch.zeros(1, 3, 2, 12, 12)
    y = x.clone()
    y[:, :, 0] = 0.2  # squared errors 0.04 and 0: their mean is 0.02, where a mean over frames would be infinite
    assert psnr(x, y).item() == pytest.approx(-10 * math.log10(0.02), abs=1e-4)


def test_ssim_of_constant_clips_is_the_luminance_term() -> None:
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    similar_B = ssim(flat_clip(0.2, 0.0, 0.7), flat_clip(0.6, 1.0, 0.7))
    torch.testing.assert_close(similar_B, torch.tensor([expected, 1e-4 / 1.0001, 1.0]), rtol=0, atol=1e-6)


def test_ssim_of_a_clip_with_itself_and_with_its_negative() -> None:
    x = random_clip(0, num_clips=2)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, 1 - x) < 0).all()


def test_ssim_equals_a_loop_over_windows() -> None:
    x, y = random_clip(1), random_clip(2)
    y = 0.7 * x + 0.3 * y
    assert ssim(x, y).item() == pytest.approx(ssim_by_loop(x[0].numpy(), y[0].numpy()), abs=1e-6)


def ssim_by_loop(x_CTHW: np.ndarray, y_CTHW: np.ndarray) -> float:
    """The definition, window by window, on central moments."""
    bell = np.array([math.exp(-(offset**2) / 4.5) for offset in range(-5, 6)])
    weight = np.outer(bell, bell) / np.outer(bell, bell).sum()
    _, _, height, width = x_CTHW.shape
    values = []
    for x_HW, y_HW in zip(x_CTHW.reshape(-1, height, width), y_CTHW.reshape(-1, height, width), strict=True):
        for top in range(height - 10):
            for left in range(width - 10):
                x, y = (image[top : top + 11, left : left + 11].astype(np.float64) for image in (x_HW, y_HW))
                mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
                var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
                covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
                numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
                values.append(numerator / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
    return float(np.mean(values))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_clips_of_a_batch_do_not_touch(measure) -> None:
    x, y = random_clip(3, num_clips=3), random_clip(4, num_clips=3)
    alone = torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(measure(x, y), alone)
    assert measure(x, y).shape == (3,)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_shapes_must_agree(measure) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        measure(torch.zeros(2, 3, 2, 12, 12), torch.zeros(1, 3, 2, 12, 12))


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(UserError, match="at least 11 pixels a side, got 8x16"):
        ssim(torch.zeros(1, 3, 1, 8, 16), torch.zeros(1, 3, 1, 8, 16))


def test_motion_in_grey_levels() -> None:
    frames = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    frames[1] = 255  # up by 255, down by 255: unsigned arithmetic would wrap
    assert motion(frames) == 255.0
    frames[2] = 245
    assert motion(frames) == (255 + 10) / 2
    assert motion(frames[:1]) == 0.0
    with pytest.raises(ValueError, match="uint8"):
        motion(frames.astype(np.float32))
