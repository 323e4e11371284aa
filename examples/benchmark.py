#!/usr/bin/env python
"""CAT (tiny) beside AST, HTS-AT and Swin-T on the same machine: time, memory, FLOPs and parameters.

    python examples/benchmark.py --output_dir runs/benchmark

All models have random weights and see 10 seconds of audio. They take turns in one process, so that a busy machine slows
them alike; a cell is the median time for a clip and, in brackets, the median over the rounds of its ratio to HTS-AT.
The matrix products of a forward, replayed alone, are the floor under its time. Each row ends when its `--budget` is
spent: what takes long is timed once, and the table says so (*). AST sees one clip at a time in every row of models,
since a batch of them takes minutes. Peak memory is that of a fresh process each, less what the process holds before the
model is built (in the table of lengths, after). `table.md`, `results.json` and `benchmark.png` are written to the
output folder; with the defaults that takes some eight minutes on two cores.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from robustness import quantised
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapAudioConfig,
    ClapAudioModel,
    ClapFeatureExtractor,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    pipeline,
)

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification
from transformers_cat.training.protocol import markdown_table
from transformers_cat.training.report import new_figure, write_json

CLASSES = 50
SECONDS = 10
BASELINE = "HTS-AT"
LENGTHS = (1, 10, 60, 600)  # seconds
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.convolution,
    CPU_ATTENTION,
    torch.ops.mkldnn._linear_pointwise,
)


class HTSAT(torch.nn.Module):
    """transformers' HTS-AT (CLAP's audio tower) with the linear head that it lacks."""

    def __init__(self):
        super().__init__()
        self.body = ClapAudioModel(ClapAudioConfig())
        self.head = torch.nn.Linear(self.body.config.hidden_size, CLASSES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(features).pooler_output)


def build(name: str) -> torch.nn.Module:
    """A model with random weights."""
    torch.manual_seed(0)
    return {
        "CAT": lambda: CATForAudioClassification(
            CATConfig(num_labels=CLASSES, problem_type="single_label_classification")
        ),
        "HTS-AT": HTSAT,
        "AST": lambda: ASTForAudioClassification(ASTConfig(num_labels=CLASSES)),
        "Swin-T": lambda: SwinForImageClassification(SwinConfig(image_size=256, window_size=8, num_labels=CLASSES)),
    }[name]()


MODELS = ("CAT", "HTS-AT", "AST", "Swin-T")


def trained(name: str) -> torch.nn.Module:
    """A model as it is after training: CAT without its reconstruction block."""
    model = build(name).eval()
    if isinstance(model, CATForAudioClassification):
        model.drop_reconstruction()
    return model


def inputs(name: str, batch_size: int) -> torch.Tensor:
    """What the model's feature extractor makes of 10 seconds."""
    shape = {"CAT": (1000, 384), "HTS-AT": (1, 1001, 64), "AST": (1024, 128), "Swin-T": (3, 256, 256)}[name]
    return torch.randn(batch_size, *shape)


def forward(name: str, batch_size: int) -> Callable:
    model, features = trained(name), inputs(name, batch_size)

    def step():
        with torch.no_grad():
            model(features)

    return step


class Products(TorchDispatchMode):
    """Collects what multiplies matrices, with its weights and one stand-in for all inputs of a shape."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights, self.stand_ins, self.calls = weights, {}, []

    def stand_in(self, value):
        if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in self.weights:
            return value
        return self.stand_ins.setdefault((value.shape, value.stride()), value.clone())

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if function.overloadpacket in PRODUCTS:
            self.calls.append((function, *tree_map(self.stand_in, (arguments, keywords or {}))))
        return output


def products(name: str, batch_size: int) -> Callable:
    """The matrix products of a forward alone, attention's among them: no model made of these takes less."""
    model = trained(name)
    collected = Products({weight.untyped_storage().data_ptr() for weight in model.parameters()})
    with torch.no_grad(), collected:
        model(inputs(name, batch_size))

    def step():
        with torch.no_grad():
            for product, arguments, keywords in collected.calls:
                product(*arguments, **keywords)

    return step


