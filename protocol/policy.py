"""What to exchange and how often: a pure function from what is known of a run to codec and inner steps, with a reason.

Short rounds learn better and cost more bytes; codecs with fewer bits learn a little worse and cost fewer. The penalties
below are held-out loss in nats over the best setting, measured at equal tokens (docs/convergence.md); the choice is the
smallest sum of the two among those whose exchange takes at most the wanted share of a round.

It does not look at anything but its arguments, and the same arguments give the same choice.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

from protocol.errors import ConfigError
from protocol.run_spec import AUTO

MAX_INNER_STEPS = 100_000
# A run learns most at its beginning, and there rounds that are shorter or more precise gain most for their bytes: in
# this part of its tokens exchange may take so many times the wanted share (docs/convergence.md).
EARLY_PART, EARLY_SHARES = 0.08, 2.0
# A short run is worth at least so many rounds, while its exchange takes no more than this share of them; over links
# too slow for that it makes fewer, but never less than these.
LEAST_ROUNDS, MOST_SHARE, FEWEST_ROUNDS = 20, 0.25, 10
# A sparse codec learns in a run that has rounds enough to send every value so many times, for its density.
SPARSE_PASSES = 4
SPARSE_CHUNK = 4096  # values of which a sparse codec keeps k (protocol.codecs.sparse)
FIRST_STEPS = 5  # before any link was measured: a round that is soon over, and measures them
# The best rates of one worker with so many parameters in a run of so many steps; see choose_learning_rate.
ALONE_RATES = {"muon": 1.3e-2, "adamw": 6e-3}
HIGHEST_RATES = {"muon": 4e-2, "adamw": 6e-3}
# Of an inner step, that Muon's update may take: one of its steps is worth three of AdamW's (docs/convergence.md).
MOST_MUON_SHARE = 0.7
RATE_PARAMETERS, RATE_STEPS, RATE_MOST_LONGER, RATE_MOST_WORKERS = 130_000, 300.0, 3.0, 8
# The steps that follow from a round's time stay as they were while they are so near: speeds are never quite the same.
HELD_WITHIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A codec with its options: bytes a parameter, and what it costs in loss."""

    codec: str
    options: tuple[tuple[str, int | float], ...]
    bytes_per_parameter: float
    penalty: float

    @property
    def density(self) -> float:
        """The part of all values that a payload holds; infinite for a codec that never leaves one out."""
        return dict(self.options)["k"] / SPARSE_CHUNK if self.codec == "sparse" else math.inf


CHOICES = (
    Choice(codec="int8", options=(), bytes_per_parameter=1.008, penalty=0.0),
    Choice(codec="int4", options=(), bytes_per_parameter=0.508, penalty=0.002),
    Choice(codec="int2", options=(), bytes_per_parameter=0.258, penalty=0.008),
    Choice(codec="sign", options=(), bytes_per_parameter=0.133, penalty=0.02),
    Choice(codec="sparse", options=(("k", 512),), bytes_per_parameter=0.102, penalty=0.07),
    Choice(codec="sparse", options=(("k", 128),), bytes_per_parameter=0.0330, penalty=0.15),
    Choice(codec="sparse", options=(("k", 64),), bytes_per_parameter=0.0190, penalty=0.265),
)
# Inner steps a round -> loss over rounds of 10; between them it is taken to be linear in the logarithm. Below 5 the
# loss still falls, but rounds that short are mostly round trips, which no measured bandwidth tells of.
STEPS_PENALTY = ((5, -0.03), (10, 0.0), (20, 0.03), (30, 0.055), (50, 0.1), (100, 0.18), (200, 0.25), (500, 0.35))
STEPS_RATIO = 1.1  # of one H that is tried to the last, or the next whole number


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """A typical peer: seconds an inner step, and bits a second up and down; None where nothing was measured yet."""

    step_s: float
    upload_bps: float | None
    download_bps: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePlan:
    """What a round exchanges, and why."""

    codec: str
    options: tuple[tuple[str, int | float], ...]
    inner_steps: int
    reason: str
    round_s: float | None = None  # what the operator wants a round to take, when the steps follow from it
    learning_rate: float | None = None  # the highest of the inner steps', when run.toml leaves it to `auto`
    optimizer: str | None = None  # the inner one, when run.toml leaves it to `auto`


