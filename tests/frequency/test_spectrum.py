"""Spectral measures against loops over single samples of the spectrum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.frequency.spectrum import corner_radius, energy_ratio, intensity, radial_amplitude
from tests.references import high_energy_share, high_intensity, radial_profile

SIZES = [(8, 8), (6, 10), (7, 9), (1, 5), (12, 7)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_radial_amplitude_matches_the_loop(size: tuple[int, int], log: bool) -> None:
    u = noise(2, 3, *size)
    profile = radial_amplitude(u, log)
    for i in range(2):
        for j in range(3):
            expected = radial_profile(u[i, j].numpy(), log)
            np.testing.assert_allclose(profile[i, j].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_intensity_matches_the_loop(size: tuple[int, int], log: bool) -> None:
    u = noise(*size) + 10
    for first_bin in (0, 2, 5):
        expected = high_intensity(u.numpy(), first_bin, log)
        assert float(intensity(u, log=log, first_bin=first_bin)) == pytest.approx(expected)
    edge = math.floor(0.2 * corner_radius(*size))
    expected = high_intensity(u.numpy(), edge, log)
    assert float(intensity(u, log=log)) == pytest.approx(expected)


@pytest.mark.parametrize("split", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
def test_energy_ratio_matches_the_loop(size: tuple[int, int], split: float) -> None:
    u = noise(2, 3, *size)
    ratio = energy_ratio(u, split)
    assert ratio.shape == (2,)
    for i in range(2):
        assert float(ratio[i]) == pytest.approx(high_energy_share(u[i].numpy(), split))


def test_a_fifth_of_the_corner_radius_is_the_bin_of_the_published_analysis() -> None:
    assert math.floor(0.2 * corner_radius(512, 512)) == 72
    assert math.floor(0.2 * corner_radius(64, 64)) == 9
    assert math.floor(0.2 * corner_radius(96, 128)) == 16


def test_a_fixed_bin_beyond_the_corner_is_not_a_number() -> None:
    # bin 80: a 64 x 64 latent has 0 .. 45; a 96 x 128 latent has one sample there, the corner
    assert intensity(noise(64, 64), first_bin=80).isnan()
    u = noise(96, 128)
    corner = float(torch.fft.fft2(u).abs()[48, 64])
    largest = float(radial_amplitude(u).max())
    assert float(intensity(u, first_bin=80)) == pytest.approx(corner / largest)


def test_white_noise_is_rated_differently_by_linear_and_log_amplitude() -> None:
    # one threshold cannot serve both: 0.63-0.75 and 0.86-0.88 for the middle half of the draws
    linear = sorted(float(intensity(noise(64, 64, seed=seed))) for seed in range(41))
    log = sorted(float(intensity(noise(64, 64, seed=seed), log=True)) for seed in range(41))
    assert linear[20] == pytest.approx(0.69, abs=0.06)
    assert log[20] == pytest.approx(0.87, abs=0.015)


def test_energy_of_white_noise_is_the_area_beyond_the_split() -> None:
    # the disc rho < 0.2 has area pi 0.08 of 4
    ratio = energy_ratio(noise(50, 4, 64, 64)).mean()
    assert float(ratio) == pytest.approx(1 - math.pi * 0.08 / 4, abs=0.003)


def test_a_stripe_counts_the_same_along_either_axis_of_an_oblong() -> None:
    u = torch.zeros(1, 16, 48, dtype=torch.float64)
    period = 8
    along_x = torch.cos(2 * math.pi * torch.arange(48) / period).expand(1, 16, 48)
    along_y = torch.cos(2 * math.pi * torch.arange(16) / period)[:, None].expand(1, 16, 48)
    for split in (0.1, 0.17, 0.18, 0.3):
        assert float(energy_ratio(u + along_x, split)) == pytest.approx(
            float(energy_ratio(u + along_y, split))
        )
    assert float(energy_ratio(u + along_x, 0.17)) == pytest.approx(1)
    assert float(energy_ratio(u + along_x, 0.18)) == pytest.approx(0)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_energy_ratio_is_a_share_of_what_varies(seed: int, scale: float, mean: float) -> None:
    u = noise(2, 8, 8, seed=seed)
    ratio = float(energy_ratio(u))
    assert 0 <= ratio <= 1
    assert float(energy_ratio(scale * u + mean)) == pytest.approx(ratio, rel=1e-6)
    assert float(energy_ratio(u, 0.5)) <= ratio


def test_maps_without_variation_have_no_high_frequencies() -> None:
    assert float(energy_ratio(torch.zeros(4, 8, 8))) == 0
    assert float(energy_ratio(torch.full((4, 9, 7), 0.1))) == 0
    assert float(intensity(torch.zeros(8, 8))) == 0


def test_half_precision_is_measured_in_single() -> None:
    u = noise(4, 16, 16).half()
    assert energy_ratio(u).dtype == torch.float32
    assert torch.equal(energy_ratio(u), energy_ratio(u.float()))


def test_measures_take_any_leading_dimensions() -> None:
    u = noise(2, 3, 4, 8, 8)
    assert energy_ratio(u).shape == (2, 3)
    assert intensity(u).shape == (2, 3, 4)
    assert torch.equal(energy_ratio(u)[1, 2], energy_ratio(u[1, 2]))
