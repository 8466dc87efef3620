"""The example notebook runs from its first cell to its last, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import pytest
from conftest import tiny, tokenizer

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
SMALLER = {
    "calibration.tokens": 512,
    "calibration.sequence_length": 16,
    "compress.fisher_tokens": 256,
    "compress.of": "weights",
    "compress.rank_multiple": 2,
    "evaluate.perplexity.sequence_length": 16,
    "evaluate.perplexity.tokens": 64,
    "run.compute": "float32",
}


@pytest.fixture
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(cells, tmp_path, capsys):
    mpl.use("agg")
    tiny("mistral").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and ran . \n" * 120)
    known = {}
    for cell in cells:
        exec("".join(cell["source"]), known)  # cells share their names, as in a notebook
        if "parameters" in cell["metadata"].get("tags", ()):
            known |= {
                "MODEL": str(tmp_path / "model"),
                "TEXT": str(tmp_path / "text.txt"),
                "OUT": str(tmp_path / "run"),
            }
            known["SMALLER"] = SMALLER
    said = capsys.readouterr().out
    assert "perplexity/perplexity" in said
    assert known["result"].plan.after < known["result"].plan.before
    assert set(known["kinds"]) >= {"self_attn.q_proj", "mlp.down_proj"}
    assert all(0 < share <= 1 for shares in known["kinds"].values() for share in shares)
    assert len(known["axes"].lines) == len(known["kinds"])


def test_the_notebook_is_stored_without_what_somebody_ran(cells):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
