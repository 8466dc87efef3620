"""Which class opens a model: the one that its configuration names."""

from __future__ import annotations

from typing import Any

# transformers' auto classes, the most usual first.
AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForAudioClassification",
    "AutoModel",
)


def find_class(config: Any) -> Any | None:
    """The auto class that makes the model which `config` names, or that model's class itself; None: the usual one."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    if name is None:
        return None
    for auto in (getattr(transformers, one) for one in AUTO):
        found = auto._model_mapping.get(type(config), None) if type(config) in auto._model_mapping else None
        for one in found if isinstance(found, tuple) else (found,):
            if one is not None and one.__name__ == name and one is (found[0] if isinstance(found, tuple) else found):
                return auto
    own = getattr(transformers, name, None)
    if own is None or not issubclass(type(config), own.config_class):
        return None
    return own