def describe_links(step_s: list[float], upload_bps: list[float], download_bps: list[float]) -> Links:
    """The median peer. Raises ValueError without any step time."""
    return Links(
        step_s=median(step_s),
        upload_bps=median(upload_bps) if upload_bps else None,
        download_bps=median(download_bps) if download_bps else None,
    )


def plan_exchange(
    *,
    num_parameters: int,
    contributors: int,
    links: Links,
    share: float,
    codec: str,
    options: Mapping[str, int | float],
    inner_steps: int | None,
    progress: float,
    run_steps: float,
    round_s: float | None = None,
    held_steps: int | None = None,
    overlap: bool = False,
) -> ExchangePlan:
    """The exchange of the next round. `codec` and `inner_steps` may be given; "auto" and None are chosen here.

    share: the part of a round that exchange may take, 0 to 1; more at the beginning of a run, and in short ones.
    progress: the part of the run's tokens that was trained, 0 to 1. run_steps: inner steps that one worker makes in the
    whole run. Before any link was measured int2 and few steps are taken. round_s: seconds that a round should take;
    then the steps follow from it, and `inner_steps` does not count. held_steps: those of the round before, for the
    same time. overlap: training goes on beside the exchange; the steps that are chosen here count what is made there.
    """
    choices = CHOICES if codec == AUTO else (_given(codec, options),)
    if round_s is not None:
        plan = _plan_for_time(choices, num_parameters, contributors, links, share, round_s, held_steps)
        return replace(plan, round_s=round_s, reason=f"rounds of {round_s:g} s, as the operator wants: {plan.reason}")
    if codec != AUTO and inner_steps is not None:
        return ExchangePlan(codec=codec, options=choices[0].options, inner_steps=inner_steps, reason="as run.toml says")
    if links.upload_bps is None:
        middle = _middle(choices)
        return ExchangePlan(
            codec=middle.codec,
            options=middle.options,
            inner_steps=inner_steps or FIRST_STEPS,
            reason="no link was measured yet",
        )
    if progress < EARLY_PART:
        share = min(1.0, EARLY_SHARES * share)
    candidates = _list_candidates(choices, inner_steps, run_steps)
    plan = _choose(candidates, num_parameters, contributors, links, share)
    if inner_steps is not None:
        return plan
    most_steps = max(run_steps / LEAST_ROUNDS, STEPS_PENALTY[0][0])
    if plan.inner_steps > most_steps:
        longest = max(most_steps, run_steps / FEWEST_ROUNDS)
        limit = max(share, MOST_SHARE)
        plan = _choose_shortest(candidates, most_steps, longest, num_parameters, contributors, links, limit)
        plan = replace(plan, reason=f"a short run: exchange may take {limit:.0%}: {plan.reason}")
    return _leave_beside(plan, choices, num_parameters, contributors, links) if overlap else plan


def _list_candidates(
    choices: Sequence[Choice], inner_steps: int | None, run_steps: float
) -> list[tuple[Choice, int, float]]:
    """Codecs with inner steps, and what these cost in loss; of several codecs those alone that learn in such a run."""
    steps = _list_steps() if inner_steps is None else ((inner_steps, 0.0),)
    return [
        (choice, h, penalty)
        for choice in choices
        for h, penalty in steps
        if len(choices) == 1 or choice.density * run_steps / h >= SPARSE_PASSES
    ]


