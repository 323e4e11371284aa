#!/usr/bin/env python
"""Does the causal module help? Small models with and without its parts, on three questions.

    python examples/causal_experiment.py --data ../shared/data --output_dir runs/causal

spurious   ESC-10, tested on fold 1. Each class has a tone. A training clip carries its own class's tone with
           probability s = 0.5, 0.8 or 0.95, else that of a random class; a test clip carries a random one. Accuracy.
transfer   A model of UrbanSound8K, then a linear probe of Z on ESC-10's folds, and the reverse (Table IId). Accuracy.
folds      ESC-10, cross-validated over its five folds (Table IIa). Accuracy.

Nothing is augmented and the model is very small: the question is about the objective, not about the best score. Every
run is a line of `runs.jsonl`; a command that is given again computes what is missing there. `results.json` has the
accuracies of each question and objective, `table.md` their means and standard errors over the seeds.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, load_audio
from transformers_cat.causal import conditional_pns
from transformers_cat.training import label_names, read_esc50, read_urbansound8k
from transformers_cat.training.probe import linear_probe
from transformers_cat.training.protocol import markdown_table
from transformers_cat.training.report import remember, write_results

FRAME_SHIFT = 1280  # samples: 40 ms, a quarter of the frames, since many models are trained
SIZE = {
    "frame_shift": FRAME_SHIFT,
    "patch_size": (4, 8),
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "depthwise_kernel_size": 3,
}
STRENGTHS = (0.5, 0.8, 0.95)
TONES = 500 * 2 ** (np.arange(10) / 2.5)  # Hz, one for each class, 0.5 to 6 kHz
TONE_LEVEL = 0.02  # amplitude; full scale is 1
TEST_FOLD = 1

OFF = {"causal_loss_weight": 0.0, "reconstruction_loss_weight": 0.0}
VARIANTS = {"neither": OFF, "l_rs": {**OFF, "reconstruction_loss_weight": 1.0}}
for estimator in ("interventional", "closed_form"):
    for weight in (0.3, 1.0, 3.0):
        VARIANTS[f"l_c {estimator} {weight:g}"] = {
            **OFF,
            "causal_loss_weight": weight,
            "causal_estimator": estimator,
        }
    # The mean over the features makes a gradient small: a weight near their number is the sum of eq. 8.
    for weight in (30.0, 100.0):
        VARIANTS[f"l_c {estimator} {weight:g}"] = {**VARIANTS[f"l_c {estimator} 1"], "causal_loss_weight": weight}
    for weight in ("1", "30"):
        variant = VARIANTS[f"l_c {estimator} {weight}"]
        VARIANTS[f"l_c {estimator} {weight}, l_rs"] = {**variant, "reconstruction_loss_weight": 1.0}


class Corpus:
    """All clips of a data set in memory, cut or zero-padded to one length: for data sets of this size only."""

    def __init__(self, dataset, seconds: float):
        self.num_labels = len(label_names(dataset))
        self.labels = np.array(dataset["label"])
        self.folds = np.array(dataset["fold"])
        self.extractor = CATFeatureExtractor(frame_shift=FRAME_SHIFT)
        length = round(seconds * self.extractor.sampling_rate)
        clips = (load_audio(path)[:length] for path in dataset["audio"])
        self.waveforms = np.stack([np.pad(clip, (0, length - len(clip))) for clip in clips])

    def features(self, tones: np.ndarray | None = None) -> torch.Tensor:
        """(n, T, G * K * F), of the clips as they are or with the tone of the given class (n,) each."""
        time = np.arange(self.waveforms.shape[1]) / self.extractor.sampling_rate
        parts = []
        for start in range(0, len(self.waveforms), 16):
            waveforms = self.waveforms[start : start + 16]
            if tones is not None:
                frequencies = TONES[tones[start : start + 16], None]
                waveforms = waveforms + TONE_LEVEL * np.sin(2 * np.pi * frequencies * time).astype(np.float32)
            batch = self.extractor(
                waveforms, sampling_rate=self.extractor.sampling_rate, return_attention_mask=False, return_tensors="pt"
            )
            parts.append(batch["input_values"])
        return torch.cat(parts)


def train(features: torch.Tensor, labels: np.ndarray, num_labels: int, variant: str, seed: int, args) -> tuple:
    """A model of all the given clips, and its mean max(0, U) on them."""
    set_seed(seed)
    config = CATConfig(**SIZE, **VARIANTS[variant], num_labels=num_labels, problem_type="single_label_classification")
    trainer = Trainer(
        CATForAudioClassification(config),
        TrainingArguments(
            args.output_dir / "trainer",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_values": x, "labels": int(y)} for x, y in zip(features, labels)],
    )
    trainer.train()
    model = trainer.model.eval()
    latents = embed(model, features)
    head, targets = model.classifier, torch.nn.functional.one_hot(torch.as_tensor(labels), num_labels).float()
    with torch.no_grad():
        bound = conditional_pns(latents, head.weight, head.bias, targets, num_donors=16)
    return model, bound.clamp(min=0).mean().item()


@torch.no_grad()
def embed(model: CATForAudioClassification, features: torch.Tensor) -> torch.Tensor:
    """Z (n, d)."""
    return torch.cat([model.cat(part).pooler_output for part in features.split(64)])


@torch.no_grad()
def accuracy(model: CATForAudioClassification, features: torch.Tensor, labels: np.ndarray) -> float:
    predicted = model.classifier(embed(model, features)).argmax(-1).numpy()
    return float((predicted == labels).mean())


def probe(model: CATForAudioClassification, features: torch.Tensor, corpus: Corpus) -> float:
    """Mean accuracy over the folds of a linear classifier of Z."""
    scores = linear_probe(embed(model, features).numpy(), corpus.labels, corpus.folds)
    return float(np.mean(list(scores.values())))


def spurious(corpora: dict, settings: list[tuple[str, int]], args):
    """Yields (question, variant, seed, score, PNS)."""
    esc10 = corpora["esc10"]
    held_out = esc10.folds == TEST_FOLD
    for strength in STRENGTHS:
        features_of = {}
        for variant, seed in settings:
            question = f"spurious tone, s = {strength:g}"
            if not args.missing(question, variant, seed):
                continue
            if seed not in features_of:  # the same clips for all variants
                generator = np.random.default_rng(seed)
                random = generator.integers(esc10.num_labels, size=len(esc10.labels))
                own = (generator.random(len(random)) < strength) & ~held_out
                features_of = {seed: esc10.features(np.where(own, esc10.labels, random))}
            features = features_of[seed]
            model, pns = train(features[~held_out], esc10.labels[~held_out], esc10.num_labels, variant, seed, args)
            yield question, variant, seed, accuracy(model, features[held_out], esc10.labels[held_out]), pns


def transfer(corpora: dict, settings: list[tuple[str, int]], args):
    """Yields (question, variant, seed, score, PNS)."""
    features = {name: corpus.features() for name, corpus in corpora.items()}
    for source, target in (("urbansound8k", "esc10"), ("esc10", "urbansound8k")):
        question = f"transfer, {source} to {target}"
        for variant, seed in settings:
            if args.missing(question, variant, seed):
                corpus = corpora[source]
                model, pns = train(features[source], corpus.labels, corpus.num_labels, variant, seed, args)
                yield question, variant, seed, probe(model, features[target], corpora[target]), pns


def folds(corpora: dict, settings: list[tuple[str, int]], args):
    """Yields (question, variant, seed, score, PNS)."""
    corpus, features = corpora["esc10"], corpora["esc10"].features()
    for variant, seed in settings:
        if args.missing("ESC-10, five folds", variant, seed):
            scores = []
            for fold in sorted(set(corpus.folds.tolist())):
                out = corpus.folds == fold
                model, pns = train(features[~out], corpus.labels[~out], corpus.num_labels, variant, seed, args)
                scores.append((accuracy(model, features[out], corpus.labels[out]), pns))
            yield "ESC-10, five folds", variant, seed, *np.mean(scores, axis=0).tolist()


QUESTIONS = {"spurious": spurious, "transfer": transfer, "folds": folds}


def accuracies(runs: list[dict]) -> dict[str, dict[str, list[float]]]:
    """{question: {variant: accuracies}}."""
    results = {}
    for run in runs:
        results.setdefault(run["question"], {}).setdefault(run["variant"], []).append(run["accuracy"])
    return results


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: a row for each variant, a column for each question, mean and standard error in per cent."""

    def cell(values: list[float]) -> str:
        error = f" ± {100 * np.std(values, ddof=1) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
        return f"{100 * np.mean(values):.1f}{error}" if values else ""

    variants = [name for name in VARIANTS if any(name in scores for scores in results.values())]
    rows = [[name, *(cell(scores.get(name, [])) for scores in results.values())] for name in variants]
    return markdown_table(["objective", *results], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds esc10 and urbansound8k")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/causal"))
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    remember({"data": args.data, "epochs": args.epochs}, args.output_dir / "flags.json")
    journal = args.output_dir / "runs.jsonl"
    runs = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {(run["question"], run["variant"], run["seed"]) for run in runs}
    args.missing = lambda question, variant, seed: (question, variant, seed) not in done

    corpora = {"esc10": Corpus(read_esc50(args.data / "esc10"), seconds=5)}
    if "transfer" in args.questions:
        corpora["urbansound8k"] = Corpus(read_urbansound8k(args.data / "urbansound8k"), seconds=4)
    settings = [(variant, seed) for seed in range(args.seeds) for variant in args.variants]
    for name in args.questions:
        for question, variant, seed, score, pns in QUESTIONS[name](corpora, settings, args):
            run = {"question": question, "variant": variant, "seed": seed, "accuracy": score, "pns": pns}
            runs.append(run)
            with journal.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(f"{question:32} {variant:30} seed {seed}: accuracy {score:.3f}, mean PNS {pns:.4f}", flush=True)
    results = accuracies(runs)
    write_results(args.output_dir, results, table(results))


if __name__ == "__main__":
    main()
