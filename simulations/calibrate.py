"""`manyhands simulate calibrate`: the world of a real run, as a scenario.

What the run's journal and ledger show becomes the scenario's peers (simulations.calibration). Then that scenario is
simulated, its journal is read in the same way, and what the real run took longer for goes into the scenario as seconds
that the simulator does not model. A last simulation says how near the two are.

Reads only. What no journal records is assumed, and the file says so: who can be dialled, loss of packets, the link of
the coordinator. Times when the coordinator was down are left out.
"""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.run_folder import RunFolder, find_genesis
from coordinator.storage.database import Database
from protocol.documents import Contribution, Genesis, Receipt, open_signed
from protocol.errors import ConfigError
from protocol.run_spec import RunSpec
from protocol.signing import Signed
from simulations.calibration.fit import Figure, Fit, RoundFigures, describe_rounds, fit, fit_overhead
from simulations.calibration.journal import Seen, SeenPeer, read_journal
from simulations.calibration.scenario_file import Extra, RunFacts, render_scenario
from simulations.scenario import parse_scenario
from simulations.simulate import make_learner
from simulations.virtual_run import JOURNAL, VirtualRun

# What is simulated to compare ends after so many rounds' time, or a virtual hour if that is later; a run of fewer
# rounds is simulated with several seeds, since a median of few rounds is mostly chance.
COMPARED_ROUNDS = 100
COMPARED_HOURS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A fitted run. simulated: the rounds when it is simulated; None when none came about."""

    facts: RunFacts
    seen: Seen
    fit: Fit
    simulated: RoundFigures | None
    text: str  # of the scenario file

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.facts.spec.name,
            "run_id": self.facts.run_id,
            "rounds": len(self.seen.rounds),
            "rounds_void": self.seen.num_void,
            "peers": [asdict(peer) for peer in self.fit.peers],
            "lease_s": asdict(self.fit.lease_s),
            "together": self.fit.together,
            "real": asdict(self.fit.rounds),
            "simulated": asdict(self.simulated) if self.simulated else None,
        }


def calibrate(folder: Path) -> Calibration:
    """Fit a run folder. Raises ConfigError for one without a merged round."""
    facts, seen, compute_s = _read_run(folder)
    if not seen.rounds or not compute_s:
        raise ConfigError(f"{folder}: no round was merged yet; calibrate when the run has a few")
    fitted = fit(seen, compute_s)
    bare = tomllib.loads(render_scenario(facts, seen, fitted, {peer.id: Extra() for peer in fitted.peers}))
    extras = _find_extras(fitted, _play(_without_noise(bare, fitted)))
    text = render_scenario(facts, seen, fitted, extras)
    simulated = _simulate(_shorten(tomllib.loads(text), fitted), len(seen.rounds))
    return Calibration(facts=facts, seen=seen, fit=fitted, simulated=simulated, text=text)


# ---- the real run


def _read_run(folder: Path) -> tuple[RunFacts, Seen, dict[int, float]]:
    """The run, its journal, and the seconds inside inner steps that its ledger tells, by lease."""
    home = RunFolder(folder)
    given = home.spec()
    if given.coordinator.database is None and not (folder / "run.db").is_file():
        raise ConfigError(f"{folder}: there is no run.db; this run was never started")
    database = home.open_database(given)
    try:
        signed = find_genesis(database)
        if signed is None:
            raise ConfigError(f"{folder}: the ledger is empty; this run was never started")
        genesis = Genesis.model_validate_json(signed.body)
        state = machine.create(
            genesis.spec,
            num_shards=genesis.num_shards,
            num_parameters=genesis.num_parameters,
            initial_digest=genesis.initial_digest,
        )
        rows = database.read_journal(after_seq=0)
        seen = read_journal(state, ((row.now_s, ev.load_event(row.event)) for row in rows))
        compute_s = dict(_read_compute(database))
    finally:
        database.close()
    facts = RunFacts(
        run_id=genesis.run_id,
        spec=_with_whole_path(genesis.spec),
        num_parameters=genesis.num_parameters,
        is_local=(given.coordinator.advertise or given.coordinator.listen).startswith(("127.", "localhost", "[::1]")),
    )
    return facts, seen, compute_s


def _read_compute(database: Database) -> Iterator[tuple[int, float]]:
    for row in database.read_ledger(kinds=("receipt",)):
        receipt = Receipt.model_validate_json(row.body)
        yield receipt.lease_id, open_signed(Signed.from_json(receipt.contribution), Contribution).compute_s


def _with_whole_path(spec: RunSpec) -> RunSpec:
    """The text's path, where it is one that is here: the scenario may be simulated from another folder."""
    path = Path(spec.data.source)
    if not path.exists():
        return spec
    return spec.model_copy(update={"data": spec.data.model_copy(update={"source": str(path.resolve())})})


