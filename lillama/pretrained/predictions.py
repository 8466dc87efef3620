"""How far a model's predictions are from labels and from another model's, a few rows of logits at a time.

A vocabulary is wide: the logits of 512 tokens are 100 MB in float32, and every step of a loss written with whole
tensors takes as much again, fresh from the system. In chunks of rows the same takes a few MB, and the gradient is made
on the way. Nor need the logits of all positions be there at once: a model is asked for those of a few at a time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lillama.errors import LillamaError
from lillama.pretrained.calls import Forward, play_by

CHUNK = 1 << 20  # logits at once: 4 MB, which a cache holds
LOGITS = 1 << 26  # that a model is asked for at once where it learns: 256 MB in float32
READ = 1 << 24  # and where they are only looked at
KEEP = "logits_to_keep"  # what transformers calls the positions that a model is asked for


def positions_at_once(model: Any, sequences: int, logits: int | None = None) -> int | None:
    """Of how many positions of so many sequences the logits are made at once; None: the model gives all or none.

    `logits` is how many there may be (None: LOGITS).
    """
    if model.base_model is model or KEEP not in inspect.signature(model.forward).parameters:
        return None
    return max(
        (logits or LOGITS) // (sequences * (getattr(model.config.get_text_config(), "vocab_size", None) or 1)), 1
    )


class _Ran(Exception):  # noqa: N818  not an error: it ends the forward pass where the body has run
    pass


class Body:
    """What stands below the head of a causal model, run once; then logits can be asked for, a few at a time.

    Norms, caps and scales that follow it stay the model's own. `output` is what it gave, hidden states first.
    """

    def __init__(self, model: Any, given: Mapping[str, Tensor], output: Any = None) -> None:
        """Run the body of `model`, which takes `logits_to_keep`, on the model's arguments.

        Where `output` is given, the body was run elsewhere, and is not again.
        """
        self.model, self.given = model, given
        self.output: Any = output
        if output is not None:
            return
        body: nn.Module = model.base_model
        before: Forward | None = body.__dict__.get("forward")  # a plugin or accelerate may have set one

        def run(*args: Any, **kwargs: Any) -> Any:
            with play_by(body, before):
                self.output = body(*args, **kwargs)
            raise _Ran

        with contextlib.suppress(_Ran), play_by(body, run):
            model(**given, use_cache=False)

    @property
    def hidden(self) -> Tensor:
        """What the head begins with [B, T, D]."""
        found: Tensor = self.output[0]
        return found

    def logits(self, keep: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The logits [B, N, V] of the positions `keep` [N], on the host; `hidden` takes the place of the body's own."""
        output = self.output if hidden is None else with_hidden(self.output, hidden)
        with play_by(self.model.base_model, lambda *_, **__: output):
            found: Tensor = self.model(**self.given, **{KEEP: keep}, use_cache=False).logits
        return found


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a body gave, with `hidden` in the place of what the head begins with."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**(dict(output) | {next(iter(output)): hidden}))


def parts_of(wanted: range, at_once: int | None) -> list[range]:
    """`wanted` in ranges of at most `at_once`."""
    step = len(wanted) if at_once is None else at_once
    return [wanted[start : start + step] for start in range(0, len(wanted), max(step, 1))]


def in_chunks(model: Any, given: Mapping[str, Tensor], wanted: range | None = None) -> Iterator[tuple[range, Tensor]]:
    """The logits [B, N, V] of the positions `wanted` (None: all), a few positions at a time, and which they are.

    `given` are the arguments of the model, `input_ids` [B, T] among them. The body runs once. A model that takes no
    `logits_to_keep` gives all at once.
    """
    ids = given["input_ids"]
    wanted = range(ids.shape[1]) if wanted is None else wanted
    parts = parts_of(wanted, positions_at_once(model, len(ids), READ))
    if len(parts) == 1:
        yield wanted, model(**given, use_cache=False).logits[:, wanted.start : wanted.stop]
        return
    body = Body(model, given)
    for part in parts:
        yield part, body.logits(torch.tensor(part))


Losses = Callable[[Tensor], Iterator[Tensor]]


def summed(losses: Losses, hidden: Tensor, learned: Sequence[Tensor]) -> Tensor:
    """The sum of `losses(hidden)`, each of which is run back to `hidden` and to what is `learned` before the next.

    So the logits of one are there at a time. The sum has a gradient like any other loss.
    """
    if not torch.is_grad_enabled():
        return sum(losses(hidden), torch.zeros((), device=hidden.device))
    found: Tensor = _Summed.apply(losses, hidden, *learned)
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Losses, hidden: Tensor, *parameters: Tensor) -> Tensor:
        leaf = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        wanted = (leaf, *parameters) if leaf.requires_grad else parameters
        gradients: list[Tensor | None] = [None] * len(wanted)
        total = torch.zeros((), device=hidden.device)
        with torch.enable_grad():
            for loss in losses(leaf):
                total += loss.detach()
                for number, more in enumerate(torch.autograd.grad(loss, wanted, allow_unused=True)):
                    held = gradients[number]
                    if more is not None:
                        gradients[number] = more if held is None else held.add_(more)
        ctx.gradients = gradients if leaf.requires_grad else [None, *gradients]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if gradient is None else gradient.mul_(scale) for gradient in gradients)


