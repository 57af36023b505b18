"""Models of ours and their twins in transformers."""

from small import MODELS, small_model

from gdn2.integrations.hf import Gdn2ForCausalLM

IDS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def exported(name="window", double=True, **changes):
    """One of ours in float64, where a padded batch's other order of sums cannot flip a near tie, and its twin."""
    model = small_model(**MODELS[name] | changes)
    model = model.double() if double else model
    return model, Gdn2ForCausalLM.from_language_model(model, **IDS)
