"""What came of a checkpoint, over all layers: nothing is served of which a part is missing.

vLLM itself does not look whether every weight of a quantised model was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.distributed import get_pp_group

from lillama.errors import LillamaError
from lillama.lowrank.rounded import read_name
from lillama.serving.receiver import AGAIN, Receiver
from lillama.serving.source import Source


class Loaded:
    """The receivers of all layers in one process, by the engine's names."""

    def __init__(self, modules: Mapping[str, Mapping[str, Any]], shared: Sequence[Sequence[str]]) -> None:
        self.modules, self.shared = modules, shared
        self.receivers: dict[str, Receiver] = {}
        self.takers: set[str] = set()  # the last parts of the names of weights that some layer takes
        self.source: Source | None = None
        self._checked = False

    def add(self, received: Receiver) -> None:
        """Keep the receiver of one more layer.

        What stands for its codes gets the type that they will have: the engine warns of every tensor of another.
        """
        self.receivers[received.name] = received
        last = received.name.rpartition(".")[2]
        names = {how["storage"] for name, how in self.modules.items() if name.rpartition(".")[2] == last}
        if any(parts is not None and parts[1] == 4 for parts in map(read_name, names)):
            received.expect(torch.uint8)

    def check_places(self) -> None:
        """LillamaError for a compressed weight that the engine's model keeps dense, whatever this method says."""
        if get_pp_group().world_size > 1:
            return  # others have the rest
        for name, how in self.modules.items():
            last = "experts" if how["kind"] == "experts" else name.rpartition(".")[2]
            if not how.get("tied") and last not in self.takers:
                raise LillamaError(
                    "it is compressed, and this model of vLLM takes a dense weight here alone",
                    where=name,
                    hint="vLLM's general model may do better: --model-impl transformers.",
                )

    def finish(self, received: Receiver) -> None:
        """Make of what a layer received what multiplies its inputs."""
        self._check_once()
        layer = received.layer
        if hasattr(layer, "products"):
            return
        if (original := self._same_as(received)) is not None:
            self.finish(original)
            layer.products = original.layer.products
            if received.tied_to is None and getattr(layer, "bias", None) is not None:
                layer.bias.data.copy_(original.layer.bias.data)
        else:
            layer.products = received.build()
        received.remove_placeholders()

    def _same_as(self, received: Receiver) -> Receiver | None:
        """The layer whose weights are those of one that got none: a file holds what is one but once."""
        if received.parts:
            return None
        last = received.name.rpartition(".")[2]
        for name, how in self.modules.items():  # an engine that found something of the head's may not have tied it
            if received.tied_to is None and how.get("tied") and name.rpartition(".")[2] == last:
                received.tied_to = self._embedding(how["tied"])
        if received.tied_to is not None:
            return received.tied_to
        for group in self.shared:
            for name in group[1:]:
                if received.name.startswith(f"{name}."):
                    return self.receivers.get(group[0] + received.name.removeprefix(name))
        return None

    def has_tied_head(self) -> bool:
        """Whether the table of tokens multiplies, too."""
        return any(how.get("tied") for how in self.modules.values())

    def _embedding(self, name: str) -> Receiver | None:
        last = name.rpartition(".")[2]
        found = [other for other in self.receivers.values() if other.name.rpartition(".")[2] == last]
        return found[0] if len(found) == 1 else None

    def _check_once(self) -> None:
        """LillamaError unless every compressed matrix that config.json speaks of reached a layer."""
        if self._checked:
            return
        self._checked = True
        if self.source is not None:
            self.source.check(downloaded=True)
        if get_pp_group().world_size > 1:
            return  # others have the rest; every layer still looks whether all of its own came
        expected = [name for name, how in self.modules.items() if not how.get("tied")]
        came = sum(received.low_rank for received in self.receivers.values())
        if came != len(expected):
            raise LillamaError(
                f"{came} compressed matrices reached a layer, of {len(expected)} in config.json",
                hint=AGAIN,
            )
