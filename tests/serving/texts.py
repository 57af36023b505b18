"""What a text is without a server: greedy, for one prompt alone."""

from saved_run import BYTES

from gdn2.generate import generate


def alone(model, prompt, tokens, **settings):
    """Text and tokens of `generate` for one prompt."""
    settings = {"temperature": 0} | settings
    ids = BYTES.encode(prompt) or [256] if isinstance(prompt, str) else prompt
    new = [token for (token,) in generate(model, [ids], tokens, stop_tokens=[256], **settings)]
    return BYTES.decode(new), new
