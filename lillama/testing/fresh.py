"""A fresh process that knows nothing but `import lillama`, started early and asked later: importing takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

from torch import Tensor

_CODE = """
import json, sys
import lillama, torch, transformers
from safetensors.torch import load_file, save_file
for line in sys.stdin:
    directory, inputs, outputs, auto = json.loads(line)
    model = getattr(transformers, auto).from_pretrained(directory, dtype="float32").eval()
    with torch.no_grad():
        # Copies: what a file holds begins anywhere, and products of it may differ in the last bit.
        out = model(**{name: tensor.clone() for name, tensor in load_file(inputs).items()})
    first = next((out[k] for k in ("logits", "last_hidden_state") if k in out), out[0])
    parameters = torch.tensor(sum(p.numel() for p in model.parameters()))
    save_file({"first": first.detach().contiguous(), "parameters": parameters}, outputs)
    print("done", flush=True)
"""


class Fresh:
    """The process; `directory` takes what goes to it and what comes back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[str] | None = None
        self._said: IO[str] | None = None
        self._asked = 0

    def __enter__(self) -> Fresh:
        self._said = (self.directory / "fresh.txt").open("w+")
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", _CODE]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        if self._said is not None:
            self._said.close()

    def run(self, checkpoint: Path, inputs: dict[str, Tensor], auto_class: str) -> tuple[Tensor, int]:
        """The first output of the model in `checkpoint` on `inputs`, and how many parameters it has there.

        Raises AssertionError with the process's own words where it fails.
        """
        from safetensors.torch import load_file, save_file

        assert self.process is not None and self.process.stdin and self.process.stdout, "enter it first"
        self._asked += 1
        given, out = (self.directory / f"fresh-{self._asked}-{what}.safetensors" for what in ("in", "out"))
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        try:
            self.process.stdin.write(json.dumps([str(checkpoint), str(given), str(out), auto_class]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died while it imported: what it said is below
        if self.process.stdout.readline().strip() != "done":
            self.process.wait()
            said = (self.directory / "fresh.txt").read_text().strip().splitlines()
            raise AssertionError(f"a fresh process cannot load it: {said[-1] if said else 'it was killed'}")
        found = load_file(out)
        return found["first"], int(found["parameters"])
