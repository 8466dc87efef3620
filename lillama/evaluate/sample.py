"""A sample of what a model writes, for people to read in the report."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lillama.evaluate.context import Context


def sample(
    model: Any,
    context: Context,
    *,
    prompt: Annotated[str, Field(min_length=1, description="Text to continue.")],
    new_tokens: Annotated[int, Field(ge=1, description="Tokens to write at most.")] = 48,
    chat: Annotated[
        bool, Field(description="Put the prompt as a user's turn, where there is a chat template.")
    ] = False,
) -> dict[str, float]:
    """No metrics; the greedy completion goes to `context.details` as "prompt" and "completion"."""
    import torch
    from transformers.utils import logging

    tokenizer = context.tokenizer
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    text = prompt
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # A template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"].to(context.device)
    training, level = model.training, logging.get_verbosity()
    model.eval()
    logging.set_verbosity_error()  # sampling settings of the checkpoint do not apply, and need no warning
    try:
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
    finally:
        logging.set_verbosity(level)
        model.train(training)
    completion = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    context.details.update(prompt=prompt, completion=completion)
    return {}
