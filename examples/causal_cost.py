#!/usr/bin/env python
"""What the causal and the reconstruction loss cost: time and memory of a training step, over that without them.

    python examples/causal_cost.py --output_dir runs/cost

A step is forward, backward and AdamW update of `cat-tiny` on 10-second features. The variants alternate in one process,
so that a busy machine slows them alike; the median of each round's ratios is reported. Memory is the peak of a fresh
process each. The result is `results.json` and `table.md`.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from transformers_cat import CATConfig, CATForAudioClassification
from transformers_cat.training.protocol import markdown_table
from transformers_cat.training.report import write_results

CONFIG = Path(__file__).parents[1] / "model_cards" / "cat-tiny"
FRAMES = 1000
VARIANTS = {
    "without": {"causal_loss_weight": 0.0, "reconstruction_loss_weight": 0.0},
    "l_c": {"reconstruction_loss_weight": 0.0},
    "l_c, closed form": {"reconstruction_loss_weight": 0.0, "causal_estimator": "closed_form"},
    "l_c and l_rs": {},
}
TASKS = {"50 classes": ("single_label_classification", 50), "527 labels": ("multi_label_classification", 527)}


class Step:
    """A training step of one variant."""

    def __init__(self, variant: str, task: str, batch_size: int):
        problem_type, classes = TASKS[task]
        torch.manual_seed(0)
        config = CATConfig.from_pretrained(CONFIG, num_labels=classes, problem_type=problem_type, **VARIANTS[variant])
        self.model = CATForAudioClassification(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.features = torch.randn(batch_size, FRAMES, config.feature_size)
        self.labels = torch.randint(classes, (batch_size,))
        if problem_type == "multi_label_classification":  # AudioSet has some two labels a clip
            self.labels = torch.nn.functional.one_hot(self.labels, classes).float()
            self.labels[:, :2] = 1.0

    def __call__(self) -> float:
        start = time.perf_counter()
        self.model(self.features, labels=self.labels).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def peak_memory(variant: str, task: str, batch_size: int) -> int:
    """Bytes that two steps need at most, in a process of their own."""
    command = [sys.executable, __file__, "--memory_of", variant, task, "--batch_size", str(batch_size)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(args: argparse.Namespace) -> dict:
    """{task: {variant: seconds, bytes, and their ratios to those without the losses}}."""
    # First, while this process is small: Linux hands a parent's peak down to its children.
    memory = {
        (task, variant): peak_memory(variant, task, args.batch_size) for task in args.tasks for variant in VARIANTS
    }
    results = {}
    for task in args.tasks:
        steps = {variant: Step(variant, task, args.batch_size) for variant in VARIANTS}
        rounds = [{variant: step() for variant, step in steps.items()} for _ in range(args.repeats + 1)][1:]
        results[task] = {
            variant: {
                "seconds": statistics.median(times[variant] for times in rounds),
                "ratio": statistics.median(times[variant] / times["without"] for times in rounds),
                "bytes": memory[task, variant],
                "bytes_ratio": memory[task, variant] / memory[task, "without"],
            }
            for variant in VARIANTS
        }
    return results


def table(results: dict) -> str:
    """A row for each task and variant."""
    rows = [
        [
            task,
            variant,
            f"{own['seconds']:.2f} s, {own['ratio']:.3f}",
            f"{own['bytes'] / 2**30:.2f} GiB, {own['bytes_ratio']:.3f}",
        ]
        for task, variants in results.items()
        for variant, own in variants.items()
    ]
    return markdown_table(["task", "objective", "time", "memory"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/cost"))
    parser.add_argument("--memory_of", nargs=2, metavar=("VARIANT", "TASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        step = Step(*args.memory_of, args.batch_size)
        step(), step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    results = measure(args)
    write_results(args.output_dir, results, table(results))


if __name__ == "__main__":
    main()