def training_step(name: str, batch_size: int) -> Callable:
    """Forward, backward and AdamW; the whole objective for CAT, cross-entropy for the others."""
    model, features = build(name).train(), inputs(name, batch_size)
    labels = torch.randint(CLASSES, (batch_size,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        if name == "HTS-AT":
            loss = torch.nn.functional.cross_entropy(model(features), labels)
        else:
            loss = model(features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def front_end(name: str, batch_size: int) -> Callable:
    extractor = {
        "CAT": CATFeatureExtractor,
        "HTS-AT": lambda: ClapFeatureExtractor(
            truncation="rand_trunc"
        ),  # one view of a clip, not CLAP's fusion of four
        "AST": ASTFeatureExtractor,
    }[name]()
    rate = extractor.sampling_rate
    clips = list(0.1 * np.random.default_rng(0).standard_normal((batch_size, SECONDS * rate), dtype=np.float32))
    return lambda: extractor(clips, sampling_rate=rate, return_tensors="pt")


def waveform_to_label(name: str, batch_size: int) -> Callable:
    """The pipeline; for HTS-AT, which has none with a linear head, its feature extractor and model."""
    model = trained(name)
    if name == "HTS-AT":
        features = front_end(name, batch_size)

        def step():
            with torch.no_grad():
                model(features()["input_features"]).argmax(-1)

        return step
    extractor = {"CAT": CATFeatureExtractor, "AST": ASTFeatureExtractor}[name]()
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor, device="cpu")
    clip = 0.1 * np.random.default_rng(0).standard_normal(SECONDS * extractor.sampling_rate, dtype=np.float32)
    return lambda: classify(clip)


def quantisation(budget: float) -> dict[str, float]:
    """Time of 8-bit linear layers over float32's, one clip."""
    plain, int8, features = trained("CAT"), quantised(trained("CAT")), inputs("CAT", 1)
    with torch.no_grad():
        times = alternate({"float32": lambda: plain(features), "int8": lambda: int8(features)}, budget, "float32")
    return {"ratio": times["int8"]["ratio"]}


def load(name: str, folder: Path) -> Callable:
    """`from_pretrained` of what this saves first."""
    model = trained(name)
    model = model.body if isinstance(model, HTSAT) else model
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(folder / name)
    return lambda: type(model).from_pretrained(folder / name)


TASKS = {
    "forward, batch 1": (forward, 1, MODELS),
    "forward, batch 4": (forward, 4, MODELS),
    "products of a forward alone, batch 1": (products, 1, ("CAT", "HTS-AT", "Swin-T")),
    "training step, batch 4": (training_step, 4, ("CAT", "HTS-AT", "AST")),
    "front end, batch 8": (front_end, 8, ("CAT", "HTS-AT", "AST")),
    "waveform to label, batch 1": (waveform_to_label, 1, ("CAT", "HTS-AT", "AST")),
}
MEASURED_MEMORY = ("forward, batch 4", "training step, batch 4")
UNMEASURED_MEMORY = [("training step, batch 4", "AST")]  # minutes more, for a step that is timed anyhow


def batch_of(task: str, name: str) -> int:
    """Clips that the model sees at once: one where a batch would take minutes."""
    make, batch_size, _ = TASKS[task]
    return 1 if name == "AST" and make is not front_end else batch_size


def alternate(
    steps: dict[str, Callable], budget: float, baseline: str = BASELINE, clips: dict[str, int] | None = None
) -> dict[str, dict[str, float]]:
    """Median seconds for a clip, and median ratio to the baseline, of steps that take turns for `budget` seconds.

    A step is for one clip, or for as many as `clips` says. The first round warms up and is not counted, except for a
    step that takes a fifth of the budget: it gets no other.
    """
    times = {name: [] for name in steps}
    once = set()
    begin = time.perf_counter()
    while len(times[baseline]) < 2 or time.perf_counter() - begin < budget:
        for name, step in steps.items():
            if name in once:
                continue
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            times[name].append(elapsed / (clips or {}).get(name, 1))
            if name != baseline and len(times[name]) == 1 and elapsed > budget / 5:
                once.add(name)
    times = {name: values if name in once else values[1:] for name, values in times.items()}
    typical = statistics.median(times[baseline])
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": values[0] / typical
            if name in once
            else statistics.median(a / b for a, b in zip(values, times[baseline])),
            "rounds": len(values),
        }
        for name, values in times.items()
    }


