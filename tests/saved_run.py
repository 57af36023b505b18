"""A run's folder with one checkpoint, as far as reading it goes."""

from safetensors.torch import save_file

from gdn2.config import DataConfig, RunConfig, write_config
from gdn2.data import load_tokenizer

BYTES = load_tokenizer("bytes")


def save_run(folder, model, tokenizer=BYTES):
    config = RunConfig(model=model.config, data=DataConfig(seq_len=128))
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    save_file(dict(model.named_parameters()), checkpoint / "model.safetensors")
    write_config(checkpoint, config)
    tokenizer.save(checkpoint)
    return config
