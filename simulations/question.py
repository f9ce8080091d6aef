"""docs/every-phone-and-computer.md: what could all phones and computers train? `manyhands simulate question` writes it.

Everything in it is computed here, by simulations.estimate and by fidelity `plan`; the sentences are ours. The same
seed gives the same page.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from protocol.policy import CHOICES, STEPS_PENALTY
from simulations.estimate import (
    BEARABLE_NATS,
    KINDS,
    LIMITS,
    TOKENS_PER_PARAMETER,
    Assumptions,
    Estimate,
    Means,
    draw_assumptions,
    estimate,
    sample_days,
)
from simulations.plan import plan_run
from simulations.question_charts import Line, log_lines, show_days, stacked_bars, tornado
from simulations.question_text import PAGE
from simulations.scenario import parse_scenario
from simulations.world.availability import AVAILABILITY
from simulations.world.devices import DEVICES
from simulations.world.links import LINKS

NAME = "every-phone-and-computer"
PEERS = (1e3, 1e4, 1e5, 1e6, 1e7)
MODELS = (("10 M", 1e7), ("30 M", 3e7), ("100 M", 1e8), ("300 M", 3e8), ("1 B", 1e9))
MIDDLE_PEERS, MIDDLE_MODEL = 1e5, 1e8
# By which factor each may be wrong, either way.
SPREADS = {
    "phone_speed": 10.0,
    "computer_speed": 3.0,
    "critical_batch": 4.0,
    "online": 2.0,
    "session": 3.0,
    "links": 3.0,
}
SPREAD_NAMES = {
    "phone_speed": "phones' throughput",
    "computer_speed": "computers' throughput",
    "critical_batch": "critical batch size",
    "online": "share online",
    "session": "length of sessions",
    "links": "bandwidth",
}
NUM_DRAWS = 40
CHECKED = (1_000, 10_000)  # peers of the runs that fidelity `plan` is asked for
CHECKED_MODEL = 30_000_000
CHECKED_HOURS = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The formula beside fidelity `plan`, for one size."""

    peers: int
    formula: Estimate
    planned: dict[str, Any]


