"""Other libraries kept quiet: their bars and advice stay out of our output."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_imports() -> None:
    """Before anything is imported: transformers imports torchao, which tells of kernels that this machine lacks."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keep other libraries' bars and advice out of our output; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
