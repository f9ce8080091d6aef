"""report.html: one file, no network, light and dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from simulations.charts import Series, Span, area_chart, legend, line_chart, share_bars, short, waterfall
from simulations.report_style import CSS, SCRIPT
from simulations.results import Results
from simulations.virtual.recorder import ACTIVITIES

MAX_ROUNDS = 24  # in the waterfall
MAX_POINTS = 400
Row = dict[str, Any]
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")


def write_report(results: Results, folder: Path) -> None:
    """Write report.html."""
    scenario = results.scenario
    cards = [_loss(results), _tokens(results), _activity(results), _utilisation(results), _traffic(results)]
    cards += [_waterfall(results), _who(results), _largest(results)]
    body = "".join(f"<section>{card}</section>" for card in cards if card)
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(scenario.name)}: a simulated run</title><style>{CSS}</style></head>
<body><header><h1>{escape(scenario.name)}</h1><p>{escape(scenario.description)}</p>
<p class="muted">{escape(_about(results))}</p></header>
<div class="tiles">{_tiles(results.summary)}</div>
<main>{body}</main>
<footer>Simulated, not measured: fidelity {escape(scenario.fidelity)}, seed {scenario.seed}.
{_origin(results)}</footer>
<script>{SCRIPT}</script></body></html>
"""
    (folder / "report.html").write_text(html, encoding="utf-8")


def _origin(results: Results) -> str:
    """What was computed, in a sentence."""
    if results.scenario.fidelity == "plan":
        return "Computed over all peers at once, as the coordinator's core would decide."
    return f"The coordinator's core is the real one. Trace {escape(results.summary['trace_sha256'][:16])}"


def _about(results: Results) -> str:
    parts = [
        f"{spec.count:,} {spec.name} ({spec.device}, {spec.link}, {spec.availability}, {spec.region}"
        + (f", {spec.attack_fraction:.0%} attack: {spec.attack})" if spec.attack else ")")
        for spec in results.scenario.population
    ]
    return "; ".join(parts)


def _tiles(summary: Row) -> str:
    loss, start = summary["held_out_loss"], summary["held_out_loss_start"]
    tiles = [
        ("virtual time", _hours(summary["virtual_hours"])),
        (
            "rounds",
            f"{summary['rounds']:,}" + (f" and {summary['rounds_void']} void" if summary["rounds_void"] else ""),
        ),
        ("a round", f"{summary['round_s']:,.0f} s" if summary["round_s"] else "-"),
        ("tokens", short(summary["tokens"])),
        ("tokens a second", short(summary["tokens_per_s"])),
        ("peers online", f"{summary['peers_online']:,.0f} of {summary['peers']:,}"),
        ("utilisation", f"{summary['utilisation']:.0%}"),
        ("sent by a peer", f"{summary['sent_bytes_per_peer'] / 1e6:,.0f} MB"),
        ("energy", f"{summary['energy_kwh']:,.1f} kWh"),
    ]
    if loss is not None and start is not None:
        tiles.insert(0, ("held-out loss", f"{start:.3f} → {loss:.3f}"))
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)


