"""The figures of the documents are those of the runs."""

import importlib
import json
from pathlib import Path

import pytest

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
