"""How good and how fast is it? The face for others: an evaluator's `Context`, and `evaluate`; no torch here."""

from lillama.evaluate.context import Context, evaluate

__all__ = ["Context", "evaluate"]
