"""Which tasks lm-eval is asked for, and on which data: the hub's, or files of the user's.

A task on files is lm-eval's own task with other data: a YAML that includes the task's own (local_task.yaml.jinja).
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError, did_you_mean

Files = dict[str, list[str]]  # split -> paths or addresses


@dataclass(frozen=True)
class Known:
    """What lm-eval's index would say of a task: its YAML below lm_eval/tasks, its metric, and its rows."""

    yaml: str
    metric: str
    rows: str
    files: Mapping[str, str] = field(default_factory=dict)  # where the hub's version cannot be read


LOGIQA = "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/master"
# The paper's tasks and the metric it gives for each (its Table 17; those of the authors' evaluation script).
PAPER = {
    "truthfulqa_mc2": Known("truthfulqa/truthfulqa_mc2.yaml", "acc", "truthfulqa"),
    "social_iqa": Known("siqa/siqa.yaml", "acc", "social_iqa"),
    # On the hub LogiQA is a script, which datasets no longer runs.
    "logiqa": Known("logiqa/logiqa.yaml", "acc_norm", "logiqa", {"test": f"{LOGIQA}/Test.txt"}),
    "winogrande": Known("winogrande/default.yaml", "acc", "winogrande"),
    "arc_easy": Known("arc/arc_easy.yaml", "acc_norm", "arc"),
    "arc_challenge": Known("arc/arc_challenge.yaml", "acc_norm", "arc"),
    "boolq": Known("super_glue/boolq/default.yaml", "acc", "boolq"),
    "piqa": Known("piqa/piqa.yaml", "acc_norm", "piqa"),
    "openbookqa": Known("openbookqa/openbookqa.yaml", "acc_norm", "openbookqa"),
}
GROUPS = {"paper": tuple(PAPER)}
# Rows of further tasks that local files may hold in another shape than the hub.
ROWS = {"afrimmlu_*": "afrimmlu"}
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def main_metric(task: str, metrics: Sequence[str]) -> str:
    """The metric that stands for a task in averages."""
    if task in PAPER:
        return PAPER[task].metric
    return next((name for name in ("acc_norm", "acc") if name in metrics), metrics[0])


class Library:
    """lm-eval's tasks, some of them on files of the user's."""

    def __init__(self, place: Path, include: str | None, files: Any, where: str) -> None:
        self.place, self.include, self.where = place, include, where
        self.given = files
        self.data: dict[str, Files] = {}  # of the tasks that do not read the hub
        if include and not Path(include).is_dir():
            raise LillamaError(f"there is no folder '{include}'", where=f"{where}.include", hint="Check the path.")

    def load(self, patterns: Sequence[str]) -> list[Any]:
        """Task and group objects with their data read; LillamaError names the task that cannot be."""
        names = list(dict.fromkeys(name for pattern in patterns for name in self._names(pattern)))
        specs = {name: self._spec(name) for name in names}
        self._unused(names)
        whole = any(spec == name for name, spec in specs.items())
        manager = _manager(self.include) if whole else paths_only()
        return [self._built(manager, name, spec) for name, spec in specs.items()]

    def _names(self, pattern: str) -> Sequence[str]:
        if pattern in GROUPS:
            return GROUPS[pattern]
        if pattern in PAPER and not self.include:
            return [pattern]
        index = _manager(self.include).task_index
        entry = index.get(pattern)
        if entry is not None and entry.kind.name == "TAG":
            return sorted(entry.tags)
        found = [pattern] if entry is not None else sorted(fnmatch.filter(index, pattern))
        if not found:
            raise LillamaError(
                f"lm-eval {version()} has no task '{pattern}'",
                where=f"{self.where}.tasks",
                hint=did_you_mean(pattern, [*GROUPS, *index]),
            )
        return found

    def _spec(self, name: str) -> str:
        """What lm-eval is asked for: a name, or the YAML of a local variant written for it."""
        known = PAPER.get(name) if not self.include else None
        files = self._files(name) or (_split_of(dict(known.files)) if known and known.files else None)
        if files is None:
            return str(_tasks_folder() / known.yaml) if known else name
        own = _tasks_folder() / known.yaml if known else _manager(self.include).task_index[name].yaml_path
        if own is None:
            raise LillamaError(f"'{name}' is a group: name its tasks in files", where=f"{self.where}.files")
        self.data[name] = files
        path = self.place / f"{name}.yaml"
        path.write_text(local_yaml(name, own, files, self.place, self.where), encoding="utf-8")
        return str(path)

    def _files(self, name: str) -> Files | None:
        if self.given is None:
            return None
        if isinstance(self.given, str):
            return _in_folder(Path(self.given).expanduser(), name, self.where)
        # The task's own name before globs that match it.
        for key in sorted(self.given, key=lambda key: key != name):
            if fnmatch.fnmatchcase(name, key):
                value = self.given[key]
                return _split_of(value if isinstance(value, Mapping) else {"test": value}, f"{self.where}.files.{key}")
        return None

    def _unused(self, names: Sequence[str]) -> None:
        if isinstance(self.given, Mapping):
            for key in self.given:
                if not fnmatch.filter(names, key):
                    raise LillamaError(
                        f"no task is called '{key}'", where=f"{self.where}.files", hint=did_you_mean(key, names)
                    )

    def _built(self, manager: Any, name: str, spec: str) -> Any:
        try:
            loaded = manager.load([spec])
        except LillamaError as error:
            error.where = error.where or f"{self.where}.files: {name}"
            raise
        except Exception as error:  # whatever datasets, the hub or a task's own code raises
            lines = str(error).strip().splitlines()
            local = name in self.data
            raise LillamaError(
                f"the data of '{name}' cannot be read: {lines[0] if lines else type(error).__name__}",
                where=f"{self.where}.files" if local else f"{self.where}.tasks",
                hint="Check the file." if local else f"Give it as a file: {self.where}.files: {{{name}: FILE}}.",
            ) from error
        return loaded.get("groups", {}).get(name) or next(iter(loaded["tasks"].values()))


