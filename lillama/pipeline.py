"""A run from recipe to report: plan, measure, distil, write, measure again (DESIGN 3)."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lillama
from lillama import calibration, checkpoint, device, factors, finetune, host
from lillama.contract import Layer
from lillama.distill import distill
from lillama.errors import LillamaError
from lillama.job import Job
from lillama.plan import Plan, choose_ranks
from lillama.progress import Progress
from lillama.recipe import Finetune, Recipe
from lillama.source import Source, processor
from lillama.store import RunDirectory, write_text

MODEL = "model"
# Settings of a run that change nothing in its result.
NOT_IN_THE_NUMBERS = {"out", "low_memory", "snapshot_seconds", "stream_memory", "stream_device_memory"}


@dataclass
class Result:
    """What a run leaves behind: the last checkpoint's `path`, the `plan`, and `metrics` as in metrics.json."""

    path: Path
    plan: Plan
    metrics: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    auto_class: str = "AutoModelForCausalLM"  # of transformers, which opens the checkpoint


@dataclass
class Prepared:
    """An opened model with its plan; nothing was written yet."""

    recipe: Recipe
    source: Source
    plugin: host.Plugin
    layers: list[Layer]
    plan: Plan
    device: device.Device


def prepare(recipe: Recipe, config: Any = None) -> Prepared:
    """Open the recipe's model on the meta device and plan its ranks.

    `config` is used in place of the model's own (planning for a model that is not at hand).
    """
    chosen = device.choose(recipe.run)
    hosts = host.get()
    source = Source(recipe, lambda found: hosts.auto_class(found, recipe), config, chosen.working)
    plugin, layers = hosts.layers(source.model, recipe)
    if not any(layer.weights for layer in layers):
        raise LillamaError(f"the plugin {plugin} offers no weights of this model", where="plugin")
    plan = choose_ranks(layers, source.parameters, recipe.compress)
    factors.check_storage((plan.weights[name] for name in plan.ranks), recipe.compress.storage)
    return Prepared(recipe, source, plugin, layers, plan, chosen)


def make_plan(recipe: Recipe, config: Any = None) -> Plan:
    """The plan of a recipe: every rank and exact parameter counts. Reads no weights, writes nothing."""
    return prepare(recipe, config).plan


def compress(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    restart: bool = False,
    batches: list[dict[str, Tensor]] | None = None,
) -> Result:
    """Run a recipe: leaves `run.out` with everything in it, the checkpoint under `model/`.

    A run that was stopped continues where it was; a finished one is returned as it is (evaluators that were added
    are run). `restart` discards what is there. `batches` (the model's forward arguments) take the place of the
    recipe's calibration data. Raises LillamaError for anything the user can mend.
    """
    return Run(prepare(recipe), progress or Progress(), restart, batches).execute()


