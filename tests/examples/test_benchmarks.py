"""The benchmark of a GPU, tried on the CPU, and the floor that the one of a CPU gives."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def script():
    return importlib.import_module("benchmark_gpu")


@pytest.mark.parametrize("name", ["CAT", "HTS-AT"])
def test_products_are_all_of_a_forward(name):
    benchmark = importlib.import_module("benchmark")
    products, forward = (benchmark.operations(make(name, 1)) for make in (benchmark.products, benchmark.forward))
    assert products == forward > 11e9


def test_fused_attention_of_a_cpu_counts():
    benchmark = importlib.import_module("benchmark")
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with torch.no_grad():
        attention = partial(torch.nn.functional.scaled_dot_product_attention, query, key, key)
        assert benchmark.operations(attention) == 2 * 2 * (2 * 3 * 5 * 7 * 8)


def test_rows_and_ratios(script, tmp_path):
    command = [
        "--device",
        "cpu",
        "--models",
        "CAT",
        "HTS-AT",
        "--rows",
        "inference, bf16 autocast",
        "training, float32",
    ]
    sizes = ["--inference_batch", "1", "--training_batch", "2", "--repeats", "1", "--output_dir", str(tmp_path)]
    results = script.main([*command, *sizes])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert set(results["rows"]) == {"front end, float32", "inference, bf16 autocast", "training, float32"}
    row = results["rows"]["training, float32"]
    rate = results["environment"]["product_flops_per_second"]
    for name, cell in row.items():
        assert cell["mfu"] == pytest.approx(3 * results["flops"][name] * cell["clips_per_second"] / rate)
    assert 12.3e9 < results["flops"]["CAT"] < 12.5e9
    ratio = row["CAT"]["clips_per_second"] / row["HTS-AT"]["clips_per_second"]
    assert f"({ratio:.2f})" in (tmp_path / "table.md").read_text()


def test_what_does_not_fit_is_named(script):
    results = {"rows": {"training": {"HTS-AT": {"error": "out of memory"}, "CAT": {"clips_per_second": 12.3}}}}
    assert "| training | out of memory | 12 |" in script.table(results)