def local_yaml(task: str, own: Path, files: Files, cache: Path, where: str) -> str:
    """The YAML of `task` on `files`, which includes the task's own YAML; works under lm-eval's command line too.

    Evaluated is the split test, else validation, else the only one; examples in prompts come from train.
    """
    from jinja2 import Template

    suffixes = {Path(one.removesuffix(".gz")).suffix.lower() for paths in files.values() for one in paths}
    suffix = suffixes.pop()
    if suffixes or suffix not in BUILDERS:
        raise LillamaError(
            f"the files of '{task}' are of no kind that can be read, or of several",
            where=f"{where}.files",
            hint=f"Known: {', '.join(BUILDERS)}.",
        )
    arguments: dict[str, Any] = {"data_files": files, "cache_dir": str(cache / "data")}
    if suffix == ".tsv":
        arguments["sep"] = "\t"
    if suffix == ".txt":
        arguments["sample_by"] = "paragraph"
    known = PAPER.get(task)
    rows = known.rows if known else next((r for glob_, r in ROWS.items() if fnmatch.fnmatchcase(task, glob_)), None)
    test = "test" if "test" in files else None
    validation = "validation" if "validation" in files else None
    template = Template((Path(__file__).parent / "local_task.yaml.jinja").read_text(), trim_blocks=True)
    return template.render(
        own=json.dumps(str(own)),
        task=task,
        builder=BUILDERS[suffix],
        arguments=json.dumps(arguments),
        train=json.dumps("train" if "train" in files else None),
        validation=json.dumps(validation),
        test=json.dumps(test),
        fewshot=json.dumps("train" if "train" in files else validation or test),
        rows=rows,
    )


_SPLITS = {"dev": "validation", "valid": "validation", "val": "validation", "eval": "validation"}


def _split_of(given: Mapping[str, Any], where: str | None = None) -> Files:
    """Files by split, absolute; an address stays as it is. Raises LillamaError where there is no such file."""
    found: Files = {}
    for split, value in given.items():
        split = _SPLITS.get(split, split)
        if split not in ("train", "validation", "test"):
            raise LillamaError(f"'{split}' is not a split", where=where, hint="Known: train, validation, test.")
        for one in value if isinstance(value, list) else [value]:
            path = Path(str(one)).expanduser()
            if "://" in str(one):
                found.setdefault(split, []).append(str(one))
            elif path.is_file():
                found.setdefault(split, []).append(glob.escape(str(path.resolve())))
            else:
                raise LillamaError(f"there is no file '{path}'", where=where, hint="Check the path.")
    if not {"test", "validation"} & found.keys():
        raise LillamaError("there is neither a split test nor validation", where=where)
    return found


def _in_folder(folder: Path, name: str, where: str) -> Files | None:
    """The files of a folder that are named after a task: TASK.jsonl, TASK.SPLIT.jsonl."""
    if not folder.is_dir():
        raise LillamaError(f"there is no folder '{folder}'", where=f"{where}.files", hint="Check the path.")
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        stem, _, split = path.name.removesuffix(".gz").rpartition(".")[0].partition(".")
        split = _SPLITS.get(split, split) or "test"
        if stem == name and path.is_file() and split in ("train", "validation", "test"):
            found.setdefault(split, []).append(str(path))
    return _split_of(found, f"{where}.files") if found else None


def version() -> str:
    """lm-eval's."""
    import importlib.metadata

    return importlib.metadata.version("lm_eval")


def _tasks_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@functools.cache
def _manager(include: str | None) -> Any:
    """lm-eval's index of all tasks: takes some ten seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def paths_only() -> Any:
    """A manager of tasks that are given by the paths of their YAML."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def described(files: Files | None) -> dict[str, Any] | None:
    """The files with their hashes."""

    def one(path: str) -> dict[str, str]:
        plain = Path(path.replace("[[]", "[").replace("[?]", "?").replace("[*]", "*"))
        if not plain.is_file():
            return {"file": path}
        return {"file": plain.name, "sha256": hashlib.sha256(plain.read_bytes()).hexdigest()[:16]}

    return None if files is None else {split: [one(path) for path in paths] for split, paths in files.items()}