def peak_memory(task: str, name: str) -> float:
    """Bytes that a fresh process needs at most for two steps, of AST for one."""
    command = [sys.executable, __file__, "--memory_of", task, name]
    # What is freed goes back to the system: glibc would keep some, more or less of it from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def measure_memory(task: str, name: str) -> None:
    """What `peak_memory` and `cost_of_length` read."""
    seconds = task.removesuffix(" s of audio")
    if seconds != task:
        model = trained("CAT")
        waveform = 0.1 * torch.randn(1, int(seconds) * model.config.sampling_rate)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with torch.no_grad():
            model(waveform)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)
        return
    make = TASKS[task][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make(name, batch_of(task, name))
    for _ in range(1 if name == "AST" else 2):
        step()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def cost_of_length(seconds: int) -> dict[str, float]:
    """From waveform to logits, one clip, in a fresh process (so its first and only pass)."""
    command = [sys.executable, __file__, "--memory_of", f"{seconds} s of audio", "CAT"]
    kibibytes, elapsed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {"bytes": 1024 * float(kibibytes), "seconds": float(elapsed)}


def operations(step: Callable) -> int:
    """FLOPs, with those of a CPU's fused attention, which PyTorch's counter passes over."""
    formula = {CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        step()
    return counter.get_total_flops()


def table(results: dict) -> str:
    """The content of table.md."""

    def cells(values: dict, text: Callable) -> list[str]:
        return [text(values[name]) if name in values else "" for name in MODELS]

    def time_of(cell: dict) -> str:
        return f"{1e3 * cell['seconds']:.0f} ms ({cell['ratio']:.2f})" + "*" * (cell["rounds"] == 1)

    rows = [[f"{task}, a clip", *cells(own, time_of)] for task, own in results["time"].items()]
    for task, own in results["memory"].items():
        rows.append([f"memory, {task}", *cells(own, lambda size: f"{size / 2**20:.0f} MiB")])
    rows.append(["flops", *cells(results["flops"], lambda count: f"{count / 1e9:.1f} GFLOP")])
    rows.append(["parameters", *cells(results["parameters"], lambda count: f"{count / 1e6:.1f} M")])
    lengths = [
        [f"{seconds} s of audio", f"{cost['seconds']:.2f} s", f"{cost['bytes'] / 2**20:.0f} MiB"]
        for seconds, cost in results["length"].items()
    ]
    parts = [
        markdown_table(["what", *MODELS], rows),
        markdown_table(["CAT, waveform to logits", "time", "memory"], lengths),
        "*: timed once. AST sees one clip at a time, for memory too.\n",
    ]
    if results["int8"]:
        parts.append(f"CAT with 8-bit linear layers: {results['int8']['ratio']:.2f} times the time of float32.\n")
    return "\n".join(parts)


def write(results: dict, folder: Path) -> None:
    """table.md, benchmark.png"""
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    if not results["time"]:
        return
    figure = new_figure(9, 4)
    axis = figure.subplots()
    width = 0.8 / len(MODELS)
    for index, name in enumerate(MODELS):
        ratios = [cells.get(name, {}).get("ratio", 0) for cells in results["time"].values()]
        axis.bar(np.arange(len(ratios)) + index * width, ratios, width, label=name)
    axis.set_xticks(np.arange(len(results["time"])) + 0.3, list(results["time"]), rotation=15)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylabel(f"time over that of {BASELINE}")
    axis.legend()
    figure.savefig(folder / "benchmark.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--budget", type=float, default=20, help="Seconds for each row of times.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="Seconds of audio for CAT alone.")
    parser.add_argument("--memory_of", nargs=2, metavar=("TASK", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(*args.memory_of)
        return
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "threads": args.threads,
            "budget": args.budget,
        },
        **{what: {} for what in ("memory", "length", "time", "int8", "flops", "parameters")},
    }

    def record(what: str, values: dict) -> None:
        """Writes what is known so far: whoever stops the run keeps it."""
        results[what].update(values)
        write_json(args.output_dir / "results.json", results)
        write(results, args.output_dir)
        print(what, values, flush=True)

    # Memory first, while this process is small: Linux hands a parent's peak down to its children.
    for seconds in args.lengths:
        record("length", {seconds: cost_of_length(seconds)})
    for task in args.tasks:
        if task in MEASURED_MEMORY:
            names = [name for name in TASKS[task][2] if (task, name) not in UNMEASURED_MEMORY]
            record("memory", {task: {name: peak_memory(task, name) for name in names}})
    for task in args.tasks:
        make, _, names = TASKS[task]
        clips = {name: batch_of(task, name) for name in names}
        steps = {name: make(name, clips[name]) for name in names}
        record("time", {task: alternate(steps, args.budget, clips=clips)})
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: load(name, Path(folder)) for name in MODELS}
        record("time", {"from_pretrained": alternate(steps, args.budget)})
    record("int8", quantisation(args.budget))
    for name in MODELS:
        record("flops", {name: operations(forward(name, 1))})
        record("parameters", {name: sum(weight.numel() for weight in trained(name).parameters())})
    print((args.output_dir / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
