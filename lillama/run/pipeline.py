"""A run from recipe to report: plan, measure, distil, write, measure again (DESIGN 3)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lillama import host
from lillama.base import device, disk, memory, ranks
from lillama.base.files import write_text
from lillama.base.progress import Progress
from lillama.base.rundir import MODEL, ORIGINAL, RESOLVED, RunDirectory
from lillama.checkpoint import write as checkpoint
from lillama.checkpoint.card import model_card
from lillama.checkpoint.load import load
from lillama.checkpoint.open import open_model
from lillama.checkpoint.seal import seal
from lillama.data import batches as data_batches
from lillama.data import text as calibration
from lillama.distill import kept
from lillama.distill.engine import distill
from lillama.distill.job import EMBEDDING, Job
from lillama.errors import LillamaError
from lillama.evaluate import in_turn, measure
from lillama.factorise import sensitivity
from lillama.factorise.neurons import remove_neurons
from lillama.finetune import train as finetune
from lillama.plan.budget import Measured
from lillama.plan.plan import Plan
from lillama.pretrained import sharing
from lillama.pretrained.learn import learn_forms
from lillama.pretrained.locate import read_tokenizer
from lillama.pretrained.walk import Walk
from lillama.recipe.schema import Finetune, Quantize, Recipe
from lillama.report import html, track
from lillama.report.record import IN_TURN, PLACES, STAGES
from lillama.run import curve, decided, fingerprint
from lillama.run.common import Common
from lillama.run.decided import PLAN
from lillama.run.estimate import check_disk
from lillama.run.forms import needed
from lillama.run.learn import learn
from lillama.run.owntext import OwnText, written_first
from lillama.run.prepare import Prepared, prepare, settle
from lillama.run.quantise import count, quantise, refuse_other


@dataclass
class Result:
    """What a run leaves behind: the last checkpoint's `path`, the `plan`, and `metrics` as in metrics.json."""

    path: Path
    plan: Plan
    metrics: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    auto_class: str = "AutoModelForCausalLM"  # of transformers, which opens the checkpoint


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
    recipe's calibration data. Raises LillamaError for anything the user can mend. Where a launcher started several
    processes they share the work (docs/many-devices.md); all return the same.
    """
    ranks.join()
    return Run(prepare(recipe), progress or Progress(), restart, batches).execute()


class Run:
    """One run in its directory."""

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress,
        restart: bool = False,
        batches: list[dict[str, Tensor]] | None = None,
        common: Common | None = None,
    ) -> None:
        """`common`: what it shares with other runs of the same original."""
        self.prepared, self.progress = prepared, progress
        self.recipe, self.source, self.plan = prepared.recipe, prepared.source, prepared.plan
        self.directory = RunDirectory(Path(self.recipe.run.out))
        self.restart = restart
        self.given = batches
        self.common = common
        self.identity: dict[str, Any] = {}  # its fingerprint, once its data is read
        self.details: dict[str, Any] = {}

    def execute(self) -> Result:
        """All phases, each skipped when its result is already there."""
        # The data is read first: a mistake in it must leave nothing behind.
        batches = self.batches()
        points = curve.of(self.recipe, self.tokenizer, batches)
        track.modules(self.recipe)
        if self.restart or not (self.directory.path / "metrics.json").is_file():
            ranks.by_first(lambda: check_disk(self.prepared))
        new, held = self.fingerprint(batches), ranks.by_first(self.directory.held)
        self.identity = new
        self.directory.open(new if held is None else fingerprint.like(new, held, Path(self.source.where)), self.restart)
        for remark in self.directory.remarks:
            self.progress.say(remark)
        with (
            contextlib.closing(self.directory),
            disk.explained(self.directory.path),
            track.tracked(self.recipe, self.directory, self.progress) if ranks.is_first() else contextlib.nullcontext(),
        ):
            return self.phases(batches, points)

    def phases(self, batches: list[dict[str, Tensor]], points: curve.Curve | None) -> Result:
        """What follows when the data is read and the directory open."""
        self._refuse_other()
        self.plan = kept.apply(decided.apply(self.plan, self.directory), self.directory)
        self.describe()
        # Before anything large is allocated.
        (memory.return_large_blocks if self.recipe.run.low_memory else memory.keep_large_blocks)()
        with self.progress.timed("fetch"):
            self.fetch()
        measured = {"before": self.measure("before")}
        if not self.directory.has(f"{MODEL}/config.json"):
            with memory.settled():
                self.distill(batches, points)
        self.directory.drop_work()
        measured["after"] = self.measure("after")
        if self.recipe.finetune is not None:
            self.finetune(self.recipe.finetune)
            memory.give_back()  # gradients, moments and the original: more than all that follows needs
            measured["finetuned"] = self.measure("finetuned")
        if self.recipe.quantize is not None:
            card = self.card(self.recipe.quantize)
            quantise(self.prepared, self.plan, self.directory, self.progress, batches=batches, card=card)
            memory.give_back()
            measured["quantized"] = self.measure("quantized")
        self.compare(measured)
        return self.finish(measured)

    def _refuse_other(self) -> None:
        """LillamaError where results are here that other settings made, before the recipe's are written down."""
        if self.recipe.finetune is not None:
            finetune.finished(self.directory, self.recipe.finetune)
        refuse_other(self.directory, self.recipe)

    def distill(self, batches: list[dict[str, Tensor]], points: curve.Curve | None) -> None:
        """Leave the checkpoint: measure what ranks depend on, distil, write."""
        host.get().prepare(self.prepared.plugin, self.source.model, self.recipe)
        device, progress = self.prepared.device, self.progress
        walk = Walk(self.source, self.plan.layers, self.plan.layers, device, progress)
        with progress.timed("learn forms"):
            learn_forms(needed(walk, self.plan, self.recipe), batches[0])
        if self.plan.provisional:
            self.choose(self.sensitivity(walk, batches))
        job = Job(self.recipe, self.plan, self.source, device, self.directory, progress, batches)
        if job.needs.fisher and not job.is_done:
            self.sensitivity(walk, batches)  # unless that was just done
        if not job.is_done:
            remove_neurons(walk, self.directory, job.plan.layers)
        distill(job, points if ranks.is_first() else None)
        self.plan = job.plan  # less what was kept dense
        self.directory.put_json(PLAN, self.plan.to_dict())
        with progress.timed("write"):
            self.write(job)

    def sensitivity(self, walk: Walk, batches: list[dict[str, Tensor]]) -> Measured:
        """What the predictions depend on, measured unless that was done before, here or by a run that shares it."""
        files = sensitivity.measured_files(walk, self.recipe)
        if self.common is not None and self.common.take(self.directory, self.identity, files):
            self.progress.say("sensitivity: as another run of these measured it")
            self.directory.event("taken_over", what="sensitivity")
        found = sensitivity.measure_spectra(walk, self.directory, batches, self.recipe)
        if self.common is not None:
            self.common.leave(self.directory, self.identity, files)
        return found

    def choose(self, measured: Measured) -> None:
        """Settle a provisional plan."""
        self.plan = settle(self.plan, self.recipe, self.prepared.layers, measured)
        decided.write(self.plan, self.directory)
        for weight, reason in self.plan.kept.items():
            self.directory.event("kept_dense", weight=weight, reason=reason)
        self.progress.say(self.plan.summary())

    def batches(self) -> list[dict[str, Tensor]]:
        """The calibration batches: those given, the plugin's own, or text through the model's tokenizer."""
        if self.given is not None:
            return self.given
        with self.progress.timed("read data"):
            stream = host.get().calibration_stream(self.prepared.plugin, self.source.model, self.recipe, self.progress)
            if stream is not None:
                batches = list(stream)
            else:
                blocks = calibration.token_blocks(self.tokenizer(), self.recipe.calibration, own=self.own_text)
                batches = data_batches.text_batches(blocks, self.recipe.distill.batch_size)
        if not batches:
            raise LillamaError("the calibration data gives no batch", where="calibration")
        return batches

    def own_text(self) -> Path:
        """The file of what the model wrote itself; it writes now unless that is there, before the directory is open."""
        own = OwnText(self.prepared, self.directory.path, self.progress, self.texts)
        return ranks.by_first(lambda: written_first(own, self.directory, self.restart))

    @property
    def texts(self) -> Path | None:
        """Where runs share what the original writes."""
        return self.common.texts if self.common else None

    def tokenizer(self) -> Any:
        """The original's tokenizer."""
        source = self.source
        return read_tokenizer(self.recipe.model, source.where, source.gguf, self.directory.path / ORIGINAL)

    def fingerprint(self, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """What must be the same for a stored layer to be of use: all that decides its numbers."""
        with self.progress.timed("read data"):
            return fingerprint.of(self.prepared, data_batches.fingerprint(batches))

    def describe(self) -> None:
        """Write what the run is about to do."""
        path = self.directory.path
        if ranks.is_first():
            write_text(path / "recipe.yaml", self.recipe.written or self.recipe.to_yaml())
            write_text(path / RESOLVED, self.recipe.to_yaml())
        self.directory.record("recipe.yaml", RESOLVED)
        self.directory.put_json(PLAN, self.plan.to_dict())
        self.directory.event(
            "start",
            plugin=str(self.prepared.plugin),
            machine=device.machine(),
            device=device.name(self.prepared.device.device),
            threads=torch.get_num_threads(),
            **({"processes": ranks.world()} if ranks.world() > 1 else {}),
        )

    def measure(self, when: str) -> dict[str, float]:
        """Run the evaluators on the model of a stage (STAGES), once."""
        name = f"evaluation.{when}.json"
        wanted, _ = in_turn.divided(self.recipe)
        if self.directory.has(name):
            held = self.directory.json(name)
            if held["evaluate"] == wanted:
                self.details[when] = held["details"]
                return dict(held["metrics"])
        if not wanted and "evaluate" not in self.prepared.plugin.hooks:
            return {}
        shared = self.common.before if self.common else None
        if when == "before" and shared and shared["evaluate"] == wanted:
            self.directory.put_json(name, shared)
            return self.measure(when)
        with self.progress.timed(f"evaluate {when}"):
            self.progress.say(f"evaluating the {STAGES[when]} model")
            asked = measure.Wanted.of(self.recipe, self.prepared.plugin, in_turn=False)
            model = self.opened(when)
            found = measure.measure(model, self.place(when), asked, self.prepared.device.device)
            del model
            memory.give_back()
        self.details[when] = found.details
        self.directory.put_json(name, {"evaluate": wanted, "metrics": found.metrics, "details": found.details})
        self.directory.event("measured", stage=when, **found.metrics)
        return found.metrics

    def place(self, when: str) -> Path:
        """Where the model of a stage is."""
        assert self.source.directory is not None
        return self.directory.path / PLACES[when] if when in PLACES else self.source.directory

    def opened(self, when: str) -> Any:
        """The model of a stage, on the CPU."""
        trust = self.recipe.model.trust_remote_code
        model = open_model(self.place(when), self.source.dtype, self.source.auto_class, trust)
        if when == "before":
            sharing.share(model, self.source.shared)
        return model

    def compare(self, measured: dict[str, dict[str, float]]) -> None:
        """Add to the metrics of every stage what is measured of all models in turn, once."""
        _, wanted = in_turn.divided(self.recipe)
        if not wanted:
            return
        held = self.directory.json(IN_TURN) if self.directory.has(IN_TURN) else {"evaluate": {}, "stages": {}}
        if held["evaluate"] != wanted or list(held["stages"]) != list(measured):
            with self.progress.timed("evaluate in turn"):
                self.progress.say("measuring the models in turn")
                places = {stage: self.place(stage) for stage in measured}
                where = (self.prepared.plugin, self.prepared.device.device)
                # By one process: others that worked meanwhile would slow it down.
                found = ranks.by_first(lambda: in_turn.measure_in_turn(places, self.opened, self.recipe, *where))
            held = {"evaluate": wanted, "stages": {stage: vars(one) for stage, one in found.items()}}
            self.directory.put_json(IN_TURN, held)
            for stage, one in found.items():
                self.directory.event("measured", stage=stage, **one.metrics)
        for stage, metrics in measured.items():
            metrics |= held["stages"][stage]["metrics"]
            self.details[stage] = self.details.get(stage, {}) | held["stages"][stage]["details"]

    def write(self, job: Job) -> None:
        """Write the checkpoint from the finished layers."""
        files = [job.file(layer) for layer in job.layers if self.plan.changes(layer)]

        def put() -> None:
            with self.directory.put_directory(MODEL, seal) as target:
                checkpoint.write(self.source, self.plan, self.directory, files, target, self.card())

        self.directory.by_first(put)

    def fetch(self) -> None:
        """Make the original's weights available: the first process brings them, the others find them."""
        self.directory.by_first(lambda: self.source.fetch(self.directory.path, self.directory.put_directory))
        if not ranks.is_first():
            self.source.fetch(self.directory.path)

    def finetune(self, section: Finetune) -> None:
        """Train the compressed model as a whole, unless that was done before; leaves `finetuned/`."""
        if finetune.finished(self.directory, section):
            # Of a process that was killed when all was done.
            ranks.by_first(lambda: finetune.clear(self.directory))
            return
        trust = self.recipe.model.trust_remote_code
        model = load(self.directory.path / MODEL, trust_remote_code=trust, dtype=torch.float32)
        host.get().prepare(self.prepared.plugin, model, self.recipe)
        learn(self.prepared, model, section, self.directory, self.progress, self.texts)
        # Of an earlier one that was removed.
        self.directory.forget(*filter(self.directory.has, ("evaluation.finetuned.json", IN_TURN)))
        self.directory.by_first(lambda: finetune.save(model, self.source.dtype, section, self.directory, self.card()))

    def card(self, bits: Quantize | None = None) -> str:
        """The model card beside the weights."""
        return model_card(self.recipe, self.plan, self.source.auto_class.__name__, bits)

    def finish(self, measured: dict[str, dict[str, float]]) -> Result:
        """Write metrics.json and hand the result over."""
        metrics = ranks.by_first(lambda: self._finish(measured))
        target = self.place(list(measured)[-1])
        return Result(target, self.plan, metrics, self.details, self.source.auto_class.__name__)

    def _finish(self, measured: dict[str, dict[str, float]]) -> dict[str, Any]:
        assert self.source.directory is not None
        places = {"before": self.source.directory, "after": self.directory.path / MODEL}
        places |= {"quantized": self.place("quantized")} if "quantized" in measured else {}
        previous = self.directory.json("metrics.json") if self.directory.has("metrics.json") else {}
        seconds = previous.get("seconds", {})
        for phase, value in self.progress.seconds.items():
            seconds[phase] = round(seconds.get(phase, 0.0) + value, 2)
        few_bits = {"quantized": count(self.directory, self.plan)} if "quantized" in measured else {}
        metrics = {
            "parameters": {"before": self.plan.before, "after": self.plan.after, **few_bits},
            "bytes": {stage: checkpoint.file_bytes(place) for stage, place in places.items()},
            **measured,
            **({"embedding": self.directory.json(EMBEDDING)} if self.directory.has(EMBEDDING) else {}),
            "seconds": seconds,
            "peak_memory_bytes": max(memory.peak_memory(), previous.get("peak_memory_bytes", 0)),
        }
        if self.prepared.device.device.type == "cuda":
            peak = memory.peak_device_memory(self.prepared.device.device)
            metrics["peak_device_memory_bytes"] = max(peak, previous.get("peak_device_memory_bytes", 0))
        self.directory.put_json("metrics.json", metrics)
        self.directory.event("done")
        html.write_or_say(self.directory.path, self.progress.say)
        return metrics
