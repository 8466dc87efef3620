"""The original model as a listener: encoder states of clips, their language, and a transcript where there is none."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from lillama.base import cache, device
from lillama.data.audio import Clip
from lillama.pretrained.locate import explained, processor, resolve
from lillama_whisper.tokens import Tokens

if TYPE_CHECKING:
    from lillama import Recipe

TEMPERATURES = (0.7, 1.5)  # of sampled transcripts: from nearly what was said to words of all kinds
LOOP = 2.4  # times its compressed size
NEW_TOKENS = 224  # of a transcript: what 30 seconds of fast speech need, and where a loop is cut


@dataclass
class Heard:
    """What the teacher makes of some clips: encoder states [B, T, D], transcripts, language tokens."""

    states: Tensor
    texts: list[str]
    languages: list[int | None]

    def only(self, chosen: Sequence[int]) -> Heard:
        """The same of the chosen clips."""
        return Heard(self.states[list(chosen)], [self.texts[i] for i in chosen], [self.languages[i] for i in chosen])


def loops(text: str) -> bool:
    """Whether a transcript says the same over and over: zlib makes it less than 1/2.4 of its size.

    The threshold by which Whisper itself discards what it wrote (arXiv 2212.04356, 4.5). A student would learn to loop.
    """
    said = text.encode()
    return len(said) > LOOP * len(zlib.compress(said))


class Teacher:
    """The recipe's model, opened for listening. Transcripts are kept in the cache, by model and clip."""

    def __init__(self, recipe: Recipe) -> None:
        """Open the processor alone: data is checked before the weights are read, which `hear` does."""
        self.recipe = recipe
        self.where, _ = resolve(recipe.model)
        self.options = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
        with explained(f"the processor of '{recipe.model.id}'", "model.id"):
            from transformers import AutoProcessor

            local = Path(self.where)
            self.processor = (
                processor(local) if local.is_dir() else AutoProcessor.from_pretrained(self.where, **self.options)
            )
        self.rate: int = self.processor.feature_extractor.sampling_rate
        self.seconds: float = self.processor.feature_extractor.n_samples / self.rate
        self.device = device.choose(recipe.run.device, recipe.run.compute)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model itself, read on first use."""
        if self._model is None:
            from transformers import AutoModelForSpeechSeq2Seq

            with explained(f"the model '{self.recipe.model.id}'", "model.id"):
                self._model = AutoModelForSpeechSeq2Seq.from_pretrained(self.where, dtype=torch.float32, **self.options)
            self._model.to(self.device.device).eval().requires_grad_(False)
            self.tokens = Tokens(self._model, self.processor.tokenizer)
            self.identity = _identity(self._model, self.where)
            self.transcripts = Transcripts(self.identity)
        return self._model

    tokens: Tokens
    identity: str
    transcripts: Transcripts

    @torch.no_grad()
    def hear(self, clips: Sequence[Clip]) -> Heard:
        """Encode clips of at most `seconds`; transcribe those without text, unless that was done before."""
        model = self.model
        sound = [clip.samples for clip in clips]
        features = self.processor.feature_extractor(sound, sampling_rate=self.rate, return_tensors="pt").input_features
        with self.device.autocast():
            states = model.get_encoder()(features.to(self.device.device)).last_hidden_state
        languages = self._languages(clips, states)
        known = [clip.text if clip.text is not None else self.transcripts.get(clip.digest) for clip in clips]
        if missing := [i for i, text in enumerate(known) if text is None]:
            written = self._write(states[missing].float(), [languages[i] for i in missing], NEW_TOKENS)
            for i, text in zip(missing, self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)):
                known[i] = text.strip()
                self.transcripts.put(clips[i].digest, text.strip())
        return Heard(states.to("cpu", self.device.compute), [text or "" for text in known], languages)

    def _languages(self, clips: Sequence[Clip], states: Tensor) -> list[int | None]:
        if not self.tokens.multilingual:
            return [None] * len(clips)
        from transformers.modeling_outputs import BaseModelOutput

        found = self.model.detect_language(encoder_outputs=BaseModelOutput(last_hidden_state=states.float()))
        return [int(language) for language in found]

    @torch.no_grad()
    def sample(self, clips: Sequence[Clip], heard: Heard, number: int, count: int, most: int) -> list[list[int]]:
        """Token sequences drawn from the teacher's predictions: variant `number` of `count`, each hotter than the last.

        They are cut at `most` tokens: hot ones may never end.
        """
        coolest, hottest = TEMPERATURES
        temperature = coolest + (hottest - coolest) * number / max(count - 1, 1)
        names = [f"{clip.digest} at {temperature:.3f}" for clip in clips]
        known: list[list[int] | None] = [self.transcripts.get(name) for name in names]
        if missing := [i for i, ids in enumerate(known) if ids is None]:
            states = heard.states[missing].to(self.device.device).float()
            written = self._write(states, [heard.languages[i] for i in missing], most, temperature, names[missing[0]])
            for i, ids in zip(missing, written):
                known[i] = ids
                self.transcripts.put(names[i], ids)
        prefixes = [self.tokens.prefix(language) for language in heard.languages]
        return [[*prefix, *(ids or []), self.tokens.end] for prefix, ids in zip(prefixes, known)]

    def _write(
        self,
        states: Tensor,
        languages: Sequence[int | None],
        most: int,
        temperature: float | None = None,
        seed: str = "",
    ) -> list[list[int]]:
        """What the teacher writes for encoder states, each begun with its own prefix: tokens without prefix and end.

        Greedy, or drawn at a `temperature` by a `seed`; `most` at most. Not `generate`: it runs the encoder again, or
        takes one language for all.
        """
        model, tokens = self.model, self.tokens
        ids = torch.tensor([tokens.prefix(language) for language in languages], device=states.device)
        prefix = ids.shape[1]
        forbidden = model.generation_config.suppress_tokens or []
        at_first = [*forbidden, *(model.generation_config.begin_suppress_tokens or [])]
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        digest = hashlib.sha256(seed.encode()).digest()
        generator = torch.Generator(ids.device).manual_seed(int.from_bytes(digest[:7], "big"))
        past, new = None, ids
        # No autocast: for one token at a time, casting the weights takes longer than using them.
        while not done.all() and ids.shape[1] < min(tokens.most - 1, prefix + most):
            out = model(encoder_outputs=(states,), decoder_input_ids=new, past_key_values=past, use_cache=True)
            logits = out.logits[:, -1]
            logits[:, at_first if past is None else forbidden] = -torch.inf
            past = out.past_key_values
            if temperature is None:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            new = new.masked_fill(done[:, None], tokens.end)
            ids = torch.cat([ids, new], 1)
            done |= new[:, 0] == tokens.end
        return [list(itertools.takewhile(lambda token: token != tokens.end, row)) for row in ids[:, prefix:].tolist()]

    def keeper(self, clips: int) -> Callable[[Tensor], Tensor]:
        """What holds the states of about `clips` clips: memory, or files mapped into it where they would fill it."""
        config = self.model.config
        size = config.max_source_positions * config.d_model * torch.empty((), dtype=self.device.compute).element_size()
        return _mapped if clips * size > psutil.virtual_memory().available // 4 else lambda states: states


def _mapped(states: Tensor) -> Tensor:
    """A copy in a file that is mapped into memory and has no name any more: it goes with the tensor."""
    import tempfile

    with tempfile.NamedTemporaryFile(dir=cache.directory("states"), delete=False) as file:
        name = file.name
    copy = torch.from_file(name, shared=True, size=states.numel(), dtype=states.dtype).view(states.shape)
    copy.copy_(states)
    with contextlib.suppress(OSError):  # a system that does not remove open files keeps it
        Path(name).unlink()
    return copy


def _identity(model: Any, where: str) -> str:
    """16 hex digits that change with the model: of a hub model its commit, of a directory its weight files."""
    commit = getattr(model.config, "_commit_hash", None)
    files = sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([where, commit, stamps]).encode()).hexdigest()[:16]


class Transcripts:
    """What one teacher wrote, a line of JSON each, so that a stopped run loses none."""

    def __init__(self, identity: str) -> None:
        self.path = cache.directory("transcripts") / f"{identity}.jsonl"
        self._said: dict[str, Any] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):  # the last line of a run that was killed
                entry = json.loads(line)
                self._said[entry["clip"]] = entry["said"]

    def get(self, name: str) -> Any | None:
        """The transcript (or the sampled tokens) kept under `name`."""
        return self._said.get(name)

    def put(self, name: str, said: Any) -> None:
        """Keep a transcript, or sampled tokens."""
        self._said[name] = said
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"clip": name, "said": said}, ensure_ascii=False) + "\n")
