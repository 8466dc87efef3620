"""The sums that make the two factors of the Fisher information of one matrix (sensitivity.py)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lillama.base.device import factorising
from lillama.factorise.embedding import weighted_gram
from lillama.factorise.initialisers import TINY, through
from lillama.factorise.rounding import cuts, dense_cost

BLOCK = 192  # columns: a product of fewer is slower by the number


def add_symmetric(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x^T y to the upper triangle of `total` (n x n), of x and y (N x n) for which it is symmetric, in float32.

    `total` may be on the host while they are on a card. On the processor only blocks on and above the diagonal are
    made, little more than half of the work; what is below it then lacks something. `mirrored` makes the sum whole.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or len(total) < 2 * BLOCK:
            total += (x.T @ y).to(total.device)
            return
        for start in range(0, len(total), BLOCK):
            total[start : start + BLOCK, start:] += x[:, start : start + BLOCK].T @ y[:, start:]


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix, or the stack, of which `total` has the upper triangle."""
    upper = total.triu()
    return upper + upper.triu(1).mT


class Sums:
    """Of one matrix W (d_out x d_in): the sums of c x x^T and g g^T, on its smaller side, and of c.

    Where one of them is kept on the larger side, that on the smaller side is made of it in the end (`factors`).

    They are symmetric, and only their upper triangles count (`add_symmetric`). What batches add is float32, their sum
    float64: so the order makes no difference, nor how many processes share them. Directions in which nothing was seen
    are told apart by no more than rounding, and with them ranks.
    """

    def __init__(self, W: Tensor, embedding: bool = False, rounding: int = 0, both: bool = False) -> None:
        """`embedding`: W is the transpose of a table, and what is given for x are the vectors looked up.

        `both`: one is kept on the larger side, in `larger`, and not on the smaller: inputs of a wide W, gradients of a
        tall one.

        `rounding`: numbers to a scale, where what `dense_cost` asks for is kept of the larger side, too.
        """
        self.W, self.embedding, self.wide = W, embedding, W.shape[0] <= W.shape[1]
        self.smaller = min(W.shape)
        # What is kept on the larger side: the sum of inputs, or that of gradients.
        self.whole_inputs, self.whole_outputs = both and self.wide, both and not self.wide
        exact = torch.float64 if factorising(W.device) == W.device else torch.float32
        n = 0 if self.whole_inputs else self.smaller
        self.inputs = torch.zeros(n, n, device=W.device, dtype=exact)
        # Numbers on the device, which nobody waits for: sums of c and of |g|^2, inputs of which anything depends.
        self.counted, self.length, self.rows = torch.zeros(3, dtype=exact, device=W.device)
        self.calls = 0
        self.rounding = rounding
        self.lengths = torch.zeros(W.shape[0], device=W.device)  # G's diagonal, where G itself is not kept
        wider = max(W.shape) if both else 0
        self.larger = torch.zeros(wider, wider, device=W.device, dtype=exact)
        runs = cuts(W.shape[1]) if rounding and self.wide else []
        self.runs = [(run, torch.zeros(run.stop - run.start, run.stop - run.start, device=W.device)) for run in runs]

    @cached_property
    def outputs(self) -> Tensor:
        """The sum of g g^T, which takes no room before the first comes: of some batches only inputs are counted."""
        n = 0 if self.whole_outputs else self.smaller
        return self.larger.new_zeros(n, n)

    def add(self, x: Tensor, g: Tensor, Wx: Tensor | None = None) -> None:
        """Count inputs x (N x d_in) and the gradients g (N x d_out) of the loss at W x, given where it is known."""
        self.calls += 1
        length = g.float().square().sum(-1, keepdim=True)
        self.length += length.sum()
        counts = length / (length + length.mean().clamp_min(TINY))
        if self.rounding and not self.wide:
            self.lengths += g.float().square().sum(0)
        self._inputs(x, counts, Wx)
        if not (self.wide or self.whole_outputs):
            g = F.linear(g.to(self.W.dtype), self.W.T)
        g = g.float()
        add_symmetric(self.larger if self.whole_outputs else self.outputs, g, g)
        self.rows += (length > 0).sum()

    def _inputs(self, x: Tensor, counts: Tensor, Wx: Tensor | None = None) -> None:
        for run, gram in self.runs:
            some = x[:, run].float()
            add_symmetric(gram, some * counts, some)
        if self.wide and not (self.whole_inputs or self.embedding):
            x = F.linear(x.to(self.W.dtype), self.W) if Wx is None else Wx
        x = x.float()
        add_symmetric(self.larger if self.whole_inputs else self.inputs, x * counts, x)
        self.counted += counts.sum()

    def borrow_inputs(self, x: Tensor) -> None:
        """Where too few inputs were seen to tell all directions apart, add others, x, in the weight of what lacks."""
        lacking = self.smaller - int(self.rows)
        if lacking > 0:
            self._inputs(x, torch.full((len(x), 1), lacking / len(x), device=x.device))

    def count_every_token(self, floor: float) -> None:
        """Let every token of an embedding count for at least the share `floor` of the mean count."""
        table = self.W.T.to(factorising(self.W.device))
        gram = weighted_gram(table, table.new_ones(len(table))) * (floor * self.counted.item() / len(table))
        self.inputs += gram.to(self.inputs)

    def count_inputs(self, x: Tensor, Wx: Tensor | None = None) -> None:
        """Count inputs x (N x d_in) of which no gradients are known: each like one that the predictions depend on."""
        self._inputs(x, x.new_ones(len(x), 1, dtype=torch.float32), Wx)

    @property
    def of_inputs(self) -> list[Tensor]:
        """What is summed over inputs alone."""
        inputs = self.larger if self.whole_inputs else self.inputs
        return [inputs, self.counted, *(gram for _, gram in self.runs)]

    @property
    def matrices(self) -> list[Tensor]:
        """What is summed in matrices and vectors."""
        return [self.inputs, self.outputs, self.lengths, self.larger, *(gram for _, gram in self.runs)]

    @property
    def numbers(self) -> list[float]:
        """What is counted beside them."""
        return [self.counted.item(), self.length.item(), self.rows.item(), self.calls]

    @numbers.setter
    def numbers(self, numbers: list[float]) -> None:
        self.counted, self.length, self.rows = torch.tensor(numbers[:3], dtype=torch.float64).to(self.counted)
        self.calls = round(numbers[3])

    def factors(self, tokens: int, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(H, G) per token predicted, on the smaller side; `more` is added to G."""
        inputs = self._of_larger() if self.whole_inputs else mirrored(self.inputs)
        outputs = self._of_larger() if self.whole_outputs else mirrored(self.outputs)
        inputs, outputs = inputs / max(self.counted.item(), TINY), outputs / tokens
        return inputs.float(), (outputs if more is None else outputs + more).float()

    def _of_larger(self) -> Tensor:
        """The sum on the smaller side, in the precision of `larger`: W L W^T of a wide W, W^T L W of a tall one."""
        W = self.W if self.wide else self.W.T
        return mirrored(through(W.float(), self._mirrored, self.larger.dtype))

    @cached_property
    def _mirrored(self) -> Tensor:
        """`larger`, whole: once nothing is added any more."""
        return mirrored(self.larger)

    def larger_factor(self, tokens: int) -> Tensor:
        """The factor on the larger side, per token predicted: H of a wide W, G of a tall one."""
        return self._mirrored / (max(self.counted.item(), TINY) if self.wide else tokens)

    def cost(self, tokens: int) -> float:
        """What W would lose in 4 bits, in nats per token (rounding.py)."""
        place, counted = factorising(self.W.device), max(self.counted.item(), TINY)
        grams = [mirrored(gram) for _, gram in self.runs] or [mirrored(self.inputs).float()]
        outputs = self.outputs.diagonal().float() if self.wide else self.lengths
        inputs = [gram.to(place) / counted for gram in grams]
        return dense_cost(self.W.to(place), inputs, outputs.to(place) / tokens, self.rounding)
