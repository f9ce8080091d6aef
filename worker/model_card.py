"""The model card of a checkpoint: README.md with YAML front matter, as the Hugging Face hub reads it.

Names come from strangers: they are escaped, so that a contributor cannot write links, HTML or tables into the card.
"""

import html
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.run_spec import RunSpec

_MAX_CONTRIBUTORS = 200  # as many as a page bears; manyhands.json lists all


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """Somebody whose work is in the checkpoint. tokens: verified ones."""

    name: str
    peer: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCard:
    """What there is to say about a checkpoint.

    digest: of the run's state; losses in nats a token; plan: what `auto` came to in the last round, and why.
    """

    run_id: str
    name: str
    round: int  # merged so far
    digest: str
    ledger_head: str
    tokens: int
    contributors: tuple[Contributor, ...] = ()
    held_out_loss: float | None = None
    held_out_tokens: int | None = None
    plan: str = ""


def render_card(spec: RunSpec, num_parameters: int, card: CheckpointCard) -> str:
    """The text of README.md; the same for the same arguments."""
    return "\n".join([*_front_matter(spec), *_summary(spec, num_parameters, card), _USAGE, *_contributors(card)]) + "\n"


def _front_matter(spec: RunSpec) -> Iterator[str]:
    # a JSON value is a YAML value, whatever characters it holds
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield f"tags: {json.dumps(['manyhands', 'decentralized-training', spec.model.architecture])}"
    if spec.model.initial_weights is not None:
        yield f"base_model: {json.dumps(spec.model.initial_weights)}"
    yield "---"


def _summary(spec: RunSpec, num_parameters: int, card: CheckpointCard) -> Iterator[str]:
    train = spec.train
    yield f"# {_escape(card.name)}"
    yield ""
    yield f"Trained by {len(card.contributors):,} contributors on their own computers with manyhands."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| model | {_escape(spec.model.architecture)}, {num_parameters:,} parameters, float32 |"
    yield f"| trained on | {card.tokens:,} verified tokens in {card.round:,} rounds |"
    if card.held_out_loss is not None:
        perplexity = math.exp(min(card.held_out_loss, 700.0))
        held_out = "" if card.held_out_tokens is None else f" on {card.held_out_tokens:,} tokens"
        yield f"| held-out loss | {card.held_out_loss:.4f} nats a token (perplexity {perplexity:.4g}){held_out} |"
    yield f"| data | {_escape(spec.data.source)}, sequences of {spec.data.sequence_length:,} tokens |"
    yield f"| inner optimizer | {train.optimizer}, learning rate {train.learning_rate} |"
    yield f"| outer optimizer | {spec.outer.optimizer}, learning rate {spec.outer.learning_rate:g} |"
    yield f"| exchanged as | {_escape(spec.exchange.codec)} |"
    if card.plan:
        yield f"| plan of the last round | {_escape(card.plan)} |"
    yield f"| run | `{card.run_id}` |"
    yield f"| state after the round | `{card.digest}` |"
    yield f"| ledger entry | `{card.ledger_head}` |"
    yield ""


def _contributors(card: CheckpointCard) -> Iterator[str]:
    yield "## Contributors"
    yield ""
    yield "| name | peer | verified tokens |"
    yield "|---|---|---:|"
    ranked = sorted(card.contributors, key=lambda contributor: (-contributor.tokens, contributor.peer))
    for contributor in ranked[:_MAX_CONTRIBUTORS]:
        yield f"| {_escape(contributor.name)} | `{contributor.peer}` | {contributor.tokens:,} |"
    if len(ranked) > _MAX_CONTRIBUTORS:
        yield ""
        yield f"And {len(ranked) - _MAX_CONTRIBUTORS:,} more, listed in manyhands.json."


def _escape(text: str) -> str:
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~:/@-])", r"\\\1", html.escape(one_line))


_USAGE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
