"""The report: complete, from local files alone, safe against what users write, and never in the way of a run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny, tokenizer

import lillama
from lillama import registry
from lillama.cli import main as cli
from lillama.errors import LillamaError
from lillama.report import html as report
from lillama.report import plots, record, words

pytestmark = pytest.mark.report
TEXT = "the cat sat on a mat and ran . " * 60


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, with an awkward prompt in its recipe."""
    home = tmp_path_factory.mktemp("report")
    tiny("mistral").save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text(TEXT)
    text = f"""
model: {{id: {home}/model, dtype: float32}}   # <script>alert(1)</script>
compress: {{reduction: 0.2, of: weights, rank_multiple: 2}}
distill: {{batch_size: 2, epochs: 1, holdout: 0.2}}
calibration: {{dataset: {home}/text.txt, sequence_length: 16}}
evaluate:
  perplexity: {{dataset: {home}/text.txt, sequence_length: 16, tokens: 64}}
  sample: {{prompt: "the <b>cat", new_tokens: 3}}
run: {{out: {home}/out, device: cpu, compute: float32}}
"""
    (home / "recipe.yaml").write_text(text)
    lillama.compress(lillama.Recipe.load(home / "recipe.yaml"))
    return home / "out"


def test_the_report_says_which_special_tokens_begin_a_window(finished: Path) -> None:
    held = record.read(finished)
    cut = {"special_tokens": "auto", "before": ["<s>", "<lang>"], "length": 64}
    held.stages = {"before": {"details": {"perplexity/wiki": {"windows": cut}}}}
    assert "perplexity/wiki: windows of 64 tokens, each begins with &lt;s&gt; &lt;lang&gt;." in report.render(held)


