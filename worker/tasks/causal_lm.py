"""Next-token prediction with any causal language model of transformers.

Invariants: models are float32, built offline, and never run code that is not part of transformers; random weights
depend on the seed alone and leave torch's global generators as they were. A field of the config that its class does
not know is an error (transformers itself would silently keep it). Dropout is what the config says: 0 in llama-like
models, 0.1 by default in gpt2.

Auxiliary losses of mixture-of-experts models are not added.

Shape letters: B sequences, T tokens a sequence, V vocabulary.
"""

import contextlib
import difflib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM_NAMES

from protocol.errors import ConfigError, VerificationError
from protocol.run_spec import RunSpec
from protocol.signing import canonical_json
from worker.device import seeded
from worker.lean_torch import import_lean

import_lean()  # before the first model
_MAX_CONFIG_BYTES = 1 << 20
_LEGACY_ROPE_FIELDS = {"rope_theta", "rope_scaling"}  # still taken where there is `rope_parameters`
_SET_BY_THE_RUN = {"vocab_size", "dtype", "use_cache"}
_CPU = torch.device("cpu")


class CausalLM:
    """The task `causal_lm` (see worker.tasks.Task)."""

    def build_model(self, spec: RunSpec, vocabulary_size: int, seed: int) -> nn.Module:
        """The model of `spec.model`. With `initial_weights`, that folder's config and weights, and nothing else.

        Raises ConfigError in one line that names the field and, for a name that is not known, the nearest known one.
        """
        if spec.model.initial_weights is not None:
            return _load_initial(Path(spec.model.initial_weights).expanduser(), vocabulary_size)
        architecture = spec.model.architecture
        fields = _checked_fields(architecture, spec.model.config)
        try:
            config = transformers.AutoConfig.for_model(architecture, vocab_size=vocabulary_size, **fields)
            _raise_position_limit(config, spec.data.sequence_length)
            return _from_config(config, seed)
        except Exception as error:  # whatever a config's own checks and the model's constructor raise
            raise ConfigError(f"model.config: {architecture}: {_one_line(error)}") from error

    def build_from_config(self, config_json: bytes, seed: int) -> nn.Module:
        """The model of a config that came as a blob. Raises VerificationError when it is not a known one."""
        if len(config_json) > _MAX_CONFIG_BYTES:
            raise VerificationError(f"a model config of {len(config_json)} bytes; at most {_MAX_CONFIG_BYTES} are read")
        try:
            fields = json.loads(config_json)
            architecture = fields.pop("model_type")
            unknown = sorted(set(fields) - _known_fields(architecture))
            if unknown:
                raise ValueError(f"field `{unknown[0]}` is not known to transformers {transformers.__version__}")
            return _from_config(transformers.AutoConfig.for_model(architecture, **fields), seed)
        except Exception as error:  # as in build_model; these bytes come from elsewhere
            raise VerificationError(f"the run's model config: {_one_line(error)}; update transformers?") from error

    def config_json(self, model: nn.Module) -> bytes:
        """The model's config with all defaults written out, as they differ between versions of transformers."""
        config: Any = model.config
        known = _known_fields(config.model_type) - {"transformers_version", "architectures"}
        fields = {name: value for name, value in config.to_dict().items() if name in known}
        return canonical_json({**fields, "model_type": config.model_type})

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean cross entropy in nats over the B·T predicted tokens of rows (B, T + 1); a float32 scalar.

        No attention mask is given, so that attention runs as plain causal attention, its fastest form.
        """
        logits_btv: Tensor = model(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits_btv.float().flatten(0, 1), rows[:, 1:].flatten().long())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice away from the terminal inside the block; errors are raised anyway."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _from_config(config: Any, seed: int) -> nn.Module:
    config.use_cache = False
    with seeded(_CPU, seed), quiet_transformers():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def load_pretrained(folder: Path) -> nn.Module:
    """The model of a Hugging Face folder, float32 on the CPU; only safetensors, only this machine, none of its code.

    Raises ConfigError when it cannot be opened or lacks a parameter.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        with quiet_transformers():
            loaded: tuple[nn.Module, dict[str, Any]] = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{folder} does not open as a model: {_one_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise ConfigError(f"{folder} has no weights for `{missing[0]}` ({len(missing)} parameters are missing)")
    return model


def _load_initial(folder: Path, vocabulary_size: int) -> nn.Module:
    try:
        model = load_pretrained(folder)
    except ConfigError as error:
        raise ConfigError(f"model.initial_weights: {error}") from error
    config: Any = model.config
    if config.vocab_size < vocabulary_size:
        raise ConfigError(
            f"model.initial_weights: {folder} has a vocabulary of {config.vocab_size}, the run's tokenizer one of "
            f"{vocabulary_size}; set data.tokenizer to the model's own"
        )
    config.use_cache = False
    return model


def _known_fields(architecture: str) -> set[str]:
    """Names that the architecture's config class takes. Raises ConfigError when it is not a causal language model."""
    if architecture not in CAUSAL_LM_NAMES:
        near = difflib.get_close_matches(architecture, CAUSAL_LM_NAMES, n=3, cutoff=0.5) or ["llama", "gpt2", "qwen3"]
        hint = ", ".join(f"`{name}`" for name in near)
        raise ConfigError(f"model.architecture: `{architecture}` is not a causal language model; nearest: {hint}")
    config_class = transformers.CONFIG_MAPPING[architecture]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map} - {"self", "kwargs"}
    if "vocab_size" not in known:
        text_only = f"{architecture}_text"
        hint = f"use `{text_only}`" if text_only in CAUSAL_LM_NAMES else "use a text-only one"
        raise ConfigError(f"model.architecture: `{architecture}` is more than a language model; {hint}")
    return known | _LEGACY_ROPE_FIELDS if "rope_parameters" in known else known


def _checked_fields(architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    known = _known_fields(architecture)
    for name in fields:
        if name in _SET_BY_THE_RUN:
            raise ConfigError(f"model.config.{name} is set by the run itself; remove it")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean `{near[0]}`?" if near else "remove it"
            raise ConfigError(f"model.config.{name} is not a field of {architecture}; {hint}")
    # the class's default special tokens belong to another vocabulary, and bert and its kin look ahead by default
    defaults = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "is_decoder": True}
    return {name: value for name, value in defaults.items() if name in known} | fields


def _raise_position_limit(config: Any, sequence_length: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < sequence_length:
        config.max_position_embeddings = sequence_length


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) else text
