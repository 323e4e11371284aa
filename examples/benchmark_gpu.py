#!/usr/bin/env python
"""CAT (tiny and base) beside HTS-AT and AST on a GPU: clips a second in inference and training.

    python examples/benchmark_gpu.py --output_dir runs/benchmark_gpu

All models have random weights and see batches of 10 seconds of audio, as spectrograms that lie on the device. A cell is
the median of `--repeats` steps: clips a second; in brackets the ratio to HTS-AT of the same row; the share of the
device's measured rate of bf16 products that the model's own products make up (MFU; a training step counts three times
a forward); and peak memory. Training is forward, backward and AdamW, with the whole objective for CAT and cross-entropy
for the others. CAT's front end, from waveforms on the device, is timed alone. `table.md` and `results.json` are written
to the output folder after each cell.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from benchmark import BASELINE, CLASSES, SECONDS, build, inputs, operations

from transformers_cat import CATConfig, CATForAudioClassification
from transformers_cat.training.protocol import markdown_table
from transformers_cat.training.report import write_json

BASE = Path(__file__).parents[1] / "model_cards/cat-base"
MODELS = {"CAT": "CAT", "CAT base": "CAT", "HTS-AT": "HTS-AT", "AST": "AST"}  # name -> whose inputs
INFERENCE = {
    "inference, float32": {"precision": torch.float32},
    "inference, bf16 autocast": {},
    "inference, bf16 weights": {"precision": torch.bfloat16},
    "inference, bf16 autocast, compiled": {"compiled": True},
}
TRAINING = {
    "training, float32": {"precision": torch.float32},
    "training, bf16 autocast": {},
    "training, bf16 autocast, compiled": {"compiled": True},
}


def build_any(name: str) -> torch.nn.Module:
    """A model with random weights."""
    if name != "CAT base":
        return build(name)
    torch.manual_seed(0)
    return CATForAudioClassification(
        CATConfig.from_pretrained(BASE, num_labels=CLASSES, problem_type="single_label_classification")
    )


@torch.no_grad()
def flops_of(name: str) -> int:
    """Operations of a forward of one clip."""
    model = build_any(name).eval()
    return operations(lambda: model(inputs(MODELS[name], 1)))


def seconds_of(step: Callable, device: torch.device, repeats: int) -> float:
    """Median time of a step, after three that warm up and compile."""
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    times = []
    for _ in range(repeats + 3):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def product_rate(device: torch.device, repeats: int, size: int = 8192) -> float:
    """Measured operations a second of a bf16 product."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats)


def step_of(
    name: str,
    batch_size: int,
    device: torch.device,
    training: bool,
    precision: torch.dtype | None = None,
    compiled: bool = False,
) -> Callable:
    """A forward without gradients, or a training step; `precision` `None` is bf16 autocast over float32 weights."""
    model = build_any(name).to(device).train(training)
    features = inputs(MODELS[name], batch_size).to(device)
    if precision is not None:
        model = model.to(precision)
        features = features.to(precision)
    call = torch.compile(model) if compiled else model
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if precision is None else nullcontext()

    def forward():
        with torch.no_grad(), autocast():
            call(features)

    def train():
        with autocast():
            if name == "HTS-AT":
                loss = torch.nn.functional.cross_entropy(call(features), labels)
            else:
                loss = call(features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train if training else forward


def front_end_step(batch_size: int, device: torch.device) -> Callable:
    """Waveforms to MRMF spectrograms, float32."""
    mrmf = build("CAT").cat.mrmf.to(device)
    waveforms = 0.1 * torch.randn(batch_size, SECONDS * mrmf.sampling_rate, device=device)
    return lambda: mrmf(waveforms)


def measured(step: Callable, batch_size: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Clips a second, and peak bytes where the device counts them."""
    counts = device.type == "cuda"
    if counts:
        torch.cuda.reset_peak_memory_stats(device)
    cell = {"clips_per_second": batch_size / seconds_of(step, device, repeats)}
    if counts:
        cell["bytes"] = torch.cuda.max_memory_allocated(device)
    return cell


def shown(cell: dict[str, float], baseline: dict[str, float] | None) -> str:
    """A cell of the table."""
    if "error" in cell:
        return cell["error"]
    text = f"{cell['clips_per_second']:,.0f}"
    if baseline and "error" not in baseline:
        text += f" ({cell['clips_per_second'] / baseline['clips_per_second']:.2f})"
    if "mfu" in cell:
        text += f", {100 * cell['mfu']:.0f} %"
    if "bytes" in cell:
        text += f", {cell['bytes'] / 2**30:.1f} GiB"
    return text


def table(results: dict) -> str:
    """The content of table.md."""
    names = list(dict.fromkeys(name for cells in results["rows"].values() for name in cells))
    rows = [
        [row, *(shown(cells[name], cells.get(BASELINE)) if name in cells else "" for name in names)]
        for row, cells in results["rows"].items()
    ]
    return markdown_table(["clips of 10 s a second", *names], rows)


def main(argv: list[str] | None = None) -> dict:
    """Run the script.

    Returns:
        The content of `results.json`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark_gpu"))
    parser.add_argument(
        "--device", type=torch.device, default=torch.accelerator.current_accelerator(check_available=True)
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=[*INFERENCE, *TRAINING], default=[*INFERENCE, *TRAINING])
    parser.add_argument("--inference_batch", type=int, default=64)
    parser.add_argument("--training_batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    if args.device is None:
        parser.error("there is no accelerator: name a --device, like cpu, to try the script")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rate = product_rate(args.device, args.repeats, 8192 if args.device.type != "cpu" else 512)
    results = {
        "environment": {
            "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "product_flops_per_second": rate,
            "inference_batch": args.inference_batch,
            "training_batch": args.training_batch,
        },
        "flops": {name: flops_of(name) for name in args.models},
        "rows": {},
    }

    def record(row: str, name: str, cell: dict) -> None:
        results["rows"].setdefault(row, {})[name] = cell
        write_json(args.output_dir / "results.json", results)
        (args.output_dir / "table.md").write_text(table(results), encoding="utf-8")
        print(row, name, json.dumps(cell), flush=True)

    cell = measured(front_end_step(args.inference_batch, args.device), args.inference_batch, args.device, args.repeats)
    record("front end, float32", "CAT", cell)
    for row in args.rows:
        training = row in TRAINING
        batch_size = args.training_batch if training else args.inference_batch
        for name in args.models:
            torch.compiler.reset()  # what an earlier cell compiled is not this one's
            try:
                step = step_of(name, batch_size, args.device, training, **{**INFERENCE, **TRAINING}[row])
                cell = measured(step, batch_size, args.device, args.repeats)
                cell["mfu"] = cell["clips_per_second"] * results["flops"][name] * (3 if training else 1) / rate
            except torch.OutOfMemoryError:
                cell = {"error": "out of memory"}
            record(row, name, cell)
    print(table(results))
    return results


if __name__ == "__main__":
    main()