class Predicted(NamedTuple):
    """What a model predicts [B, N, V] or [B, V]: logits of classes, or features."""

    numbers: Tensor
    classes: bool


def backward_in_chunks(
    run: Callable[[Tensor | None], Predicted],
    leaf: Tensor,
    mask: Tensor | None,
    generator: torch.Generator,
    at_once: int | None,
) -> int:
    """Run the loss on tokens drawn from the predictions back to `leaf` [B, T, D]; returns how many were predicted.

    `run` gives the logits [B, N, V] of the positions it is given [N], or of all where that is None, from `leaf`.
    `mask` [B, T] says which count (None: all). `at_once`: see `positions_at_once`.
    """
    tokens = 0
    parts = parts_of(range(leaf.shape[1]), at_once)
    for part in parts:
        counts = None if mask is None else mask[:, part.start : part.stop].bool()
        if counts is not None and not counts.any():
            continue
        with torch.enable_grad():
            logits, classes = run(torch.tensor(part) if len(parts) > 1 else None)
            if counts is not None and counts.shape == logits.shape[:-1]:
                logits = logits[counts]
            elif logits.dim() > 2:
                logits = logits.flatten(0, -2)
            tokens += len(logits)
            if classes:
                loss = divergence(logits, draw_tokens(logits, generator))
            else:
                # As if features were drawn around what the model says, with a variance of one.
                noise = torch.randn(logits.shape, generator=generator, device=logits.device)
                loss = (logits.float() * noise).sum()
        del logits  # the gradient is there
        if not loss.requires_grad:
            raise LillamaError(
                "no gradient comes back from the model's predictions to what its last layer puts out, so nothing is "
                "known of how much they depend on a weight",
                where="compress.strategy",
                hint="Use compress.strategy: uniform and compress.init: whitened.",
            )
        loss.backward()
    return tokens


def divergence(logits: Tensor, labels: Tensor, teacher: Tensor | None = None, share: float | Tensor = 0.0) -> Tensor:
    """(1 - share) cross entropy + share KL(teacher || logits), summed over rows; float32.

    logits and `teacher` N x V, labels N, `share` one for all or N. Without `teacher` the second term is left out.
    Computed in float32, the gradient has the type of `logits`.
    """
    loss: Tensor = _Divergence.apply(logits, labels, teacher, share)
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor | None, share: float | Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=logits.device)
        shares = torch.as_tensor(share, dtype=torch.float32, device=logits.device).expand(len(logits))[:, None]
        alike = None if isinstance(share, Tensor) else share  # to look into a tensor would be to wait for the card
        labelled, taught = alike is None or alike < 1, alike is None or alike > 0
        step = max(CHUNK // logits.shape[1], 1)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            label, part = labels[rows, None], shares[rows]
            log_p = logits[rows].float().log_softmax(-1)
            if labelled:
                loss -= ((1 - part) * log_p.gather(1, label)).sum()
            wanted = None
            if teacher is not None and taught:
                log_wanted = teacher[rows].float().log_softmax(-1)
                wanted = log_wanted.exp()
                loss += (part[:, 0] * log_wanted.sub_(log_p).mul_(wanted).sum(-1)).sum()
            if gradient is not None:
                p = log_p.exp_()
                if wanted is None:
                    p.mul_(1 - part)
                else:
                    p.addcmul_(wanted, part, value=-1)
                p.scatter_add_(1, label, part - 1)
                gradient[rows] = p
        ctx.gradient = gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        # In place, and given away: as wide as the logits, it is the largest thing there is.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale.to(gradient.dtype)), None, None, None


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token per row of logits N x V, by its predicted chance; `generator` is of the device where the logits are.

    One number per row is drawn, and the first token taken whose chance, with those before it, exceeds it: multinomial
    draws one for every token of the vocabulary, which takes three times as long on a processor.
    """
    step = max(CHUNK // logits.shape[1], 1)
    found = []
    for part in logits.detach().split(step):
        up_to = part.float().softmax(-1).cumsum(-1)
        drawn = torch.rand(len(part), 1, generator=generator, device=part.device) * up_to[:, -1:]
        found.append(torch.searchsorted(up_to, drawn, right=True)[:, 0])
    return torch.cat(found).clamp_max(logits.shape[1] - 1)  # of logits that are not finite; what comes of it says so
