"""What in a recording a model's answer rests on: which times and which frequencies are necessary, which sufficient.

The paper asks of a feature to be a necessary and sufficient cause of the label (Sec. III-B, eq. 4), which `output_pns`
measures for the features of Z. Here the same two questions are put to parts of the spectrograms, by interventions on
them: what does the model say without a part, and what of that part alone?

A part is taken away by setting it to the mean that `feature_norm` has learnt, in all filters and resolutions, as the
bands of SpecAugment are in training: so the model has met spectrograms with such gaps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .configuration_cat import class_names, implied_problem_type, validate_integers, validate_numbers
from .feature_extraction_cat import CATFeatureExtractor
from .modeling_cat import CATForAudioClassification
from .mrmf import filter_edges

SPAN = 0.5  # seconds
MAX_SPANS = 20  # of a clip whose spans are not given: each costs two forward passes


@dataclass(frozen=True)
class Part:
    """Part of a recording, from `start` to `end`: in seconds, with all frequencies, or in Hz, of all its length.

    `without` is the label's probability when this part is taken away: far below that of the whole recording, it is
    necessary. `alone` is that when all else is taken away: as high as that of the whole, it is sufficient. Of several
    barks, none is necessary and each may be sufficient.
    """

    start: float
    end: float
    without: float
    alone: float


@dataclass(frozen=True)
class Explanation:
    """A label and its probability, and what of it is due to each time span and to each band of frequencies."""

    label: str
    score: float
    times: list[Part]
    frequencies: list[Part]


@torch.no_grad()
def explain(
    model: CATForAudioClassification,
    feature_extractor: CATFeatureExtractor,
    waveform: np.ndarray | torch.Tensor | Sequence[float],
    label: str | None = None,
    span: float | None = None,
    bands: int = 6,
) -> Explanation:
    """Measures which times and which frequencies of a recording are necessary and which sufficient for a label.

    Two forward passes for each part. The model is in evaluation mode meanwhile, so that threads can share only one that
    is so before.

    Args:
        model: Of one label for each recording, or of several.
        feature_extractor: The model's.
        waveform: (N,), at the feature extractor's sampling rate.
        label: One of the model's; by default the one with the highest probability.
        span: Length of the time spans in seconds, rounded so that all have the same; by default 0.5, or a twentieth of
            what lasts longer than 10.
        bands: Number of frequency bands between the filters' lowest and highest, as wide as each other in mel.

    Raises:
        ValueError: The model has no such label, is one of regression, or gives no number; `span` is shorter than a
            frame; `bands` is not from 1 to the number of filters in a bank; or `waveform` is none, or more than one.
    """
    config = model.config
    names = class_names(config)
    if implied_problem_type(config) == "regression":
        raise ValueError("The model is one of regression, which has no label to explain.")
    if label is not None and label not in names:
        raise ValueError(f"The model has no label {label!r}. Its labels are: {', '.join(map(str, names))}.")
    validate_integers(1, config.num_bins, bands=bands)
    rate = feature_extractor.sampling_rate
    batch = feature_extractor(waveform, sampling_rate=rate, return_tensors="pt", return_attention_mask=False)
    training = {module: module.training for module in model.modules()}  # some of it may be frozen
    model.eval()
    try:
        features, _ = model.cat.features(batch["input_values"].to(model.device), None)
        if len(features) > 1:
            raise ValueError(f"One recording at a time can be explained; got {len(features)}.")
        # (T, G, K, F)
        features = features[0].unflatten(1, (config.num_filters, config.num_resolutions, config.num_bins))
        absent = model.cat.feature_norm.running_mean.to(features).view(features.shape[1:]).expand_as(features)

        def probabilities(*clips: torch.Tensor) -> torch.Tensor:
            logits = model(torch.stack(clips).flatten(2)).logits.float()
            return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)

        whole = probabilities(features)[0]
        if not whole.isfinite().all():
            raise ValueError("The model gives no number for it: are its weights damaged?")
        answer = int(whole.argmax()) if label is None else names.index(label)

        def parts(places: Iterator[tuple[float, float, torch.Tensor]]) -> list[Part]:
            """Of (start, end, where in `features` it is)."""
            measured = []
            for start, end, where in places:
                where = where.to(features.device)
                changed = torch.where(where, absent, features), torch.where(where, features, absent)
                without, alone = probabilities(*changed)[:, answer].tolist()
                measured.append(Part(start, end, without, alone))
            return measured

        return Explanation(
            label=names[answer],
            score=float(whole[answer]),
            times=parts(time_spans(len(features), span, rate / config.frame_shift)),
            frequencies=parts(frequency_bands(config, bands)),
        )
    finally:
        for module, was in training.items():
            module.training = was


def time_spans(num_frames: int, span: float | None, frame_rate: float) -> Iterator[tuple[float, float, torch.Tensor]]:
    """Start and end in seconds of each span of T frames, and its frames, (T, 1, 1, 1) bool; together they are all."""
    length = num_frames / frame_rate
    if span is None:
        span = max(SPAN, length / MAX_SPANS)
    validate_numbers(1 / frame_rate, 1e6, span=span)
    count = max(1, round(length / span))
    edges = [round(index * num_frames / count) for index in range(count + 1)]
    frame = torch.arange(num_frames).view(-1, 1, 1, 1)
    for start, end in zip(edges, edges[1:]):
        yield start / frame_rate, end / frame_rate, (frame >= start) & (frame < end)


def frequency_bands(config, count: int) -> Iterator[tuple[float, float, torch.Tensor]]:
    """Start and end in Hz of each band, and the filters with their centres in it, (1, G, 1, F) bool; all together."""
    edges = filter_edges("mel", count - 1, config.f_min, config.f_max)
    banks = [filter_edges(name, config.num_bins, config.f_min, config.f_max)[1:-1] for name in config.filters]
    centres = torch.from_numpy(np.stack(banks))[None, :, None]
    for start, end in zip(edges, edges[1:]):
        yield float(start), float(end), (centres >= start) & (centres < end)