class Page(HTMLParser):
    """What a browser would make of a page: tags that match, addresses, text."""

    VOID = {"meta", "br", "link", "img", "path", "use", "rect", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_a_run_leaves_a_report_that_needs_no_network(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert not page.open, "every element is closed"
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), f"{name}={value} is not in the file"
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "<script" not in text
    ids = [value for name, value in page.attributes if name == "id" and re.match(r"[mp][0-9a-f]{6}", value)]
    assert len(ids) == len(set(ids)), "markers of one chart are not those of another"


def test_the_report_says_what_was_measured(finished: Path) -> None:
    said = " ".join(" ".join(Page((finished / "report.html").read_text()).said).split())
    metrics = json.loads((finished / "metrics.json").read_text())
    plan = json.loads((finished / "plan.json").read_text())
    assert words.number(metrics["after"]["perplexity/perplexity"]) in said
    assert f"{plan['reduction']:.1%} fewer" in said
    for wanted in ("Before and after", "Distillation", "Ranks", "Layers that fit least", "Load it", "held-out loss"):
        assert wanted in said, wanted
    assert str(plan["weights"][0]["rank"]) in said
    assert f'from_pretrained("{finished}/model")' in said and "MistralForCausalLM" in said
    assert "perplexity: windows of 16 tokens, without special tokens." in said
    assert "the <b>cat" in said and "<script>alert(1)</script>" in said, "shown as they were written"
    assert "not drawn" not in said


def test_the_report_of_a_run_that_stopped(finished: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "recipe.yaml", "recipe.resolved.yaml"):
        (tmp_path / name).write_text((finished / name).read_text())
    events = (finished / "events.jsonl").read_text().splitlines()
    (tmp_path / "events.jsonl").write_text("\n".join(events[:4]) + '\n{"event": "chec')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "has not finished" in (tmp_path / "report.html").read_text()
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2


def test_a_chart_that_fails_is_named_and_the_rest_is_there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(found: Any) -> str:
        raise ValueError("no <ink>")

    monkeypatch.setitem(registry.FIGURES._targets, "ranks", broken)
    text = report.render(record.read(finished))
    assert "not drawn: ValueError: no &lt;ink&gt;" in text and text.count("<svg") >= 2


def test_a_figure_from_outside_is_in_the_report_and_one_that_fails_costs_nothing_else(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_figure(found: record.RunRecord) -> str:
        return f"<svg id='mine'><text>{len(found.plan['weights'])} weights</text></svg>"

    def broken(found: record.RunRecord) -> str:
        raise KeyError("what a run lacks")

    before = report.render(record.read(finished))
    monkeypatch.setattr(registry.FIGURES, "_targets", dict(registry.FIGURES._targets))
    registry.Registries.figures.add("weight_count", own_figure)
    registry.Registries.figures.add("astray", broken)
    registry.Registries.figures.add("nothing_here", lambda found: None)
    text = report.render(record.read(finished))
    assert "<svg id='mine'>" in text and "<h2>Weight count</h2>" in text
    assert text.count("not drawn") == 1 and "<h2>Astray</h2>" in text and "KeyError" in text
    assert "Nothing here" not in text
    assert text.count("<svg") == before.count("<svg") + 1
    assert not Page(text).open


def test_a_report_that_fails_does_not_cost_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("no paper")

    monkeypatch.setattr(report, "write", broken)
    recipe = lillama.Recipe.load(finished.parent / "recipe.yaml", [f"run.out={tmp_path}/out"])
    assert (lillama.compress(recipe).path / "config.json").exists()


def enriched(finished: Path) -> record.RunRecord:
    """A run with everything a report can show."""
    found = record.read(finished)
    detail = {
        "lm_eval": "0.4.13", "limit": 4.0, "fewshot": 0, "batch_size": 8, "dtype": "float32",
        "tasks": {"arc_easy": {"metric": "acc_norm", "hits": "1100"}, "boolq": {"metric": "acc", "hits": "1111"}},
    }  # fmt: skip
    rows = [{"layer": i, "kind": kind, "value": 3.0 + i} for kind in ("mlp.up_proj", "activations") for i in range(3)]
    for stage, hits in (("before", "1100"), ("after", "1001")):
        own = json.loads(json.dumps(detail))
        own["tasks"]["arc_easy"]["hits"] = hits
        found.stages[stage]["details"] |= {"harness": own, "stable_rank": {"rows": rows}}
        found.metrics[stage] |= {"arc_easy/acc_norm": 0.5, "arc_easy/acc_norm_stderr": 0.25, "boolq/acc": 1.0}
    found.events += [{"event": "curve", "tokens": 10 * i, "layers": i, "perplexity": 90.0 - i, "original": 9.0}
                     for i in range(4)]  # fmt: skip
    found.events += [{"event": "check", "finetune": True, "step": i, "held_out_loss": 3.0 - i} for i in range(2)]
    speeds = {"original": 100.0, "compressed": 150.0, "ratio": [1.5, 1.4, 1.6]}
    found.bench = {
        "rows": [{"length": n, "prefill": speeds, "decode": speeds} for n in (64, 128)]
        + [{"length": 256, "note": "original: out of memory", "prefill": {"compressed": 3.0}, "decode": {}}],
        "batch_size": 4, "repeats": 3, "machine": "a machine", "threads": 2, "dtype": "float32",
    }  # fmt: skip
    return found


def test_everything_a_report_can_show(finished: Path) -> None:
    found = enriched(finished)
    assert set(report.PLACED) <= set(registry.FIGURES)
    assert {name for name in registry.FIGURES if registry.FIGURES.get(name)(found)} == set(registry.FIGURES)
    text = report.render(found)
    page = Page(text)
    said = " ".join(" ".join(page.said).split())
    assert "not drawn" not in said
    assert "0.5 ± 0.25" in said and "original: out of memory" in said and "x 1.50" in said and "1.40 to 1.60" in said
    # hits 1100 and 1001: changes 0 -1 0 +1, mean 0, error sqrt(2/3)/2.
    assert "arc_easy acc_norm +0.0 ± 40.8" in said and "at most 4 examples a task" in said
    ids = [value for name, value in page.attributes if name == "id" and re.match(r"[mp][0-9a-f]{6}", value)]
    assert len(ids) == len(set(ids))


def test_layers_are_called_by_their_numbers_where_these_tell_them_apart() -> None:
    names = ["model.layers.0", "model.layers.11"]
    assert [record.layer_label(name, names) for name in names] == ["0", "11"]
    mixed = ["encoder.layers.0", "decoder.layers.0"]
    assert [record.layer_label(name, mixed) for name in mixed] == mixed
    with_head = ["model.embed_tokens", "model.layers.3", "lm_head"]
    assert [record.layer_label(name, with_head) for name in with_head] == ["model.embed_tokens", "3", "lm_head"]


def test_charts_take_their_colours_from_the_page() -> None:
    text = plots.lines({"a": [(1, 2.0), (2, float("inf")), (3, 1.0)], "b": [(1, 1.0)]}, "x", "y & z", log=True)
    assert "var(--ink, #1f2933)" in text and "#010101" not in text
    assert 'aria-label="y &amp; z against x: a, b"' in text
    assert re.match(r'<svg role="img" aria-label="[^"]*" (?![^>]* width=)[^>]*viewBox', text)
    assert "<text" in text, "text stays text"


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LillamaError, match="not a run directory"):
        report.write(tmp_path)


def test_what_did_not_go_as_planned_is_said(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert "did not go as planned" not in report.render(record.read(tmp_path / "run"))
    with (tmp_path / "run" / "events.jsonl").open("a") as events:
        for event in (
            {"event": "recovered", "layer": "model.layers.1", "reason": "the loss became nan at step 3", "rate": 0.1},
            {"event": "kept_dense", "weight": "model.layers.2.mlp.<b>", "reason": "its factors are not finite"},
        ):
            events.write(json.dumps(event) + "\n")
    page = report.render(record.read(tmp_path / "run"))
    assert "model.layers.1: the loss became nan at step 3; it went back to an earlier state" in page
    assert "model.layers.2.mlp.&lt;b&gt; stays dense: its factors are not finite." in page
