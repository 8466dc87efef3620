"""The command line: a user's mistake is one clear message, exit status 2, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny, tokenizer
from transformers import XLMConfig, XLMWithLMHeadModel

from lillama.cli import main as cli
from lillama.recipe.schema import Recipe
from lillama.version import __version__

REPOSITORY = Path(__file__).parents[1]
TEXT = "the cat sat on a mat and ran . " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tiny model, a text, a table of conversations and a recipe."""
    home = tmp_path_factory.mktemp("home")
    tiny("mistral").save_pretrained(home / "model")
    tokenizer().save_pretrained(home / "model")
    (home / "text.txt").write_text(TEXT)
    chat = [{"from": "human", "value": "the cat sat"}, {"from": "gpt", "value": "on a mat and ran " * 8}]
    (home / "chat.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for _ in range(12)))
    (home / "recipe.yaml").write_text(f"""
model: {{id: {home}/model, dtype: float32}}
compress: {{reduction: 0.1, of: weights, rank_multiple: 2}}
distill: {{batch_size: 2, epochs: 1}}
calibration: {{dataset: {home}/text.txt, sequence_length: 16}}
evaluate:
  perplexity: {{dataset: {home}/text.txt, sequence_length: 16, tokens: 64}}
  sample: {{prompt: the cat, new_tokens: 3}}
run: {{out: {home}/out, device: cpu, compute: float32}}
""")
    return home


def call(*arguments):
    return cli.main([str(a) for a in arguments])


def test_a_run_from_recipe_to_result(home, capsys):
    assert call("run", home / "recipe.yaml") == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "perplexity/perplexity" in out
    assert f'from_pretrained("{home}/out/model")' in out
    metrics = json.loads((home / "out" / "metrics.json").read_text())
    assert metrics["parameters"]["after"] < metrics["parameters"]["before"]
    assert metrics["before"]["perplexity/perplexity"] > 1
    assert metrics["after"]["perplexity/perplexity"] > 1
    assert metrics["peak_memory_bytes"] > 1e8
    assert metrics["seconds"]["distil"] > 0
    names = {p.name for p in (home / "out").iterdir()}
    assert {"recipe.yaml", "recipe.resolved.yaml", "plan.json", "events.jsonl", "layers", "model"} <= names
    assert (home / "out" / "recipe.yaml").read_text() == (home / "recipe.yaml").read_text()
    assert Recipe.load(home / "out" / "recipe.resolved.yaml") == Recipe.load(home / "recipe.yaml")
    # Once more: nothing is computed again, and the same table is shown.
    assert call("run", home / "recipe.yaml") == 0
    assert call("eval", home / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out.split("\n{", 1)[-1].join(["{", ""]))
    assert found["perplexity/perplexity"] == pytest.approx(metrics["after"]["perplexity/perplexity"], rel=1e-4)


def test_the_mistral_recipe_runs_offline_on_a_tiny_model(home, tmp_path):
    done = call(
        "run", REPOSITORY / "recipes/mistral7b_20.yaml", "--set", f"model.id={home}/model",
        "--set", f"calibration.dataset={home}/chat.jsonl", "--set", "calibration.sequence_length=16",
        "--set", "compress.min_rank=8", "--set", "compress.rank_step=4", "--set", f"run.out={tmp_path}/out",
    )  # fmt: skip
    assert done == 0
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_a_model_without_a_run_is_measured_by_overrides_alone(home, capsys):
    perplexity = f"evaluate.perplexity={{dataset: {home}/text.txt, sequence_length: 16, tokens: 64}}"
    options = ["--set", perplexity, "--set", "run.seed=3", "--device", "cpu", "--json"]
    assert call("eval", home / "model", *options) == 0
    assert json.loads(capsys.readouterr().out)["perplexity/perplexity"] > 1
    assert call("eval", home / "model", *options, "--set", "plugin=decoder") == 0
    for override, says in (
        ("compress.init=svd", "--set compress.init=svd: unknown key 'compress'"),
        ("evaluate.speed={repeat: 1}", "unknown key 'repeat'\n  Did you mean 'repeats'?"),
        ("plugin=mamba", "no plugin knows MistralForCausalLM"),
        ("plugin=decodr", "Did you mean 'decoder'?"),
    ):
        capsys.readouterr()
        assert call("eval", home / "model", *options, "--set", override) == 2
        assert says in capsys.readouterr().err
    assert call("eval", home / "model") == 2
    assert "there is nothing to measure" in capsys.readouterr().err


def test_plan_writes_nothing(home, tmp_path, capsys):
    assert call("plan", home / "recipe.yaml", "--set", f"run.out={tmp_path}/out") == 0
    shown = capsys.readouterr().out
    assert "self_attn.q_proj" in shown
    assert "estimated" in shown
    assert call("plan", home / "recipe.yaml", "--set", f"run.out={tmp_path}/out", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["before"] == sum(p.numel() for p in tiny("mistral").parameters())
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "unknown key": (["compress.reductoin=0.2"], r"unknown key 'reductoin'", "reduction"),
    "wrong type": (["compress.reduction=lots"], "compress.reduction=lots", "number"),
    "missing model": (["model.id=./nowhere"], "no directory './nowhere'", "Check the path"),
    "missing file": (["calibration.dataset=./nowhere.txt"], "nowhere.txt", "calibration.dataset"),
    "missing column": (["calibration.dataset={home}/chat.jsonl", "calibration.column=txt"], "txt", "conversations"),
    "no package": (["model.id=package:nothing_here"], "no package 'nothing_here'", "pip install"),
    "out of reach": (["compress.reduction=0.99"], "largest possible is 0.", "compress.reduction"),
    "unknown strategy": (["compress.strategy=botom"], "botom", "Did you mean 'bottom'?"),
    "unknown evaluator": (["evaluate.perplexty={{dataset: x}}"], "perplexty", "Did you mean 'perplexity'?"),
    "unknown option": (["evaluate.speed={{batchsize: 1}}"], "batchsize", "batch_size"),
    "no such device": (["run.device=quantum"], "quantum", "auto or cpu"),
    "hub out of reach": (["model.id=someone/some-model"], "someone/some-model", "model.id"),
    "data out of reach": (["calibration.dataset=someone/some-data"], "someone/some-data", "calibration.dataset"),
    "too little text": (["calibration.sequence_length=60", "calibration.fraction=0.01"], "tokens", "calibration"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error(home, tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    overrides, says, hint = MISTAKES[mistake]
    arguments = [part for o in overrides for part in ("--set", o.format(home=home))]
    if mistake == "too little text":
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "short.txt").write_text("the cat sat")
        arguments += ["--set", f"calibration.dataset={tmp_path}/in/short.txt"]
    before = sorted(tmp_path.rglob("*"))
    assert call("run", home / "recipe.yaml", "--set", f"run.out={tmp_path}/out", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert hint in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_a_model_that_no_plugin_knows(tmp_path, home, capsys):
    # Its attentions and its feed-forward layers stand in two lists, which it goes through side by side.
    XLMWithLMHeadModel(XLMConfig(vocab_size=20, emb_dim=8, n_layers=2, n_heads=2)).save_pretrained(tmp_path / "xlm")
    arguments = ["--set", f"model.id={tmp_path}/xlm", "--set", f"run.out={tmp_path}/out"]
    assert call("run", home / "recipe.yaml", *arguments) == 2
    error = capsys.readouterr().err
    assert "no plugin knows XLMWithLMHeadModel" in error
    assert "enumerate_layers" in error
    assert not (tmp_path / "out").exists()


def test_an_unfinished_download_is_named(tmp_path, home, capsys):
    model = tiny("llama-bias")
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    tokenizer().save_pretrained(tmp_path / "model")
    victim = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    victim.unlink()
    arguments = ["--set", f"model.id={tmp_path}/model", "--set", f"run.out={tmp_path}/out"]
    assert call("run", home / "recipe.yaml", *arguments) == 2
    assert victim.name in capsys.readouterr().err


def test_pickled_weights_are_refused(tmp_path, home, capsys):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    arguments = ["--set", f"model.id={tmp_path}/model", "--set", f"run.out={tmp_path}/out"]
    assert call("run", home / "recipe.yaml", *arguments) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err


def test_a_directory_with_other_things_is_not_touched(tmp_path, home, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    for extra in ([], ["--restart"]):
        assert call("run", home / "recipe.yaml", "--set", f"run.out={tmp_path}", *extra) == 2
        assert "not " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_debug_shows_the_traceback(home):
    from lillama import LillamaError

    with pytest.raises(LillamaError):
        call("validate", home / "nowhere.yaml", "--debug")


def test_export_needs_to_know_which_form(home, tmp_path, capsys):
    assert call("export", home, tmp_path / "x") == 2
    assert "--dense" in capsys.readouterr().err


def test_plugins_and_doctor_say_what_is_there(home, capsys):
    assert call("plugins") == 0
    assert "decoder" in capsys.readouterr().out
    assert call("doctor", home / "recipe.yaml", REPOSITORY / "recipes/mistral7b_20.yaml") == 0
    out = capsys.readouterr().out
    assert "bfloat16 products in hardware" in out
    assert "needs the hub for the model mistralai/Mistral-7B-v0.1" in out.replace("\n", " ").replace("  ", " ")


def test_doctor_finds_data_in_the_home_directory(home, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    recipe = (home / "recipe.yaml").read_text().replace(f"dataset: {home}/text.txt, seq", "dataset: ~/text.txt, seq")
    (home / "at-home.yaml").write_text(recipe)
    assert "dataset: ~/text.txt" in recipe
    assert call("doctor", home / "at-home.yaml") == 0
    assert capsys.readouterr().out.rstrip().endswith("ready")


def test_doctor_knows_what_the_distribution_requires(home, capsys, monkeypatch):
    from lillama.cli import doctor

    requirements = ["numpy>=1", "nothing-like-it>=2", "wandb>=0.19; extra == 'track'", "ruff; extra == 'dev'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(doctor, "_version", lambda name: "9.9" if name in ("numpy", "lillama") else None)
    assert call("doctor", home / "recipe.yaml") == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if line}
    assert lines["numpy"] == "9.9" and lines["nothing-like-it"] == "MISSING"
    assert lines["wandb"] == "not installed (optional: extra track)"
    assert lines["flash-attn"].startswith("not installed") and "ruff" not in lines


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_says_how_to_run_it(recipe, capsys):
    assert call("validate", recipe) == 0
    verb = "sweep" if recipe.parent.name == "paper" else "run"
    assert f"lillama {verb} recipes/{recipe.relative_to(REPOSITORY / 'recipes')}" in recipe.read_text()


@pytest.mark.parametrize("given", ["quickstart", "quickstart.yaml", "paper/ratios"])
def test_shipped_recipes_are_known_by_name_wherever_one_is(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("validate", given) == 0
    assert call("recipes", given) == 0
    shown = capsys.readouterr().out
    assert (REPOSITORY / "recipes" / given).with_suffix(".yaml").read_text() in shown


def test_a_file_of_ones_own_comes_before_a_shipped_recipe_of_that_name(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("axes: 3")
    assert call("validate", "quickstart.yaml") == 2
    assert "quickstart.yaml" in capsys.readouterr().err


def test_a_misspelt_name_of_a_recipe_is_told_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("run", "quikstart") == 2
    assert "Did you mean 'quickstart'?" in capsys.readouterr().err
    assert call("run", "nothing-like-it") == 2
    assert "`lillama recipes` lists" in capsys.readouterr().err


def test_recipes_are_listed_with_what_they_do(capsys):
    assert call("recipes") == 0
    out = " ".join(capsys.readouterr().out.split())
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        assert f"{path.relative_to(REPOSITORY / 'recipes').with_suffix('')} " in out
    assert "quickstart A real model, 20 % smaller" in out


PROBE = """
import sys, time
start = time.perf_counter()
from lillama.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = [name for name in ("torch", "transformers", "datasets", "pandas", "huggingface_hub") if name in sys.modules]
print(f"{code} {time.perf_counter() - start:.3f} {heavy}", file=sys.stderr)
"""


LIGHT = (
    ["--help"],
    ["validate", "recipes/quickstart.yaml"],
    ["validate", "quickstart"],
    ["recipes"],
    ["compress", "--help"],
    ["plugins"],
    ["plugins", "check", "--help"],
    ["plugins", "trace", "--help"],
    ["schema"],
)


@pytest.mark.parametrize("verb", LIGHT, ids=" ".join)
def test_light_verbs_do_not_import_torch(verb):
    done = subprocess.run([sys.executable, "-c", PROBE, *verb], capture_output=True, text=True, cwd=REPOSITORY)
    code, _, heavy = done.stderr.strip().splitlines()[-1].split(" ", 2)
    assert (code, heavy) == ("0", "[]")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lillama", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lillama {__version__}\n")


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(home, tmp_path):
    code = (
        "import sys, lillama.run.pipeline as p\n"
        "def stop(*a, **k): raise KeyboardInterrupt\n"
        "p.Run.execute = stop\n"
        "from lillama.cli.main import main\n"
        f"sys.exit(main(['run', {str(home / 'recipe.yaml')!r}, '--set', 'run.out={tmp_path}/o']))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130, time.monotonic() - start
    assert "the same command continues" in done.stderr


def test_the_reference_page_is_up_to_date_and_names_types_as_people_do(capsys):
    assert call("schema", "--markdown") == 0
    page = capsys.readouterr().out
    assert page == (REPOSITORY / "docs" / "recipe.md").read_text()
    types = {line.split("|")[2].strip() for line in page.splitlines() if line.startswith("| `")}
    assert not [one for one in types if "=" in one or "." in one.replace("`", "")]
