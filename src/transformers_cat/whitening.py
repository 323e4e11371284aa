"""Whitening: a share of a recording's own average spectrum, in decibels, is taken away.

Microphones and rooms differ. The average is over all of a clip and over bands so wide that colour goes and pitch stays.
Not in the paper.
"""

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import hertz_to_mel, mel_filter_bank

NUM_BANDS = 40  # triangles, evenly spaced in mel from 0 to half of the sampling rate
FLOOR = 1e-6  # power relative to the strongest band, 60 dB below it, from where on weaker bands are not raised further
STEP = 64  # samples, of which all are zero where they are called silence


def whitening_constants(n_fft: int, sampling_rate: int) -> dict[str, np.ndarray]:
    """Float32, by name, for D = n_fft // 2 + 1 frequencies: `window` (n_fft,), `bands` (D, 40), `curve` (40, D)."""
    num_frequencies, nyquist = n_fft // 2 + 1, sampling_rate / 2
    bands = mel_filter_bank(num_frequencies, NUM_BANDS, 0.0, nyquist, sampling_rate, mel_scale="htk")
    centres = np.linspace(0, hertz_to_mel(nyquist), NUM_BANDS + 2)[1:-1]
    frequencies = hertz_to_mel(np.linspace(0, nyquist, num_frequencies))
    constants = {
        "window": np.hanning(n_fft + 1)[:-1],  # periodic
        "bands": bands / bands.sum(0),  # means
        "curve": np.stack([np.interp(frequencies, centres, band) for band in np.eye(NUM_BANDS)]),
    }
    return {name: constant.astype(np.float32) for name, constant in constants.items()}


def whitened(
    waveform: torch.Tensor, share: float, window: torch.Tensor, bands: torch.Tensor, curve: torch.Tensor
) -> torch.Tensor:
    """Clips (B, N), zero on padding, each by the filter that takes `share` of its average spectrum away.

    A share of 0 leaves a clip as it is; after 1 all bands are as loud. The filter has no delay, a clip keeps its power,
    and steps of digital silence stay silent. `window`, `bands` and `curve` are those of `whitening_constants`.
    """
    hop = len(window) // 2
    # Two windows over each sample, which add up to one. Frames of nothing but padding add nothing.
    padded = nn.functional.pad(waveform, (hop, 2 * hop))
    spectrum = torch.fft.rfft(padded.unfold(-1, 2 * hop, hop) * window)  # (B, L, D)
    power = torch.view_as_real(spectrum).square().sum((1, -1))
    gain = power_gain(power, bands, curve, share)
    gain = gain.clamp(min=1e-30)  # what silence has, 0, would have no gradient
    frames = torch.fft.irfft(spectrum * gain.sqrt()[:, None])
    first, second = frames.chunk(2, dim=-1)
    filtered = (first[:, 1:] + second[:, :-1]).flatten(1)
    # Not sample by sample: a quiet recording is zero now and then.
    missing = filtered.shape[1] - waveform.shape[1]
    sound = nn.functional.pad(waveform, (0, missing)).unflatten(1, (-1, STEP)).any(-1, keepdim=True)
    filtered = torch.where(sound, filtered.unflatten(1, (-1, STEP)), 0.0).flatten(1)
    # Padding by a negative number: a slice would have to know which of two symbolic lengths is smaller.
    return nn.functional.pad(filtered, (0, -missing))


def power_gain(power: torch.Tensor, bands: torch.Tensor, curve: torch.Tensor, share: float) -> torch.Tensor:
    """A clip's power by frequency (B, D) -> what the filter does to it, (B, D)."""
    level = power @ bands
    level = (level / level.amax(-1, keepdim=True).clamp(min=1e-30) + FLOOR).log()
    gain = (-share * (level @ curve)).exp()
    return gain * (power.sum(-1, keepdim=True) / (gain * power).sum(-1, keepdim=True).clamp(min=1e-30))
