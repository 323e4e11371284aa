#!/usr/bin/env python
r"""Whether `transformers_cat.explain` finds where a sound is, among others that the model was not trained on.

    python examples/pointing.py --model model_cards/cat-nano-esc10 --data ../shared/data/urbansound8k --sound dog_bark \
        --label dog --background air_conditioner children_playing drilling engine_idling street_music \
        --leave_out_recordings_of ../shared/data/esc10 --output_dir runs/pointing

Of each recording of `--sound`, the loudest half second of its first clip is added to a background of 5 s, in one of
its ten half seconds, `--decibels` louder than it. The span whose absence costs the label most (`without`), the one
that alone gives it most (`alone`), and the highest score over time (`frame_logits`), are right where it was added; by
chance that is one in ten. Draws, by `--seed`, are the same for each loudness. The result is `results.json`, shares of
the mixtures, and `table.md`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from elsewhere import clips_of
from robustness import loudest
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from transformers_cat import explain
from transformers_cat.configuration_cat import class_names
from transformers_cat.training import decode_audio, load_audio_dataset
from transformers_cat.training.clips import clip_names
from transformers_cat.training.data import freesound_number, without_recordings_of
from transformers_cat.training.protocol import markdown_table, per_cent
from transformers_cat.training.report import write_results

SPAN, SPANS = 0.5, 10  # seconds of a span, and spans of a mixture
POINTERS = ("without", "alone", "frame logits")


def first_of_each_recording(clips: Dataset) -> Dataset:
    """One clip of each recording on Freesound, or all where names do not tell."""
    firsts = {}
    for i, name in enumerate(clip_names(clips)):
        firsts.setdefault(freesound_number(name) or name, i)
    return clips.select(sorted(firsts.values()))


def mixed(sound: torch.Tensor, background: torch.Tensor, start: int, decibels: float) -> torch.Tensor:
    """(n,) is added to (N,), repeated to `SPANS` times n, from `start` on, so many decibels louder than it is."""
    mixture = background.repeat(-(-SPANS * len(sound) // len(background)))[: SPANS * len(sound)]
    power = mixture.square().mean() / sound.square().mean().clamp(min=1e-12)
    mixture[start : start + len(sound)] += sound * power.sqrt() * 10 ** (decibels / 20)
    return mixture


def pointed(model, extractor, mixture: torch.Tensor, label: str) -> dict[str, int]:
    """The span that each pointer names."""
    times = explain(model, extractor, mixture, label=label, span=SPAN).times
    inputs = extractor(mixture, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs, output_frame_logits=True).frame_logits[0].softmax(-1)
    best = int(scores[:, class_names(model.config).index(label)].argmax())
    step = model.config.patch_size[0] * 2 ** (len(model.config.depths) - 1) * model.config.frame_shift  # in samples
    return {
        "without": int(np.argmin([part.without for part in times])),
        "alone": int(np.argmax([part.alone for part in times])),
        "frame logits": int((best + 0.5) * step / extractor.sampling_rate / SPAN),
    }


def measure(model, extractor, sounds: Dataset, backgrounds: Dataset, label: str, decibels: float, seed: int) -> dict:
    """How many mixtures there are, and for which share of them each pointer is right."""
    drawn = np.random.default_rng(seed)
    right = {pointer: [] for pointer in POINTERS}
    samples = round(SPAN * extractor.sampling_rate)
    for example in sounds:
        background = backgrounds[int(drawn.integers(len(backgrounds)))]["audio"]
        place = int(drawn.integers(SPANS))
        sound = loudest(torch.as_tensor(example["audio"]), extractor.sampling_rate, SPAN)
        if len(sound) < samples:
            continue
        mixture = mixed(sound, torch.as_tensor(background), place * samples, decibels)
        for pointer, span in pointed(model, extractor, mixture, label).items():
            right[pointer].append(span == place)
    if not right["alone"]:
        raise ValueError(f"None of the {len(sounds)} sounds lasts {SPAN} s")
    return {"mixtures": len(right["alone"]), **{pointer: float(np.mean(own)) for pointer, own in right.items()}}


def table(results: dict[str, dict]) -> str:
    """decibels -> shares, as a table."""
    rows = [
        [f"{float(decibels):+g} dB", own["mixtures"], *(per_cent(own[pointer], None) for pointer in POINTERS)]
        for decibels, own in results.items()
    ]
    return markdown_table(["louder than the background by", "mixtures", *POINTERS], rows)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run the script.

    Returns:
        The content of `results.json`: decibels -> shares.

    Raises:
        ValueError: the model has no such label, the data have no such class, or no sound is long enough.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of a CAT")
    parser.add_argument("--data", required=True, help="folder or CSV file of clips that it was not trained on")
    parser.add_argument("--sound", required=True, help="the class of the data whose sounds are added")
    parser.add_argument("--label", required=True, help="what the model calls it")
    parser.add_argument("--background", nargs="+", required=True, help="classes of the data that they are added to")
    parser.add_argument(
        "--leave_out_recordings_of", help="data that the model was trained on, of Freesound as these are"
    )
    parser.add_argument("--decibels", type=float, nargs="+", default=[10.0, 0.0], help="default: 10 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    model = AutoModelForAudioClassification.from_pretrained(args.model).eval()
    extractor = AutoFeatureExtractor.from_pretrained(args.model)
    if args.label not in class_names(model.config):
        raise ValueError(f"{args.model} has no label {args.label!r}, only {class_names(model.config)}")
    sounds = first_of_each_recording(clips_of(args.data, args.sound))
    backgrounds = concatenate_datasets([clips_of(args.data, name) for name in args.background])
    if args.leave_out_recordings_of:
        known = load_audio_dataset(args.leave_out_recordings_of)
        sounds, backgrounds = (without_recordings_of(clips, known) for clips in (sounds, backgrounds))
    sounds, backgrounds = (decode_audio(clips, extractor.sampling_rate) for clips in (sounds, backgrounds))
    results = {
        str(decibels): measure(model, extractor, sounds, backgrounds, args.label, decibels, args.seed)
        for decibels in args.decibels
    }
    write_results(args.output_dir, results, table(results))
    return results


if __name__ == "__main__":
    main()