class Run:
    """One run in its directory."""

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress,
        restart: bool = False,
        batches: list[dict[str, Tensor]] | None = None,
    ) -> None:
        self.prepared, self.progress = prepared, progress
        self.recipe, self.source, self.plan = prepared.recipe, prepared.source, prepared.plan
        self.directory = RunDirectory(Path(self.recipe.run.out))
        self.restart = restart
        self.given = batches
        self.details: dict[str, Any] = {}

    def execute(self) -> Result:
        """All phases, each skipped when its result is already there."""
        # The data is read first: a mistake in it must leave nothing behind.
        batches = self.batches()
        if self.restart:
            self.directory.discard()
        self.directory.open(self.fingerprint(batches))
        self.describe()
        with self.progress.timed("fetch"):
            self.source.fetch(self.directory.path)
        before = self.measure("before")
        target = self.directory.path / MODEL
        if not self.directory.has(f"{MODEL}/config.json"):
            host.get().prepare(self.prepared.plugin, self.source.model, self.recipe)
            job = Job(
                self.recipe,
                self.source,
                self.plan,
                self.prepared.device,
                self.directory,
                self.progress,
                batches,
            )
            distill(job)
            with self.progress.timed("write"):
                self.write(job, target)
        after = self.measure("after")
        tuned = None
        if self.recipe.finetune is not None:
            self.finetune(self.recipe.finetune)
            tuned = self.measure("finetuned")
        return self.finish(before, after, tuned)

    def batches(self) -> list[dict[str, Tensor]]:
        """The calibration batches: those given, the plugin's own, or text through the model's tokenizer."""
        if self.given is not None:
            return self.given
        with self.progress.timed("read data"):
            stream = host.get().calibration_stream(self.prepared.plugin, self.source.model, self.recipe, self.progress)
            if stream is not None:
                batches = list(stream)
            else:
                blocks = calibration.token_blocks(self.tokenizer(), self.recipe.calibration)
                batches = calibration.text_batches(blocks, self.recipe.distill.batch_size)
        if not batches:
            raise LillamaError("the calibration data gives no batch", where="calibration")
        return batches

    def tokenizer(self) -> Any:
        """The original's tokenizer."""
        from transformers import AutoTokenizer

        from lillama.source import explained

        options = {"gguf_file": self.source.gguf} if self.source.gguf else {}
        with explained(f"the tokenizer of '{self.recipe.model.id}'", "model.id"):
            unpacked = self.directory.path / "original"
            if self.source.gguf and unpacked.is_dir():
                return AutoTokenizer.from_pretrained(unpacked)
            return AutoTokenizer.from_pretrained(
                self.source.where,
                revision=self.recipe.model.revision,
                trust_remote_code=self.recipe.model.trust_remote_code,
                **options,
            )

    def fingerprint(self, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """What must be the same for a stored layer to be of use: all that decides its numbers."""
        import transformers

        recipe = self.recipe.model_dump(
            mode="json", exclude={"evaluate": True, "finetune": True, "run": NOT_IN_THE_NUMBERS}
        )
        return {
            "recipe": recipe,
            "data": calibration.fingerprint(batches),
            "model": self.source.identity(),
            "compute": str(self.prepared.device.compute).removeprefix("torch."),
            "lillama": lillama.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def describe(self) -> None:
        """Write what the run is about to do."""
        path = self.directory.path
        write_text(path / "recipe.yaml", self.recipe.written or self.recipe.to_yaml())
        write_text(path / "recipe.resolved.yaml", self.recipe.to_yaml())
        self.directory.record("recipe.yaml", "recipe.resolved.yaml")
        self.directory.put_json("plan.json", self.plan.to_dict())
        self.directory.event("start", plugin=str(self.prepared.plugin), threads=torch.get_num_threads())

    def measure(self, when: str) -> dict[str, float]:
        """Run the evaluators on the original ("before"), the compressed ("after") or the "finetuned" model, once."""
        from lillama import evaluate

        name = f"evaluation.{when}.json"
        wanted = self.recipe.model_dump(mode="json")["evaluate"]
        if self.directory.has(name):
            held = self.directory.json(name)
            if held["evaluate"] == wanted:
                self.details[when] = held["details"]
                return dict(held["metrics"])
        hooks = "evaluate" in self.prepared.plugin.hooks
        if not wanted and not hooks:
            return {}
        assert self.source.directory is not None
        places = {"after": self.directory.path / MODEL, "finetuned": self.directory.path / finetune.FINETUNED}
        place = places.get(when, self.source.directory)
        chosen = self.prepared.device.device
        with self.progress.timed(f"evaluate {when}"):
            kinds = {"before": "original", "after": "compressed", "finetuned": "fine-tuned"}
            self.progress.say(f"evaluating the {kinds[when]} model")
            if when == "before":
                model = self.source.auto_class.from_pretrained(place, dtype=self.source.dtype)
            else:
                model = checkpoint.load(place, dtype=self.source.dtype)
            model.to(chosen).eval()
            host.get().prepare(self.prepared.plugin, model, self.recipe)
            context = evaluate.Context(processor(place), str(chosen), self.recipe.run.seed)
            metrics = evaluate.evaluate(model, self.recipe, context)
            if hooks:
                metrics |= host.get().evaluate(self.prepared.plugin, model, self.recipe)
        del model
        gc.collect()
        self.details[when] = context.details
        self.directory.put_json(name, {"evaluate": wanted, "metrics": metrics, "details": context.details})
        return metrics

    def write(self, job: Job, target: Path) -> None:
        """Write the checkpoint from the finished layers."""
        import shutil

        if target.exists():  # a checkpoint that the manifest does not know was not finished
            shutil.rmtree(target)
        files = [job.file(layer) for layer in job.layers if self.plan.planned(layer)]
        checkpoint.write(self.source, self.plan, self.directory, files, target, self.card())
        self.directory.record(*(f"{MODEL}/{file.name}" for file in sorted(target.iterdir())))

    def finetune(self, section: Finetune) -> None:
        """Train the compressed model as a whole, unless that was done before; leaves `finetuned/`."""
        if finetune.finished(self.directory, section):
            return
        prepared, hosts = self.prepared, host.get()
        with self.progress.timed("read data"):
            examples = hosts.finetune_data(prepared.plugin, self.source.model, self.recipe, self.progress)
            if examples is None:
                if self.source.config.is_encoder_decoder:
                    raise LillamaError(
                        f"the plugin {prepared.plugin} provides no data to fine-tune this model on",
                        where="finetune",
                        hint="Its hook finetune_data would; finetune: null leaves fine-tuning out.",
                    )
                examples = finetune.text_examples(self.tokenizer(), self.recipe, section)
        compressed = self.directory.path / MODEL
        model = checkpoint.load(compressed, dtype=torch.float32)
        hosts.prepare(prepared.plugin, model, self.recipe)
        teacher = None
        if section.teacher > 0:
            teacher = self.source.auto_class.from_pretrained(self.source.directory, dtype=self.source.working)
        finetune.finetune(model, teacher, examples, section, prepared.device, self.directory, self.progress)
        finetune.save(model, self.source.dtype, compressed, self.directory, self.card())
        if self.directory.has("evaluation.finetuned.json"):  # of an earlier one that was removed
            self.directory.forget("evaluation.finetuned.json")

    def card(self) -> str:
        """The model card beside the weights."""
        recipe, plan = self.recipe, self.plan
        original = recipe.model.id
        base = "" if original.startswith(("package:", ".", "/")) else f"base_model: {original}\n"
        return (
            f"---\n{base}library_name: transformers\ntags: [lillama, low-rank]\n---\n\n"
            f"# {Path(original.removeprefix('package:')).name}, {plan.reduction:.0%} smaller\n\n"
            f"{plan.before:,} parameters became {plan.after:,} by low-rank feature distillation "
            f"(Lillama, arXiv 2412.16719): strategy {plan.strategy}, {plan.storage} storage, "
            f"{recipe.compress.init} init, loss {recipe.distill.loss}, {recipe.distill.schedule} schedule.\n\n"
            "```python\nimport lillama  # teaches transformers the format\n"
            f"from transformers import {self.source.auto_class.__name__}\n\n"
            f'model = {self.source.auto_class.__name__}.from_pretrained("PATH_OR_ID")\n```\n\n'
            f"The recipe:\n\n```yaml\n{recipe.to_yaml()}```\n"
        )

    def finish(self, before: dict[str, float], after: dict[str, float], tuned: dict[str, float] | None) -> Result:
        """Write metrics.json and hand the result over."""
        assert self.source.directory is not None
        target = self.directory.path / MODEL
        previous = self.directory.json("metrics.json") if self.directory.has("metrics.json") else {}
        seconds = previous.get("seconds", {})
        for phase, value in self.progress.seconds.items():
            seconds[phase] = round(seconds.get(phase, 0.0) + value, 2)
        metrics = {
            "parameters": {"before": self.plan.before, "after": self.plan.after},
            "bytes": {
                "before": checkpoint.file_bytes(self.source.directory),
                "after": checkpoint.file_bytes(target),
            },
            "before": before,
            "after": after,
            **({} if tuned is None else {"finetuned": tuned}),
            "seconds": seconds,
            "peak_memory_bytes": max(peak_memory(), previous.get("peak_memory_bytes", 0)),
        }
        if self.prepared.device.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.prepared.device.device)
            metrics["peak_device_memory_bytes"] = max(peak, previous.get("peak_device_memory_bytes", 0))
        self.directory.put_json("metrics.json", metrics)
        self.directory.event("done")
        target = target if tuned is None else self.directory.path / finetune.FINETUNED
        return Result(target, self.plan, metrics, self.details, self.source.auto_class.__name__)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import sys

    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import psutil

    return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]  # Windows only
