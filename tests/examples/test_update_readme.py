"""The figures of the documents are those of the runs."""

import importlib
import json
from pathlib import Path

import pytest

from transformers_cat.training.protocol import summarise

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("update_readme")


def test_documents_are_what_the_runs_say(script):
    texts = [document.read_text(encoding="utf-8") for document in script.DOCUMENTS]
    assert script.updated(texts, script.RESULTS) == texts
    kept = {path.stem for path in script.RESULTS.glob("*.json")}
    assert kept == {name for name in script.FIGURES if f"<!-- {name} -->" in "".join(texts)}


def test_rows_come_from_several_runs_of_which_some_are_elsewhere(script, tmp_path):
    one, two = {0: {1: 0.5, 2: 0.6}}, {0: {1: 0.5, 2: 0.6}, 1: {1: 0.7, 2: 1.0}}
    for name, seeds in (("transfer", one), ("transfer_cnn", two)):
        (tmp_path / name).mkdir()
        summary = {"note": "none", "linear probe": summarise({0: {1: 0.5}}), "fine-tuned": summarise(seeds)}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    script.collect(tmp_path, tmp_path / "results")
    before = (tmp_path / "results/transfer.json").read_text()
    assert list(json.loads(before)) == ["CAT, classes", "CNN, classes"] and "note" not in before
    (tmp_path / "transfer/summary.json").unlink()
    script.collect(tmp_path, tmp_path / "results")
    assert (tmp_path / "results/transfer.json").read_text() == before
    assert script.transfers(json.loads(before)).splitlines()[2:] == [
        "| CAT, classes | 50.0 |  |  |  | 55.0 ± 7.1 |",
        "| CNN, classes | 50.0 |  |  |  | 70.0 ± 14.1 (2) |",  # of 60 and 80: not of the seeds' means
    ]


def test_figures_come_from_the_files(script, tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    run = {"metrics": {"epoch": 7.0, "eval_accuracy": 0.5}, "clips": {"train": 4, "test": 2}, "environment": "secret"}
    (runs / "digits").mkdir(parents=True)
    (runs / "digits/results.json").write_text(json.dumps(run))
    (runs / "digits/table.png").write_bytes(b"picture")
    script.collect(runs, results)
    assert sorted(path.name for path in results.iterdir()) == ["digits.json", "digits.png"]
    assert "secret" not in (results / "digits.json").read_text()
    document = "before <!-- digits -->old<!-- /digits --> after"
    other, text = script.updated(["other", document], results)
    assert other == "other"
    assert "| 4 | 2 | 7 | 50.0 |" in text and "old" not in text
    assert text.startswith("before <!-- digits -->\n") and text.endswith("<!-- /digits --> after")
    for texts in (["none"], [document, document]):
        with pytest.raises(ValueError, match="needs a place for digits.json"):
            script.updated(texts, results)
