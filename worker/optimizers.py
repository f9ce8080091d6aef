"""Inner optimizers: what turns gradients into inner steps. One registry, `OPTIMIZERS`.

- `adamw`: AdamW (Loshchilov and Hutter, 2019); no weight decay on parameters with fewer than two dimensions.
- `muon`: Muon (Jordan et al., 2024) on hidden matrices, AdamW on embeddings, the output head and everything else, as
  in MuLoCo. Its update is scaled to AdamW's RMS, so that both share one learning rate.

Its state belongs to one worker, stays across rounds and restarts, and is never sent; after a merge Muon's momentum is
turned towards it (worker.momentum). It is saved as safetensors and checked name by name when it is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol.codecs.payload import Vector
from protocol.errors import ConfigError, VerificationError
from protocol.parameters import ParameterSlot, parameter_layout
from protocol.run_spec import AUTO, RunSpec, TrainSpec
from worker.disk import write_tensors
from worker.momentum import WHOLE, Cut, direction, turn


class Muon(torch.optim.Muon):
    """torch.optim.Muon with weight decay, Nesterov momentum and AdamW's RMS, orthogonalized by `worker.momentum`.

    cuts: of the matrices that are not one block.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], cuts: Mapping[Tensor, Cut], weight_decay: float) -> None:
        super().__init__(
            matrices, lr=_UNSET_RATE, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.cuts = cuts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing here has a closure
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
                update = direction(parameter.grad.lerp(buffer, momentum)[None], self.cuts.get(parameter, WHOLE))[0]
                parameter.mul_(1.0 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate)


_STATE_KEYS: dict[type[torch.optim.Optimizer], frozenset[str]] = {
    torch.optim.AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    Muon: frozenset({"momentum_buffer"}),
}
_UNSET_RATE = 0.0  # each step sets its own
_FUSED_ATTENTION = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "attn_qkv")  # names of layers in transformers
_SEPARATOR = "|"  # between a parameter's name and a state's key; a name has none


class InnerOptimizer:
    """One or more torch optimizers that step together at one learning rate; between them all parameters of `model`."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
        self._parts = tuple(parts)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._slots: dict[Tensor, ParameterSlot] = dict(zip(model.parameters(), parameter_layout(model), strict=True))

    def step(self, learning_rate: float) -> None:
        """One update of all parameters that have a gradient."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def turn_momentum(self, moved: Vector, rate_sum: float) -> None:
        """Turn Muon's momentum towards a merge: moved, float32 (D,), is θ before it minus θ after. See `sum_rates`."""
        for part in self._parts:
            if not isinstance(part, Muon):
                continue
            for parameter, state in part.state.items():
                slot, momentum = self._slots[parameter], state["momentum_buffer"]
                own = torch.from_numpy(moved[slot.range]).to(momentum.device).view(slot.shape)
                turn(momentum[None], own, rate_sum, part.cuts.get(parameter, WHOLE))

    def save(self, path: Path) -> None:
        """Write the state to a safetensors file in one step. Raises DiskFullError."""
        write_tensors(path, self.state())

    def state(self, *, copy: bool = False) -> dict[str, Tensor]:
        """What `save` writes: on the CPU, and valid until the next step; a copy stays as it is."""
        return {
            f"{self._names[parameter]}{_SEPARATOR}{key}": value.detach().to("cpu", copy=copy).contiguous()
            for part in self._parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load(self, path: Path) -> None:
        """Take the state from a file that `save` wrote. On an error nothing has changed.

        Raises VerificationError when the file is damaged or belongs to another model or optimizer, FileNotFoundError.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise VerificationError(f"{path} is not a safetensors file ({error}); delete it to start anew") from error
        states = self._sort_states(tensors, path)
        for part in self._parts:
            packed = part.state_dict()
            order = [parameter for group in part.param_groups for parameter in group["params"]]
            packed["state"] = {place: states[parameter] for place, parameter in enumerate(order) if parameter in states}
            part.load_state_dict(packed)

    def _sort_states(self, tensors: Mapping[str, Tensor], path: Path) -> dict[Tensor, dict[str, Tensor]]:
        parameters = {name: parameter for parameter, name in self._names.items()}
        states: dict[Tensor, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            name, _, key = full_name.partition(_SEPARATOR)
            parameter = parameters.get(name)
            if parameter is None or value.shape != (() if key == "step" else parameter.shape):
                raise VerificationError(f"{path} is of another model ({full_name}); delete it to start anew")
            states.setdefault(parameter, {})[key] = value
        for part in self._parts:
            expected = _STATE_KEYS[type(part)]
            for group in part.param_groups:
                for parameter in group["params"]:
                    if parameter in states and set(states[parameter]) != expected:
                        raise VerificationError(f"{path} is of another optimizer; delete it to start anew")
        return states


def _build_adamw(model: nn.Module, train: TrainSpec) -> InnerOptimizer:
    return InnerOptimizer([_adamw(list(model.parameters()), train)], model)


def _build_muon(model: nn.Module, train: TrainSpec) -> InnerOptimizer:
    hidden = hidden_matrices(model)
    chosen = set(hidden)
    others = [parameter for parameter in model.parameters() if parameter not in chosen]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(Muon(hidden, find_cuts(model), train.weight_decay))
    if others:
        parts.append(_adamw(others, train))
    return InnerOptimizer(parts, model)


def _adamw(parameters: list[nn.Parameter], train: TrainSpec) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # fused needs less than half the time of the other forms on the CPU too
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=_UNSET_RATE, betas=train.betas, fused=True
    )


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The 2-D weights of the linear layers between the embeddings and the output head, each once."""
    find_head: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    ends = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = find_head() if find_head is not None else None
    if head is not None:
        ends.add(head.weight)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and name.endswith("weight") and parameter not in ends
    ]


