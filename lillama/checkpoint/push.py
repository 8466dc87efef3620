"""`lillama push`: a checkpoint on the hub, with what its run measured as metadata of its model card."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lillama.base.rundir import FINETUNED, MODEL, QUANTIZED, RESOLVED, last_checkpoint
from lillama.checkpoint import seal
from lillama.checkpoint.load import check_whole
from lillama.checkpoint.standalone import KEY, export_standalone
from lillama.errors import LillamaError

CARD = "README.md"
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
# The folders of a run -> what metrics.json calls them.
STAGES = {MODEL: "after", FINETUNED: "finetuned", QUANTIZED: "quantized"}


def push(path: Path, repo_id: str, *, private: bool = False, standalone: bool = False, trust: bool = False) -> str:
    """Upload a checkpoint, or a run's last one, to the model repository `repo_id` of the hub; returns its address.

    `standalone` uploads it as `lillama export --standalone` writes it; `trust` allows code that came with the model to
    run, which that may need. The repository is made where there is none, `private` if wished. Nothing in `path`
    changes. Raises LillamaError where there is no checkpoint, no token, no network, or the hub refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LillamaError(f"this is no name of a repository: {error}", where=repo_id, hint="USER/NAME") from error
    path = _checkpoint(path)
    check_whole(path, trust)
    _check_links(path)
    if get_token() is None:
        raise LillamaError("there is no token for the hub", where=f"push {repo_id}", hint=LOGIN)
    with tempfile.TemporaryDirectory(prefix="lillama-push-") as place:
        staged = Path(place) / "checkpoint"
        if standalone:
            export_standalone(path, staged, trust_remote_code=trust)
        else:
            _link(path, staged)
        (staged / CARD).write_text(_card(path, staged, repo_id), encoding="utf-8")
        seal.seal(staged)
        return _upload(staged, repo_id, private)


def _checkpoint(path: Path) -> Path:
    """The last checkpoint of a run directory; any other path as it is."""
    found = None if (path / "config.json").is_file() else last_checkpoint(path)
    return found or path


def _check_links(path: Path) -> None:
    """LillamaError for a link out of the directory: a checkpoint may be anybody's, and must not name your files."""
    for file in path.iterdir():
        if file.is_symlink() and not file.resolve().is_relative_to(path.resolve()):
            raise LillamaError("a link leads out of the directory", where=str(file), hint="Put the file itself there.")


def _link(path: Path, staged: Path) -> None:
    """The files of a checkpoint in another directory, without their bytes where the system knows links."""
    staged.mkdir()
    for file in path.iterdir():
        if not file.is_file() or file.name.startswith(".") or file.name in (CARD, seal.NAME):
            continue
        try:
            (staged / file.name).symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, staged / file.name)


def _upload(staged: Path, repo_id: str, private: bool) -> str:
    api = HfApi()
    try:
        found = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=found.repo_id, folder_path=staged, commit_message="Upload a model compressed by lillama"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0]
        hint = LOGIN if status in (401, 403) else None
        raise LillamaError(f"the hub refuses ({status}): {said}", where=f"push {repo_id}", hint=hint) from error
    except Exception as error:  # whatever stands between here and the hub
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LillamaError(
            f"the hub cannot be reached: {reason}",
            where=f"push {repo_id}",
            hint="Is there a network? HF_HUB_OFFLINE must not be set, and HF_ENDPOINT names another hub.",
        ) from error
    return str(found)


def _card(path: Path, staged: Path, repo_id: str) -> str:
    """The model card with the measured metrics, as metadata and as a table."""
    held = staged / CARD if (staged / CARD).is_file() else path / CARD
    name = repo_id.rpartition("/")[2]
    text = held.read_text(encoding="utf-8") if held.is_file() else f"---\n{{}}\n---\n\n# {name}\n"
    card = ModelCard(text.replace("PATH_OR_ID", repo_id))
    data = cast(ModelCardData, card.data)
    before, after, evaluators = _measured(path)
    results = [_result(key, value, evaluators) for key, value in after.items()]
    if results:
        data.model_name, data.eval_results = name, results
        card.text = f"{card.text.rstrip()}\n\n{_table(before, after)}"
    config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
    if KEY in config:
        data.tags = [*(data.tags or []), "custom_code"]
    return str(card)


def _measured(path: Path) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """What the run around a checkpoint measured of the original and of it, and the recipe's evaluators."""
    stage = STAGES.get(path.resolve().name)
    try:
        metrics = json.loads((path.resolve().parent / "metrics.json").read_text(encoding="utf-8"))
        before, after = ({k: v for k, v in (metrics.get(s) or {}).items() if _said(k, v)} for s in ("before", stage))
    except (OSError, ValueError, AttributeError):  # no run around it, or one that did not end
        return {}, {}, {}
    return before, after, _evaluators(path.resolve().parent / RESOLVED)


def _said(key: Any, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(key, str) and number and not key.endswith("_stderr")


def _evaluators(resolved: Path) -> dict[str, Any]:
    from lillama.recipe.schema import Recipe

    try:
        found = Recipe.load(resolved).evaluate
    except LillamaError:  # of a plugin that is not here, say: names of data sets are a courtesy
        return {}
    return {name.rpartition("/")[2]: options for name, options in found.items()}


def _result(key: str, value: float, evaluators: Mapping[str, Any]) -> EvalResult:
    """A metric in the form of the hub."""
    label, _, metric = key.rpartition("/")
    options = evaluators.get(label) or {}
    data = str(options.get("dataset") or label or "lillama")
    speech = metric in ("wer", "cer")
    return EvalResult(
        task_type="automatic-speech-recognition" if speech else "text-generation",
        dataset_type=data,
        dataset_name=data,
        dataset_config=options.get("config"),
        dataset_split=options.get("split"),
        metric_type=metric,
        metric_name=key,
        metric_value=value,
    )


def _table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows = [
        f"| {key} | {f'{before[key]:,.4g}' if key in before else ''} | {value:,.4g} |" for key, value in after.items()
    ]
    return "\n".join(["Measured by its run:", "", "| metric | original | this model |", "|---|---|---|", *rows, ""])