# ---- the simulated one


def _without_noise(table: dict[str, Any], fitted: Fit) -> dict[str, Any]:
    """Everybody is here from the beginning and always equally fast: what is left is what is modelled."""
    for population in table["population"]:
        population["measured"] |= {"jitter": 0.0, "start_s": 0.0, "sessions_hours": [[0.0]]}
    return _shorten(table, fitted)


def _shorten(table: dict[str, Any], fitted: Fit) -> dict[str, Any]:
    begins = min(population["measured"]["sessions_hours"][0][0] for population in table["population"])
    enough = begins + max(COMPARED_HOURS, COMPARED_ROUNDS * fitted.rounds.round_s.value / 3600.0)
    return table | {"hours": min(table["hours"], enough)}


def _play(table: dict[str, Any]) -> Seen:
    """Simulate a scenario without tensors, and read its journal."""
    scenario = parse_scenario(table, "the calibrated scenario")
    learner, num_shards = make_learner(scenario)
    state = machine.create(
        scenario.spec,
        num_shards=num_shards,
        num_parameters=learner.num_parameters,
        initial_digest=learner.digest,
    )
    with TemporaryDirectory() as folder:
        run = VirtualRun(scenario, learner, num_shards, Path(folder))
        run.run()
        run.finish()
        with (Path(folder) / JOURNAL).open(encoding="utf-8") as journal:
            rows = (json.loads(line) for line in journal)
            return read_journal(
                state, ((row["now_s"], ev.load_event(json.dumps(row["event"]).encode())) for row in rows)
            )


def _simulate(table: dict[str, Any], num_rounds: int) -> RoundFigures | None:
    """The rounds of the finished scenario."""
    runs = [_play(table | {"seed": table["seed"] + number}) for number in range(-(-COMPARED_ROUNDS // num_rounds))]
    return describe_rounds(runs) if any(seen.rounds for seen in runs) else None


def _compute_s(seen: Seen, fitted: Fit) -> dict[int, float]:
    """By lease, at the speeds that were fitted: a simulated header does not say it."""
    return {
        lease.lease_id: lease.inner_steps / peer.steps_per_s.value
        for peer, simulated in zip(fitted.peers, seen.peers.values(), strict=True)
        for lease in simulated.leases
    }


def _find_extras(fitted: Fit, simulated: Seen) -> dict[str, Extra]:
    """What each peer took longer for than its simulated twin."""
    overhead_s = fit_overhead(simulated, _compute_s(simulated, fitted)) if simulated.rounds else None
    extras = {}
    for peer, twin in zip(fitted.peers, simulated.peers.values(), strict=True):
        extras[peer.id] = Extra(
            start_s=_beyond(peer.start_s, twin.starts_s),
            lease_s=_beyond(fitted.lease_s, [overhead_s.value] if overhead_s else []),
            reveal_s=_beyond(peer.reveal_s, _reveals(twin)),
            merge_s=_beyond(peer.merge_s, twin.merges_s),
        )
    return extras


def _reveals(peer: SeenPeer) -> list[float]:
    return [lease.checked_s - lease.header_s for lease in peer.leases if lease.checked_s and lease.header_s]


def _beyond(real: Figure | None, simulated: list[float]) -> float:
    return max(0.0, real.value - (median(simulated) if simulated else 0.0)) if real else 0.0
