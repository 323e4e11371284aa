import math

import pytest
import torch
import torchaudio

from transformers_cat import MRMFSpectrogram
from transformers_cat.mrmf import fft_length, filter_bank, filter_edges


@pytest.mark.parametrize("n_fft", [1024, 2048])
def test_filter_banks_are_torchaudios(n_fft):
    arguments = {"n_freqs": n_fft // 2 + 1, "f_min": 50.0, "f_max": 14_000.0, "sample_rate": 32_000}
    mel = torchaudio.functional.melscale_fbanks(**arguments, n_mels=64, mel_scale="htk")
    linear = torchaudio.functional.linear_fbanks(**arguments, n_filter=64)
    torch.testing.assert_close(
        torch.from_numpy(filter_bank("mel", n_fft, 32_000, 64, 50.0, 14_000.0)), mel, atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        torch.from_numpy(filter_bank("linear", n_fft, 32_000, 64, 50.0, 14_000.0)), linear, atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["mel", "linear"])
def test_edges_are_where_the_filters_begin_and_end(name):
    edges = filter_edges(name, 64, 50.0, 14_000.0)
    bank = filter_bank(name, 2**16, 32_000, 64, 50.0, 14_000.0)
    frequencies = torch.linspace(0, 16_000, 2**15 + 1)
    for index in range(64):
        used = frequencies[bank[:, index] > 0]
        assert used[0] == pytest.approx(edges[index], abs=0.5) and used[-1] == pytest.approx(edges[index + 2], abs=0.5)
        assert frequencies[bank[:, index].argmax()] == pytest.approx(edges[index + 1], abs=0.5)


def test_no_filter_is_empty():
    front_end = MRMFSpectrogram()
    for k in range(3):
        assert (getattr(front_end, f"bank_{k}").sum(1) > 0).all()


def reference(clip: torch.Tensor, bank: str, window: int, hop: int) -> torch.Tensor:
    """(T, 64) power on the 10 ms grid by torchaudio's spectrogram and torch's pooling and interpolation."""
    n_fft = fft_length(window)
    num_frames = math.ceil(len(clip) / 320)
    # Frame i of torchaudio is centred at n_fft / 2 + i * hop; ours at hop / 2 + i * hop, one earlier for long hops.
    early = hop if hop > 320 else 0
    padded = torch.nn.functional.pad(clip, (n_fft // 2 - hop // 2 + early, n_fft + 4 * hop))
    power = torchaudio.transforms.Spectrogram(n_fft, window, hop, power=2, center=False)(padded)
    arguments = (n_fft // 2 + 1, 50.0, 14_000.0, 64, 32_000)
    banks = {"mel": torchaudio.functional.melscale_fbanks, "linear": torchaudio.functional.linear_fbanks}
    power = (power.T @ banks[bank](*arguments)).T[None]  # (1, 64, frames)
    if hop < 320:
        power = torch.nn.functional.avg_pool1d(power, 320 // hop)
    if hop > 320:
        power = torch.nn.functional.interpolate(power, scale_factor=hop // 320, mode="linear")[..., hop // 320 :]
    return power[0].T[:num_frames]


def test_spectrograms_of_a_real_clip_are_torchaudios(real_clips):
    clip = torch.from_numpy(real_clips[0])[:100_001]
    features, mask = MRMFSpectrogram()(clip[None])
    assert features.shape == (1, 313, 384) and features.dtype == torch.float32 and mask is None
    features = features.view(313, 2, 3, 64)
    for g, bank in enumerate(("mel", "linear")):
        for k, (window, hop) in enumerate(((400, 160), (800, 320), (1600, 640))):
            expected = (reference(clip, bank, window, hop) + 1e-5).log()
            torch.testing.assert_close(features[:, g, k], expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("hop_lengths", [(160, 320, 640), (160, 960, 640)])
@pytest.mark.parametrize(("clips", "length"), [(1, 480_001), (3, 400_000), (30, 10_000)])
def test_slices_and_bands_change_nothing(clips, length, hop_lengths):
    torch.manual_seed(0)
    front_end = MRMFSpectrogram(window_lengths=(400, 1600, 1600), hop_lengths=hop_lengths)
    waveform = torch.randn(clips, length)
    features, _ = front_end(waveform)
    assert features.shape == (clips, math.ceil(length / 320), 384)
    torch.testing.assert_close(features, front_end.log_power(waveform, features.shape[1]), atol=1e-5, rtol=1e-5)
    power = torch.rand(2, 10, front_end.bank_1.shape[1])
    expected = torch.nn.functional.linear(power, front_end.bank_1)
    torch.testing.assert_close(front_end.filtered(power, 1), expected)


@pytest.mark.parametrize("frame", [0, 1, 50, 98, 99])
def test_a_click_is_at_the_same_frame_in_all_resolutions(frame):
    clip = torch.zeros(1, 32_000)
    clip[0, frame * 320 + 160] = 1.0
    energy = MRMFSpectrogram()(clip)[0].exp().view(100, 2, 3, 64).sum(-1)
    assert (energy.argmax(0) == frame).all()


def test_a_tone_is_in_the_same_bin_in_all_resolutions():
    time = torch.arange(32_000) / 32_000
    tone = (2 * math.pi * 3_000 * time).sin()[None]
    features = MRMFSpectrogram()(tone)[0].view(100, 2, 3, 64)[50]
    peaks = features.argmax(-1)
    assert (peaks == peaks[:, :1]).all()
    edges = torch.linspace(50, 14_000, 66)
    assert abs(edges[peaks[1, 0] + 1] - 3_000) < 215  # the width of a linear filter


def test_energy_does_not_depend_on_the_alignment():
    torch.manual_seed(0)
    noise = torch.randn(1, 64_000) * 0.1
    power = MRMFSpectrogram()(noise)[0].exp().view(200, 2, 3, 64).mean((0, 3))
    # White noise: power scales with the energy of the window, 3/8 of its length.
    torch.testing.assert_close(power[:, 1] / power[:, 0], torch.full((2,), 2.0), rtol=0.03, atol=0)
    coarse = power[:, 2] / power[:, 1]
    torch.testing.assert_close(coarse[0] / coarse[1], torch.tensor(1.0), rtol=0.05, atol=0)


def test_equal_hops_need_no_alignment():
    front_end = MRMFSpectrogram(hop_lengths=(320, 320, 320))
    torch.manual_seed(0)
    clip = torch.randn(1, 16_000)
    single = MRMFSpectrogram(window_lengths=(800,), hop_lengths=(320,))
    expected = single(clip)[0].view(50, 2, 64)
    torch.testing.assert_close(front_end(clip)[0].view(50, 2, 3, 64)[:, :, 1], expected)


@pytest.mark.parametrize("length", [1, 159, 320, 321, 1_600, 6_401])
def test_frames_do_not_depend_on_padding(length):
    torch.manual_seed(0)
    front_end = MRMFSpectrogram()
    clip = torch.randn(1, length)
    alone, _ = front_end(clip)
    assert alone.shape[1] == math.ceil(length / 320)
    padded = torch.nn.functional.pad(clip, (0, 5_000), value=9.0)
    mask = torch.arange(length + 5_000)[None] < length
    batched, frame_mask = front_end(padded, mask)
    assert frame_mask.sum() == alone.shape[1]
    torch.testing.assert_close(batched[:, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)


def test_no_cast_rounds_the_front_end():
    torch.manual_seed(0)
    clip = torch.randn(1, 16_000)
    expected, _ = MRMFSpectrogram()(clip)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(MRMFSpectrogram().to(dtype)(clip)[0], expected, atol=0, rtol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(MRMFSpectrogram()(clip)[0], expected, atol=0, rtol=0)
    loud = MRMFSpectrogram().half()(torch.ones(1, 16_000, dtype=torch.float16))[0]
    assert torch.isfinite(loud).all()


def test_arguments_that_contradict_are_refused():
    with pytest.raises(ValueError, match="16001"):
        MRMFSpectrogram(f_max=16_001.0)
    with pytest.raises(ValueError, match="one must divide the other"):
        MRMFSpectrogram(hop_lengths=(160, 320, 500))


def test_constants_are_not_saved():
    assert MRMFSpectrogram().state_dict() == {}


def test_normalized_volume_is_the_same_for_every_volume(real_clips):
    clip = torch.from_numpy(real_clips[0])[None, :100_001]
    front_end = MRMFSpectrogram(normalize_volume=True)
    expected, _ = front_end(clip)
    for gain in (1e-3, 0.1, 30.0):
        torch.testing.assert_close(front_end(gain * clip)[0], expected, atol=1e-3, rtol=1e-4)
    scaled = clip * 0.1 / clip.square().mean().sqrt()
    torch.testing.assert_close(MRMFSpectrogram()(scaled)[0], expected, atol=1e-3, rtol=1e-4)


def test_normalized_volume_is_that_of_a_clips_own_samples():
    front_end = MRMFSpectrogram(normalize_volume=True)
    clips = [torch.randn(length) * volume for length, volume in ((50_000, 0.3), (20_001, 0.001), (320, 0.05))]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=7.0)
    mask = torch.arange(50_000) < torch.tensor([[len(clip)] for clip in clips])
    features, frames = front_end(padded, mask)
    for clip, own, valid in zip(clips, features, frames):
        torch.testing.assert_close(own[valid], front_end(clip[None])[0][0], atol=1e-4, rtol=1e-4)


def test_silence_is_not_made_louder():
    front_end = MRMFSpectrogram(normalize_volume=True)
    silence, _ = front_end(torch.zeros(1, 3_200))
    assert (silence == torch.tensor(1e-5).log()).all()
    masked, _ = front_end(torch.zeros(1, 3_200), torch.zeros(1, 3_200))
    assert masked.isfinite().all()
    # A tenth of a step of 16 bits is no recording, but what resampling leaves of silence.
    faint = 3e-6 * torch.randn(1, 3_200)
    torch.testing.assert_close(front_end(faint)[0], MRMFSpectrogram()(1e4 * faint)[0], atol=1e-3, rtol=1e-4)


def test_normalize_volume_is_yes_or_no():
    with pytest.raises(ValueError, match="`normalize_volume` must be True or False, not 0.1"):
        MRMFSpectrogram(normalize_volume=0.1)
