"""What timing leaves behind, and which device it waits for."""

from __future__ import annotations

import mmap
import resource
from typing import Any

import pytest
import torch
from conftest import tiny

from lillama.base import memory
from lillama.data.audio import Clip
from lillama.evaluate import speech
from lillama.evaluate.context import Context
from lillama.evaluate.speed import speed, timed


def test_the_peak_of_a_process_outlives_the_measurement_of_a_model() -> None:
    """Measuring has the system forget the peak of the process: what came before must still count."""
    with mmap.mmap(-1, 300 << 20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speed(tiny(), Context(None, "cpu"), prompt_tokens=8, new_tokens=2, repeats=1)
    assert memory.peak_memory() >= before


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the second card."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    """Notes which device the functions of torch.cuda are asked about; its peak is 70 bytes, 50 once it was reset."""
    asked: dict[str, set[Any]] = {}
    peak = [70]

    def note(name: str, answer: Any) -> None:
        def called(device: Any = "the current one") -> Any:
            asked.setdefault(name, set()).add(device)
            return answer() if callable(answer) else answer

        monkeypatch.setattr(torch.cuda, name, called)

    note("synchronize", None)
    note("memory_allocated", 40)
    note("max_memory_allocated", lambda: peak[0])
    note("reset_peak_memory_stats", lambda: peak.__setitem__(0, 50))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(memory, "_forgotten", {})
    return asked


def test_timing_waits_for_the_prompts_own_device(card: dict[str, set[Any]]) -> None:
    class Model:
        def generate(self, prompt: Any, stopping_criteria: Any, max_new_tokens: int, **options: Any) -> None:
            for _ in range(max_new_tokens):
                stopping_criteria[0](torch.zeros(1, 1, dtype=torch.long), None)

    prompt = torch.zeros(1, 4, dtype=torch.long).as_subclass(Elsewhere)
    assert timed(Model(), prompt, 3).memory == 10
    second = torch.device("cuda:1")
    assert card["synchronize"] == card["reset_peak_memory_stats"] == card["memory_allocated"] == {second}
    assert memory.peak_device_memory(second) == 70, "what was before the reset counts"
    assert memory.peak_device_memory(torch.device("cuda:0")) == 70


def test_timing_speech_waits_for_the_evaluators_own_device(
    card: dict[str, set[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recogniser:
        config = None

        def generate(self, logits_processor: Any, max_new_tokens: int, **options: Any) -> None:
            for _ in range(max_new_tokens):
                logits_processor[0](None, torch.zeros(1, 2).as_subclass(Elsewhere))

    class Processor:
        class tokenizer:  # noqa: N801
            normalize = str.lower

        class feature_extractor:  # noqa: N801
            sampling_rate = 100

    def inputs(writer: Any, clips: list[Clip]) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(speech._Writer, "_inputs", inputs)
    writer = speech._Writer(Recogniser(), Context(Processor, "cuda:1"), None, 4)
    assert writer.speed(8, 2)["peak_memory_bytes"] == 50
    second = torch.device("cuda:1")
    assert card["synchronize"] == card["reset_peak_memory_stats"] == {second}
    assert memory.peak_device_memory(second) == 70