def _hours(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 72 else f"{hours:.1f} h" if hours >= 2 else f"{hours * 60:.0f} min"


def _unit(results: Results) -> tuple[float, str]:
    """Seconds in the unit of the time axes, and its name."""
    return (3600.0, "hours") if results.summary["virtual_hours"] >= 3 else (60.0, "minutes")


def _faults(results: Results) -> list[tuple[float, float]]:
    seconds, _ = _unit(results)
    return [(fault["start_s"] / seconds, fault["end_s"] / seconds) for fault in results.faults]


def _thin(rows: Sequence[Row]) -> Sequence[Row]:
    step = -(-len(rows) // MAX_POINTS) or 1
    return rows[::step]


def _card(title: str, note: str, chart: str, entries: Sequence[tuple[str, str]] = ()) -> str:
    return f"<h2>{escape(title)}</h2><p class='muted'>{escape(note)}</p>{legend(entries) if entries else ''}{chart}"


def _loss(results: Results) -> str:
    seconds, unit = _unit(results)
    rounds = _thin(results.rounds)
    if not any(row["mean_loss"] is not None or row["held_out_loss"] is not None for row in results.rounds):
        return ""
    evaluated = [row for row in results.rounds if row["held_out_loss"] is not None]
    at = [0.0, *(row["closed_s"] / seconds for row in evaluated)]
    held_out = [results.summary["held_out_loss_start"], *(row["held_out_loss"] for row in evaluated)]
    series = [
        Series(
            name="training",
            colour="c1",
            x=[r["closed_s"] / seconds for r in rounds],
            y=[r["mean_loss"] for r in rounds],
        ),
        Series(name="held out", colour="c2", x=at, y=held_out, dots=True),
    ]
    chart = line_chart(series, x_name=unit, y_name="nats a token", shade=_faults(results))
    return _card("Loss against virtual time", "", chart, [("training", "c1"), ("held out", "c2")])


def _tokens(results: Results) -> str:
    seconds, unit = _unit(results)
    rounds = _thin(results.rounds)
    x, y = [row["closed_s"] / seconds for row in rounds], [row["tokens_after"] for row in rounds]
    line = Series(name="tokens", colour="c1", x=[0.0, *x], y=[0, *y])
    chart = line_chart([line], x_name=unit, y_name="tokens", shade=_faults(results))
    return _card("Tokens", "credited at the close of each round", chart)


def _traffic(results: Results) -> str:
    seconds, unit = _unit(results)
    samples = results.timeline
    most = max((sample["sent_bytes"] + sample["coordinator_sent_bytes"] for sample in samples), default=0.0)
    size, name = (1e12, "TB") if most > 2e12 else (1e9, "GB") if most > 2e9 else (1e6, "MB")
    at = [sample["t_s"] / seconds for sample in samples]
    sent = [
        Series(name="all peers", colour="c3", x=at, y=[sample["sent_bytes"] / size for sample in samples]),
        Series(name="coordinator", colour="c4", x=at, y=[s["coordinator_sent_bytes"] / size for s in samples]),
    ]
    chart = line_chart(sent, x_name=unit, y_name=f"{name} sent", shade=_faults(results))
    return _card("Bytes", "sent since the start", chart, [(one.name, one.colour) for one in sent])


def _activity(results: Results) -> str:
    seconds, unit = _unit(results)
    x = [sample["t_s"] / seconds for sample in results.timeline]
    series = [
        Series(name=name, colour=colour, x=x, y=[sample[name] for sample in results.timeline])
        for name, colour in zip(ACTIVITIES, COLOURS, strict=True)
    ]
    used = [one for one in series if any(one.y)]
    chart = area_chart(used, x_name=unit, y_name="peers", shade=_faults(results))
    return _card("What the peers do", "all peers of the scenario", chart, [(one.name, one.colour) for one in used])


def _utilisation(results: Results) -> str:
    seconds, unit = _unit(results)
    x = [sample["t_s"] / seconds for sample in results.timeline]
    line = Series(name="utilisation, %", colour="c1", x=x, y=[100 * s["utilisation"] for s in results.timeline])
    chart = line_chart([line], x_name=unit, y_name="%", shade=_faults(results))
    note = "share of the computing power online that trains at this moment"
    return _card("Utilisation", note, chart)


def _waterfall(results: Results) -> str:
    seconds, unit = _unit(results)
    rows = [row for row in results.rounds if row["merged_s"] is not None]
    middle_s = results.faults[0]["start_s"] if results.faults else results.summary["virtual_hours"] * 1800.0
    before = sum(row["opened_s"] < middle_s for row in rows)
    first = max(0, min(before - MAX_ROUNDS // 2, len(rows) - MAX_ROUNDS))
    spans = [
        Span(
            label=str(row["round"]),
            parts=[
                (row["opened_s"] / seconds, row["trained_s"] / seconds, "c1", _tip(row, "train")),
                (row["trained_s"] / seconds, row["closed_s"] / seconds, "c2", _tip(row, "send")),
                (row["closed_s"] / seconds, row["merged_s"] / seconds, "c3", _tip(row, "merge")),
            ],
        )
        for row in rows[first : first + MAX_ROUNDS]
    ]
    where = "around the first fault" if results.faults else "from the middle of the run"
    note = f"from the opening of a round to that of the next; some {where}"
    entries = [("train, until the last contributor is done", "c1"), ("send", "c2"), ("fetch and merge", "c3")]
    return _card("Rounds", note, waterfall(spans, x_name=unit), entries)


def _tip(row: Row, part: str) -> str:
    edges = {"train": ("opened_s", "trained_s"), "send": ("trained_s", "closed_s"), "merge": ("closed_s", "merged_s")}
    start, end = edges[part]
    who = f"{row['contributions']} of {row['due']} contributed, {row['leased_peers']} trained"
    what = f"{row['codec']}, {row['inner_steps']} steps; closed because {row['closed_because']}"
    return f"round {row['round']}, {part}: {row[end] - row[start]:.1f} s; {who}; {what}"


def _who(results: Results) -> str:
    specs = results.scenario.population
    groups = [(spec.name, [peer for peer in results.peers if peer["population"] == spec.name]) for spec in specs]
    ranked = sorted(results.peers, key=lambda peer: (-peer["flops"], peer["peer"]))
    tenth, half = -(-len(ranked) // 10), -(-len(ranked) // 2)
    if len(ranked) >= 10:
        groups += [("fastest tenth", ranked[:tenth]), ("slower half", ranked[half:])]
    flops = sum(peer["flops"] for peer in ranked) or 1.0
    total = sum(peer["credited_tokens"] for peer in ranked) or 1
    rows = []
    for name, peers in groups:
        tokens = sum(peer["credited_tokens"] for peer in peers)
        bars = [
            (len(peers) / len(ranked), "c7", f"{len(peers):,} peers"),
            (sum(peer["flops"] for peer in peers) / flops, "c4", "of the computing power"),
            (tokens / total, "c1", f"{tokens:,} tokens"),
        ]
        rows.append((name, bars))
    entries = [("of the peers", "c7"), ("of the computing power", "c4"), ("of the tokens credited", "c1")]
    return _card("Who contributed", "shares by population, and by speed", share_bars(rows), entries)


def _largest(results: Results) -> str:
    largest = sorted(results.peers, key=lambda peer: (-peer["credited_tokens"], peer["peer"]))[:12]
    head = "".join(f"<th>{name}</th>" for name in ("peer", "what", "online", "computing", "sent", "tokens", "rounds"))
    body = ""
    for peer in largest:
        cells = (
            peer["peer"],
            peer["population"] + (f" · {peer['attack']}" if peer["attack"] else ""),
            _hours(peer["online_s"] / 3600.0),
            f"{peer['compute_s'] / max(peer['online_s'], 1e-9):.0%}",
            f"{peer['sent_bytes'] / 1e6:,.1f} MB",
            f"{peer['credited_tokens']:,}",
            f"{peer['contributions']}",
        )
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    table = f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return _card("The largest contributions", "", table)
