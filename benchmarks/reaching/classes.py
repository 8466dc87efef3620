"""Which classes of transformers are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reaching import shrink, special

# Encoders beside those of the masked-language mapping: pictures, sounds, text towers.
ENCODERS = {
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification", "beit": "BeitForImageClassification",
    "dinov2": "Dinov2ForImageClassification", "swin": "SwinForImageClassification",
    "vivit": "VivitForVideoClassification",
    "wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC", "wavlm": "WavLMForCTC", "unispeech": "UniSpeechForCTC",
    "data2vec-audio": "Data2VecAudioForCTC", "wav2vec2-conformer": "Wav2Vec2ConformerForCTC",
    "wav2vec2-bert": "Wav2Vec2BertForCTC", "audio-spectrogram-transformer": "ASTForAudioClassification",
    "clip_text_model": "CLIPTextModel", "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "t5": "T5EncoderModel",
}  # fmt: skip
KINDS = ("clm", "s2s", "encoder")


@dataclass(frozen=True)
class Class:
    """One class: its kind (a mapping), the model type that leads to its configuration, its name."""

    kind: str
    model_type: str
    name: str

    def configuration(self) -> Any:
        """A small configuration for it."""
        return shrink.shrink(self.find()[1], **special.CLASSES.get(self.name, {}))

    def find(self) -> tuple[type[Any], type[Any]]:
        """The class of the model and that of its configuration."""
        import transformers
        from transformers import CONFIG_MAPPING

        model = getattr(transformers, self.name)
        # Some types of the mappings lead to a configuration of which the class takes a part.
        own = getattr(model, "config_class", None)
        listed = CONFIG_MAPPING[self.model_type]
        return model, own if own is not None and not issubclass(listed, own) else listed


def listed(kinds: tuple[str, ...] = KINDS) -> list[Class]:
    """Every class of the mappings of `kinds`, each once: of the first kind that has it."""
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "clm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "s2s": {**auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, **auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES},
        "encoder": {**auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, **ENCODERS},
    }
    found: dict[str, Class] = {}
    for kind in KINDS:
        for model_type, names in mappings[kind].items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in found or _names(model_type, name) > _names(found[name].model_type, name):
                    found[name] = Class(found[name].kind if name in found else kind, model_type, name)
    return [one for one in found.values() if one.kind in kinds]


def _names(model_type: str, name: str) -> bool:
    """Whether a class is called after a model type: several types may lead to one class."""
    return name.lower().startswith(model_type.replace("_", "").replace("-", ""))