def find_cuts(model: nn.Module) -> dict[Tensor, Cut]:
    """How the weights fall into blocks that hold query, key and value of all heads: one block a head of each."""
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return {}
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cuts: dict[Tensor, Cut] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in _FUSED_ATTENTION and isinstance(weight, nn.Parameter) and weight.ndim == 2:
            axis = 0 if isinstance(module, nn.Linear) else 1  # GPT-2's layers hold their weights transposed
            if weight.shape[axis] % head_size == 0:
                cuts[weight] = Cut(weight.shape[axis] // head_size, axis)
    return cuts


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainSpec], InnerOptimizer]] = {
    "adamw": _build_adamw,
    "muon": _build_muon,
}


def build_optimizer(model: nn.Module, train: TrainSpec, name: str | None = None) -> InnerOptimizer:
    """The inner optimizer of that name, or that the spec begins with, without state.

    Raises ConfigError when it is not known.
    """
    name = name or train.first_optimizer
    build = OPTIMIZERS.get(name)
    if build is None:
        raise ConfigError(f"the optimizer `{name}` is not one of {', '.join(OPTIMIZERS)}")
    return build(model, train)


def find_saved_kind(path: Path) -> str | None:
    """The name of the optimizer whose state a file of `InnerOptimizer.save` holds; None where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            keys = {name.rpartition(_SEPARATOR)[2] for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError):
        return None
    return "muon" if keys & _STATE_KEYS[Muon] else "adamw"


def learning_rate_at(tokens: float, spec: RunSpec, highest: float | None = None) -> float:
    """The rate when the whole run has trained on so many tokens.

    A linear rise over `warmup_fraction` of the run's tokens to the highest rate, then a cosine down to
    `final_learning_rate_fraction` of it at the run's end; there it stays. highest: what the lease says, None where the
    run's own `learning_rate` holds. Raises VerificationError when neither says a number.
    """
    train = spec.train
    peak = train.learning_rate if highest is None else highest
    if peak == AUTO:
        raise VerificationError("this run leaves the learning rate to its leases, and this one names none")
    warmup_tokens = train.warmup_fraction * train.tokens
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    decay_tokens = train.tokens - warmup_tokens
    progress = min(1.0, (tokens - warmup_tokens) / decay_tokens) if decay_tokens > 0 else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    final = train.final_learning_rate_fraction
    return peak * (final + (1.0 - final) * cosine)


def sum_rates(credited_tokens: Sequence[int], tokens_after: int, spec: RunSpec, highest: float | None = None) -> float:
    """The learning rates of a round's steps, added up, for the mean worker as the merge weighs it: by its tokens.

    credited_tokens: of each contribution; tokens_after: of the whole run, this round's included; highest: as in
    `learning_rate_at`. 0 for no tokens.
    """
    total = sum(credited_tokens)
    if total == 0:
        return 0.0
    steps = sum(tokens * tokens for tokens in credited_tokens) / (total * spec.step_tokens)
    return steps * learning_rate_at(tokens_after - total / 2, spec, highest)
