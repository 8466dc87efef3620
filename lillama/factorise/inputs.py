"""Calibration batches of which only what enters each weight is measured: they run forwards, and nothing runs back.

The factor H (sensitivity.py) has as many numbers as a weight has inputs squared, and rests on a sample: it needs more
tokens than G to be known, and they cost a third as much. What is summed here counts every input alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lillama.contract import Layer
from lillama.factorise.kfac import Listener
from lillama.plan.plan import factor_numbers, larger_numbers, observable
from lillama.pretrained.calls import Batch
from lillama.pretrained.streams import Shelf, Stream
from lillama.pretrained.walk import Walk


class MoreInputs:
    """The sums over inputs of every block, kept until the gradients come to it."""

    def __init__(
        self,
        walk: Walk,
        shelf: Shelf,
        batches: Sequence[Batch],
        entered: Stream,
        rounding: int = 0,
        neurons: bool = False,
    ) -> None:
        """`batches` are the last of those whose first input is in `entered`; `rounding`, `neurons` as Listener has."""
        self.walk, self.shelf, self.batches, self.rounding, self.neurons = walk, shelf, batches, rounding, neurons
        self.found: dict[int, Stream] = {}
        self.stream = shelf.new("0000-inputs")
        for index in range(len(entered) - len(batches), len(entered)):
            self.stream.append(entered[index])

    def run_through(self, module: nn.Module, position: int) -> None:
        """Let the batches pass the block at `position`, played by `module`, and sum what enters its weights."""
        if not self.batches:
            return
        walk, layer = self.walk, self.walk.layers[position]
        listener = Listener(layer, module, walk.device, rounding=self.rounding, inputs_alone=True, neurons=self.neurons)
        passed = self.shelf.new(f"{position + 1:04d}-inputs")
        with torch.no_grad(), walk.device.autocast():
            for batch, hidden in zip(self.batches, self.stream):
                listener.mask = batch.calls[position].mask
                passed.append(batch.calls[position](module, hidden))
        listener.stop()
        self.stream.drop()
        self.stream = passed
        if observable(layer):
            self.found[position] = self.shelf.new(f"{position:04d}-sums")
            for tensor in listener.of_inputs:
                self.found[position].append(tensor)

    def hand_over(self, position: int, listener: Listener) -> None:
        """Add what was found of the block at `position` to what `listener` sums."""
        stream = self.found.pop(position, None)
        if stream is not None:
            for own, more in zip(listener.of_inputs, stream):
                own += more
            stream.drop()

    def drop(self) -> None:
        """Forget the batches, which have passed every block."""
        self.stream.drop()


def kept_bytes(layers: Iterable[Layer], neurons: bool = False) -> int:
    """Bytes of the sums over inputs of all layers, which `MoreInputs` keeps; `neurons` as it has them."""
    layers = list(layers)
    return 8 * (factor_numbers(layers) + (larger_numbers(layers, entries=False) if neurons else 0))


def split(batches: Sequence[Batch], tokens: int) -> tuple[list[Batch], list[Batch]]:
    """The batches that begin within the first `tokens` tokens, and the rest."""
    return [one for one in batches if one.before < tokens], [one for one in batches if one.before >= tokens]