def _leave_beside(
    plan: ExchangePlan, choices: Sequence[Choice], num_parameters: int, contributors: int, links: Links
) -> ExchangePlan:
    """The plan with overlap: fewer steps by those that fit beside the exchange, so that as many rounds are made."""
    choice = next(each for each in choices if (each.codec, each.options) == (plan.codec, plan.options))
    exchange = exchange_s(choice, num_parameters, contributors, links)
    beside = min(round(exchange / links.step_s), plan.inner_steps // 2)
    return replace(
        plan, inner_steps=plan.inner_steps - beside, reason=f"{plan.reason}, with {beside} of the steps beside it"
    )


def choose_learning_rate(optimizer: str, *, num_parameters: int, run_steps: float, workers: int) -> float:
    """The highest learning rate of inner steps, of which one worker makes `run_steps` in the whole run.

    Larger models want a lower one, and so do longer runs, to a point. The mean of many workers' steps moves less and is
    less noisy than one of them, so it bears a higher one, for some workers (docs/convergence.md has the trials).
    """
    larger = math.sqrt(num_parameters / RATE_PARAMETERS)
    longer = min(max(1.0, math.sqrt(run_steps / RATE_STEPS)), RATE_MOST_LONGER)
    together = math.sqrt(min(workers, RATE_MOST_WORKERS))
    return min(ALONE_RATES[optimizer] / (larger * longer) * together, HIGHEST_RATES[optimizer])


def choose_optimizer(muon_shares: Sequence[float], held: str | None = None) -> tuple[str, str]:
    """The inner optimizer of a run, and why.

    muon_shares: the part of an inner step, 0 to 1, that Muon's update takes, by each worker's measure. The update costs
    the same for every batch, so small batches of large models make Muon dear. All workers take the same, since Muon
    among workers with AdamW learns much less. held: what the run has had so far; it stays, for a change costs momentum.
    """
    if not muon_shares:
        name = held or "muon"
        return name, name
    share = median(muon_shares)
    name = held or ("adamw" if share > MOST_MUON_SHARE else "muon")
    return name, f"muon ({share:.0%} of a step)" if name == "muon" else f"adamw (muon: {share:.0%} of a step)"


def _choose(
    candidates: Sequence[tuple[Choice, int, float]], num_parameters: int, contributors: int, links: Links, share: float
) -> ExchangePlan:
    """The best of codecs with inner steps and what these cost in loss: the least loss among those within the share."""

    def rank(candidate: tuple[Choice, int, float]) -> tuple[float, float, float]:
        choice, inner_steps, penalty = candidate
        excess = max(0.0, _share(choice, inner_steps, num_parameters, contributors, links) - share)
        return excess, choice.penalty + penalty, choice.bytes_per_parameter

    choice, inner_steps, _ = min(candidates, key=rank)
    return _explain(choice, inner_steps, num_parameters, contributors, links, share)


def _choose_shortest(
    candidates: Sequence[tuple[Choice, int, float]],
    wanted: float,
    longest: float,
    num_parameters: int,
    contributors: int,
    links: Links,
    share: float,
) -> ExchangePlan:
    """The best of rounds of the wanted steps; where none is within the share, of the shortest that are, or longest."""
    known = sorted({h for _, h, _ in candidates})
    first = max(h for h in known if h <= wanted)
    within = [candidate for candidate in candidates if first <= candidate[1] <= longest]
    fitting = [h for choice, h, _ in within if _share(choice, h, num_parameters, contributors, links) <= share]
    taken = min(fitting, default=max(h for _, h, _ in within))
    at_taken = [candidate for candidate in within if candidate[1] == taken]
    return _choose(at_taken, num_parameters, contributors, links, share)


@cache
def _list_steps() -> tuple[tuple[int, float], ...]:
    """The H that are tried, with their penalties."""
    known, penalties = zip(*STEPS_PENALTY, strict=True)
    tried = [known[0]]
    while tried[-1] < known[-1]:
        tried.append(min(max(tried[-1] + 1, round(STEPS_RATIO * tried[-1])), known[-1]))
    return tuple((h, _interpolate(math.log(h), [math.log(each) for each in known], penalties)) for h in tried)


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    place = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


def _plan_for_time(
    choices: Sequence[Choice],
    num_parameters: int,
    contributors: int,
    links: Links,
    share: float,
    round_s: float,
    held_steps: int | None,
) -> ExchangePlan:
    """The codec that learns best among those that fit, and the steps that are left beside its exchange."""
    fitting = []
    for choice in choices if links.upload_bps is not None else (_middle(choices),):
        compute_s = round_s - exchange_s(choice, num_parameters, contributors, links)
        fitting.append((choice, _steps_within(compute_s, links, held_steps), 0.0))
    return _choose(fitting, num_parameters, contributors, links, share)


def _steps_within(compute_s: float, links: Links, held_steps: int | None) -> int:
    steps = min(max(1, round(compute_s / links.step_s)), MAX_INNER_STEPS)
    is_near = held_steps is not None and abs(held_steps - steps) <= HELD_WITHIN * steps
    return held_steps if held_steps is not None and is_near else steps


def _middle(choices: Sequence[Choice]) -> Choice:
    return next(choice for choice in choices if len(choices) == 1 or choice.codec == "int2")


def exchange_s(choice: Choice, num_parameters: int, contributors: int, links: Links) -> float:
    """Seconds that a peer's link is busy in a round: its own payload up, the others' down, both at once."""
    payload_bits = 8.0 * choice.bytes_per_parameter * num_parameters
    up = payload_bits / links.upload_bps if links.upload_bps else 0.0
    down = (contributors - 1) * payload_bits / links.download_bps if links.download_bps else 0.0
    return max(up, down)


def _share(choice: Choice, inner_steps: int, num_parameters: int, contributors: int, links: Links) -> float:
    exchange = exchange_s(choice, num_parameters, contributors, links)
    return exchange / (exchange + inner_steps * links.step_s)


def _given(codec: str, options: Mapping[str, int | float]) -> Choice:
    wanted = tuple(sorted(options.items()))
    known = next((c for c in CHOICES if c.codec == codec and c.options == wanted), None)
    if known is not None:
        return known
    sizes = {"float32": 4.0, "float16": 2.0, "sparse": 0.0003 * float(options.get("k", 64))}
    size = sizes.get(codec) or next((c.bytes_per_parameter for c in CHOICES if c.codec == codec), None)
    if size is None:
        raise ConfigError(f"unknown codec `{codec}`")
    return Choice(codec=codec, options=wanted, bytes_per_parameter=size, penalty=0.0)


def _explain(
    choice: Choice, inner_steps: int, num_parameters: int, contributors: int, links: Links, share: float
) -> ExchangePlan:
    exchange = exchange_s(choice, num_parameters, contributors, links)
    taken = _share(choice, inner_steps, num_parameters, contributors, links)
    round_s = exchange + inner_steps * links.step_s
    name = choice.codec + "".join(f" {key}={value}" for key, value in choice.options)
    if links.upload_bps is None:
        reason = f"{name}, {inner_steps} inner steps; no link was measured yet"
        return ExchangePlan(codec=choice.codec, options=choice.options, inner_steps=inner_steps, reason=reason)
    limit = "" if taken <= share else f", more than the {share:.0%} wanted: nothing smaller learns"
    down = f"/{links.download_bps / 1e6:.3g}" if links.download_bps else ""
    return ExchangePlan(
        codec=choice.codec,
        options=choice.options,
        inner_steps=inner_steps,
        reason=(
            f"{name}, {inner_steps} inner steps: {choice.bytes_per_parameter * num_parameters / 1e6:.3g} MB up and "
            f"{max(contributors - 1, 0)} payloads down take {exchange:.2g} s of {round_s:.3g} s "
            f"({taken:.1%}{limit}) at {links.upload_bps / 1e6:.3g}{down} Mbit/s"
        ),
    )
