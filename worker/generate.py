"""Text from a checkpoint, with transformers' own sampling. Offline and quiet."""

from pathlib import Path
from typing import Any

import torch
import transformers

from protocol.errors import ConfigError
from worker.device import seeded
from worker.tasks.causal_lm import load_pretrained, quiet_transformers

_CPU = torch.device("cpu")


def generate(folder: Path, prompt: str, max_new_tokens: int = 100, temperature: float = 0.8, seed: int = 0) -> str:
    """The prompt and its continuation, up to the token that ends a text; the same for the same arguments.

    An empty prompt starts after an end of text. temperature 0 takes the likeliest token each time. A model with a
    limited number of positions gives fewer tokens and sees the end of a long prompt only. Raises ConfigError when the
    folder cannot be opened or an argument is out of bounds.
    """
    if max_new_tokens < 1 or not 0.0 <= temperature < float("inf"):
        raise ConfigError("generation needs at least one new token and a temperature of 0 or more")
    model: Any = load_pretrained(folder)
    with quiet_transformers(), torch.no_grad(), seeded(_CPU, seed):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{folder}: its tokenizer does not open: {' '.join(str(error).split())}") from error
        ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
        limit = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
        new_tokens = min(max_new_tokens, limit - 1)
        inputs = torch.tensor([ids[-(limit - new_tokens) :]])
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        )
        outputs = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, **sampling)
        continuation = outputs[0, inputs.shape[1] :].tolist()
        return str(tokenizer.decode([*ids, *continuation], skip_special_tokens=True))
