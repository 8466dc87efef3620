"""Whether layers that only hand on what they get are called as the model calls them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lillama.errors import LillamaError
from lillama.pretrained.calls import Call, digest
from lillama.pretrained.forms import HINT, Record


def check_calls(calls: Sequence[Call], records: Sequence[Record]) -> None:
    """LillamaError where a captured call has an argument that the model's own call, in `records`, had not."""
    for call, record in zip(calls, records):
        taken = {argument for argument, _ in call.form.takes}
        for number, (given, leaf) in enumerate(zip(call.leaves, record.arguments, strict=True)):
            if number in taken or not isinstance(given, Tensor):
                continue
            if leaf.value != digest(given):
                raise LillamaError(
                    "this layer is given something that depends on what layers before it computed, besides what they "
                    "return: driven one by one they would not be the model",
                    where=record.layer.name,
                    hint=HINT,
                )
