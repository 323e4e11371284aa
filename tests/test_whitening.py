"""Whitening: what its filter takes from a clip, and what it leaves."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import lowpass_biquad, treble_biquad

from transformers_cat import MRMFSpectrogram
from transformers_cat.whitening import NUM_BANDS, whitened

RATE = 32_000


def front_end(share: float, **arguments) -> MRMFSpectrogram:
    return MRMFSpectrogram(whitening=share, **arguments)


def coloured(num_samples: int, seed: int = 0) -> torch.Tensor:
    """(1, N) noise that falls by 12 dB an octave above 2 kHz."""
    noise = torch.randn(1, num_samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * lowpass_biquad(noise, RATE, 2_000)


def levels(waveform: torch.Tensor) -> torch.Tensor:
    """(40,) dB: the bands that whitening takes for the spectrum of a clip (1, N), relative to their mean."""
    spectrum = torch.fft.rfft(waveform[0]).abs().square()
    bands = torch.from_numpy(front_end(1.0).constants()["whitening_bands"])  # (D, 40)
    power = torch.nn.functional.adaptive_avg_pool1d(spectrum[None], len(bands))[0] @ bands
    decibels = 10 * power.log10()
    return decibels - decibels.mean()


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_spectrum_is_gone(share):
    clip = coloured(5 * RATE)
    before, after = levels(clip), levels(front_end(share).whitened(clip))
    assert 40 < before.max() - before.min() < 60
    torch.testing.assert_close(after, (1 - share) * before, atol=1.5, rtol=0)


def test_a_share_of_nothing_leaves_a_clip_as_it_is(real_clips):
    clip = torch.from_numpy(real_clips[0])[None, :50_001]
    assert torch.equal(front_end(0).whitened(clip), clip)
    torch.testing.assert_close(front_end(1e-9).whitened(clip), clip, atol=1e-6, rtol=1e-5)


def test_a_clip_keeps_its_power(real_clips):
    for clip in real_clips:
        clip = torch.from_numpy(clip)[None]
        for share in (0.5, 1.0):
            ratio = front_end(share).whitened(clip).square().mean() / clip.square().mean()
            assert ratio == pytest.approx(1, abs=0.1)


def test_a_microphone_makes_less_of_a_difference(real_clips):
    """The same recording, dull and not: the share of the distance of their spectrograms goes."""
    clip = torch.from_numpy(real_clips[0])
    clip = clip[clip != 0][None]
    dull = treble_biquad(clip, RATE, gain=-12, central_freq=3_000)

    def distance(share: float) -> float:
        spectrograms = [front_end(share, log_offset=1e-12)(each)[0] for each in (clip, dull)]
        return float((spectrograms[0] - spectrograms[1]).abs().mean())

    plain = distance(0.0)
    assert plain > 1
    assert distance(0.5) == pytest.approx(0.5 * plain, rel=0.1)
    assert distance(1.0) < 0.15 * plain


def test_nothing_is_moved():
    clip = 1e-3 * coloured(RATE)
    clip[0, 20_000] = 1.0
    assert front_end(0.5).whitened(clip).abs().argmax() == 20_000


def test_weak_bands_are_not_raised_without_end():
    """What lies 100 dB below a tone is raised as what lies 60 dB below it, by half of that, 31.6 times."""
    tone = torch.sin(torch.arange(RATE) * 2 * torch.pi * 1000 / RATE)[None]
    tone = tone + 1e-5 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    middles = [each[0, 8_000:24_000] * torch.hann_window(16_000) for each in (tone, front_end(0.5).whitened(tone))]
    before, after = (torch.fft.rfft(middle).abs()[4_000:6_000] for middle in middles)  # 8 to 12 kHz
    assert 25 < (after / before).median() < 32


def test_digital_silence_stays_silent():
    clip = coloured(RATE)
    clip[:, 6_400:12_800] = 0
    clip[:, 20_000] = 0  # a quiet recording's sample
    whitened = front_end(0.5).whitened(clip)
    assert not whitened[:, 6_400:12_800].any() and whitened[0, 20_000] != 0
    assert not front_end(0.5).whitened(torch.zeros(2, 3_201)).any()
    loud_and_silent = torch.cat([clip, torch.zeros_like(clip)])
    torch.testing.assert_close(front_end(0.5).whitened(loud_and_silent)[:1], whitened)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_silence_has_a_gradient(share):
    """As a baseline of integrated gradients has to have."""
    clips = torch.cat([torch.zeros(1, 9_000), coloured(9_000)]).requires_grad_()
    features, _ = front_end(share, normalize_volume=True)(clips)
    features.sum().backward()
    assert clips.grad.isfinite().all() and clips.grad[1].any()


def test_clips_of_a_batch_are_whitened_apart():
    """Also where they are computed at once, as on a GPU."""
    constants = [getattr(front_end(0.5), f"whitening_{name}") for name in ("window", "bands", "curve")]
    loud, faint = coloured(RATE), 1e-3 * coloured(RATE, seed=1)
    together = whitened(torch.cat([loud, faint]), 0.5, *constants)
    for clip, own in zip((loud, faint), together):
        torch.testing.assert_close(own[None], whitened(clip, 0.5, *constants), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("rate", "length"), [(32_000, 8_192), (16_000, 4_096), (1_000, 1_024)])
def test_the_filter_is_a_quarter_of_a_second_long(rate, length):
    """Checkpoints were trained on what it makes of a clip."""
    transform = front_end(0.5, sampling_rate=rate, f_max=rate / 2, window_lengths=(400,), hop_lengths=(320,))
    assert len(transform.whitening_window) == length


def test_a_clip_is_whitened_by_its_own_samples_alone():
    """Whatever it is padded with, and whatever the other clips of its batch are."""
    transform = front_end(0.5, normalize_volume=True)
    clips = [coloured(length, seed)[0] for seed, length in enumerate((50_000, 20_001, 333))]
    padded = pad_sequence(clips, batch_first=True, padding_value=7.0)
    mask = torch.arange(50_000) < torch.tensor([[len(clip)] for clip in clips])
    features, frames = transform(padded, mask)
    for clip, own, valid in zip(clips, features, frames):
        torch.testing.assert_close(own[valid], transform(clip[None])[0][0], atol=1e-4, rtol=1e-4)


def test_what_is_whitened_is_not_whitened_again():
    clip, transform = coloured(40_000), front_end(0.5)
    expected, _ = transform(clip)
    assert torch.equal(transform(transform.whitened(clip), whiten=False)[0], expected)
    assert torch.equal(MRMFSpectrogram()(transform.whitened(clip))[0], expected)
    assert not torch.allclose(transform(transform.whitened(clip))[0], expected, atol=0.1)


def test_long_and_short_clips_and_other_rates():
    for rate in (100, 8_000, 96_000):
        arguments = {"sampling_rate": rate, "f_min": 0.0, "f_max": rate / 2, "window_lengths": (rate // 4,)}
        transform = front_end(0.5, hop_lengths=(rate // 10,), frame_shift=rate // 10, **arguments)
        bands = transform.constants()["whitening_bands"]
        assert bands.shape[1] == NUM_BANDS and (bands.sum(0) == pytest.approx(1, abs=1e-4))
        for length in (1, rate // 7, 3 * rate):
            assert transform(torch.randn(1, length))[0].isfinite().all()


def test_gradients_pass():
    clip = coloured(5_000).requires_grad_()
    front_end(0.5)(clip)[0].sum().backward()
    assert clip.grad.isfinite().all() and clip.grad.any()


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "0.5", float("nan")])
def test_it_is_a_share(share):
    with pytest.raises(ValueError, match="`whitening` must be a share, from 0 to 1, not"):
        front_end(share)