def write_question(path: Path) -> list[Path]:
    """Write the page and its pictures beside it. Returns all files. Takes a minute or two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {(n, p): estimate(n, p) for n in PEERS for _, p in MODELS}
    draws = draw_assumptions(NUM_DRAWS, SPREADS, seed=0)
    ranges = {(n, p): sample_days(n, p, draws) for n in PEERS for _, p in MODELS}
    pictures = {
        "days": _draw_days(table, ranges),
        "limits": _draw_limits(table),
        "unsure": _draw_unsure(),
    }
    files = [path]
    for name, svg in pictures.items():
        files.append(path.parent / f"{NAME}-{name}.svg")
        files[-1].write_text(svg, encoding="utf-8")
    path.write_text(_write_page(table, ranges, [_check(peers) for peers in CHECKED]), encoding="utf-8")
    return files


# ---- pictures


def _draw_days(
    table: dict[tuple[float, float], Estimate], ranges: dict[tuple[float, float], tuple[float, float]]
) -> str:
    lines = [
        Line(
            name=f"{name} parameters",
            values=[table[n, p].days for n in PEERS],
            ranges=[ranges[n, p] for n in PEERS] if p in (3e7, 3e8) else (),
        )
        for name, p in MODELS
    ]
    return log_lines(
        "Days until a model has seen 20 tokens a parameter",
        PEERS,
        lines,
        x_label="phones and computers that joined (a tenth to a half of them online)",
        y_label="days",
    )


def _draw_limits(table: dict[tuple[float, float], Estimate]) -> str:
    return stacked_bars(
        "What the time goes into, with 100,000 phones and computers",
        [name for name, _ in MODELS],
        [table[MIDDLE_PEERS, p].limits for _, p in MODELS],
        LIMITS,
        x_label="share of the time; rows: parameters of the model",
    )


def _draw_unsure() -> str:
    ends = _vary()
    names = sorted(ends, key=lambda name: -max(ends[name]) / max(min(ends[name]), 1e-9))
    return tornado(
        "One assumption at a time: 100 M parameters, 100,000 phones and computers",
        [f"{SPREAD_NAMES[name]}, ÷ and × {SPREADS[name]:g}" for name in names],  # noqa: RUF001
        [ends[name] for name in names],
        estimate(MIDDLE_PEERS, MIDDLE_MODEL).days,
        x_label="days (logarithmic); dashed: as assumed",
    )


def _vary() -> dict[str, tuple[float, float]]:
    def days(name: str, factor: float) -> float:
        return estimate(MIDDLE_PEERS, MIDDLE_MODEL, replace(Assumptions(), **{name: factor})).days

    return {name: (days(name, 1.0 / spread), days(name, spread)) for name, spread in SPREADS.items()}


# ---- the formula beside fidelity `plan`


def _check(peers: int) -> Check:
    """A run of all kinds, with the exchange that the formula would choose for the whole crowd."""
    means = Means(
        kinds=len(KINDS), codec=("sign", ()), inner_steps=20, contributors=128, bearable_nats=100.0, everybody=True
    )
    formula = estimate(peers, CHECKED_MODEL, means=means)
    populations = [
        {"name": name, "count": round(share * peers), "device": name, "link": link, "availability": habit}
        for name, share, link, habit in KINDS
    ]
    seeds = {"name": "seeds", "count": 32, "device": "laptop", "link": "datacenter", "availability": "server"}
    scenario = parse_scenario(
        {
            "name": NAME,
            "fidelity": "plan",
            "hours": CHECKED_HOURS,
            "model": {"parameters": CHECKED_MODEL},
            "run": {
                "train": {"tokens": 10**15, "batch_sequences": 1},
                "data": {"sequence_length": 1024},
                "round": {"inner_steps": 20, "min_peers": 16, "exchange_s": 300.0, "merge_timeout_s": 300.0},
                "exchange": {"codec": "sign", "max_contributors": 128},
            },
            "population": [*populations, {**seeds, "seed": True}],
        },
        where=NAME,
    )
    return Check(peers=peers, formula=formula, planned=plan_run(scenario).summary)


# ---- the page


def _write_page(
    table: dict[tuple[float, float], Estimate],
    ranges: dict[tuple[float, float], tuple[float, float]],
    checks: list[Check],
) -> str:
    middle = table[MIDDLE_PEERS, MIDDLE_MODEL]
    return PAGE.format(
        tokens_per_parameter=f"{TOKENS_PER_PARAMETER:g}",
        table=_describe_days(table, ranges),
        together=_describe_together(table),
        fits=_describe_memory(),
        middle_online=f"{middle.online:,.0f}",
        middle_able=f"{middle.able:,.0f}",
        middle_days=show_days(middle.days),
        middle_batch=_millions(middle.batch_tokens),
        middle_critical=_millions(middle.critical_tokens),
        exchange_share=f"{middle.limits[3] / middle.days:.0%}",
        phones=_describe_phones(),
        phone_ratio=f"{DEVICES['gaming-gpu'].flops / DEVICES['phone'].flops:.0f}",
        codecs=_describe_codecs(),
        steps=_describe_steps(),
        devices=_describe_devices(),
        checks=_describe_checks(checks),
        bearable=f"{BEARABLE_NATS:g}",
        unbuilt=_describe_unbuilt(),
    )


def _describe_days(
    table: dict[tuple[float, float], Estimate], ranges: dict[tuple[float, float], tuple[float, float]]
) -> str:
    rows = ["| joined | " + " | ".join(name for name, _ in MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for n in PEERS:
        cells = []
        for _, p in MODELS:
            low, high = ranges[n, p]
            cells.append(f"**{show_days(table[n, p].days)}** ({show_days(low)} to {show_days(high)})")
        rows.append(f"| {n:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _describe_together(table: dict[tuple[float, float], Estimate]) -> str:
    rows = [
        "| model | tokens | critical batch | used at a time | kinds | exchange | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, p in MODELS:
        one = table[PEERS[-1], p]
        limit = LIMITS[max(range(len(LIMITS)), key=lambda number: one.limits[number])]
        kinds = ", ".join(kind[0] for kind in KINDS[: one.kinds])
        how = f"{one.codec}, H = {one.inner_steps}" + (f", groups of {one.group_size}" if one.group_size > 1 else "")
        tokens = f"{TOKENS_PER_PARAMETER * p / 1e9:g} B"
        rows.append(
            f"| {name} | {tokens} | {_millions(one.critical_tokens)} | {one.online:,.0f} of {one.able:,.0f} | {kinds} "
            f"| {how}: rounds of {one.round_s:,.0f} s | {limit} |"
        )
    return "\n".join(rows)


def _describe_memory() -> str:
    shares = [(name, estimate(PEERS[-1], p).fits) for name, p in MODELS]
    return ", ".join(f"{name} {share:.2g}" if share < 0.01 else f"{name} {share:.0%}" for name, share in shares)


def _describe_phones() -> str:
    """What phones alone would take, and computers with them."""
    alone = Means(kinds=len(KINDS))
    rows = ["| model | the best kinds | all kinds | all, phones ten times as fast |", "|---|---|---|---|"]
    for name, p in MODELS[:4]:
        best, everybody = estimate(MIDDLE_PEERS, p), estimate(MIDDLE_PEERS, p, means=alone)
        faster = estimate(MIDDLE_PEERS, p, Assumptions(phone_speed=10.0), alone)
        days = " | ".join(show_days(one.days) for one in (best, everybody, faster))
        rows.append(f"| {name} | {days} |")
    return "\n".join(rows)


def _describe_codecs() -> str:
    rows = ["| codec | bytes a parameter | loss, nats | days | devices used |", "|---|---|---|---|---|"]
    for choice in CHOICES:
        means = Means(codec=(choice.codec, choice.options), inner_steps=20, bearable_nats=choice.penalty + 0.03)
        one = estimate(MIDDLE_PEERS, MIDDLE_MODEL, means=means)
        rows.append(
            f"| {one.codec} | {choice.bytes_per_parameter:g} | {choice.penalty:g} | {show_days(one.days)} "
            f"| {one.online:,.0f} |"
        )
    return "\n".join(rows)


def _describe_steps() -> str:
    rows = ["| H | loss, nats | days | devices used |", "|---|---|---|---|"]
    for steps, penalty in STEPS_PENALTY:
        means = Means(codec=("sign", ()), inner_steps=steps, bearable_nats=0.017 + max(penalty, 0.0) + 0.01)
        one = estimate(MIDDLE_PEERS, MIDDLE_MODEL, means=means)
        rows.append(f"| {steps} | {penalty:+g} | {show_days(one.days)} | {one.online:,.0f} |")
    return "\n".join(rows)


def _describe_devices() -> str:
    rows = ["| kind | share | Tflop/s | memory | online | line, down and up |", "|---|---|---|---|---|---|"]
    for name, share, link_name, habit in KINDS:
        device, link = DEVICES[name], LINKS[link_name]
        online = sum(AVAILABILITY[habit].share_online) / 24.0
        rows.append(
            f"| {name} | {share:.0%} | {device.flops / 1e12:g} | {device.memory_bytes / 1e9:g} GB | {online:.0%} "
            f"| {link.down_bps / 1e6:g} and {link.up_bps / 1e6:g} Mbit/s |"
        )
    return "\n".join(rows)


def _describe_checks(checks: list[Check]) -> str:
    rows = ["| joined | | online | seconds a round | work credited | tokens a second |", "|---|---|---|---|---|---|"]
    for check in checks:
        one, planned = check.formula, check.planned
        credited = planned["tokens"] / max(planned["trained_tokens"], 1)
        rows.append(
            f"| {check.peers:,} | formula | {one.online:,.0f} | {one.round_s:,.0f} | {one.credited:.0%} "
            f"| {one.tokens_per_s:,.0f} |"
        )
        rows.append(
            f"| | `plan` | {planned['peers_online']:,.0f} | {planned['round_s']:,.0f} | {credited:.0%} "
            f"| {planned['tokens_per_s']:,.0f} |"
        )
    return "\n".join(rows)


def _describe_unbuilt() -> str:
    ways = (
        ("as it is", Means()),
        ("rounds of up to 200 steps, if larger models bear them (0.3 nats on ours)", Means(bearable_nats=0.3)),
        ("6 bytes a parameter instead of 20: 8-bit moments, no copy of gradients", Means(memory_bytes=6.0)),
        ("both", Means(bearable_nats=0.3, memory_bytes=6.0)),
    )
    rows = ["| | 300 M | 1 B | 3 B |", "|---|---|---|---|"]
    for name, means in ways:
        days = [show_days(estimate(1e6, p, means=means).days) for p in (3e8, 1e9, 3e9)]
        rows.append(f"| {name} | " + " | ".join(days) + " |")
    return "\n".join(rows)


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2g} M"
