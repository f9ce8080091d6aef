"""Calibration on runs whose world is known, since they were simulated: their folders look like a real run's."""

import json
import tomllib
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.core import events as ev
from coordinator.core import machine
from coordinator.core.effects import GrantLease
from coordinator.ledger import LedgerWriter
from coordinator.storage.database import Batch, Database, JournalRow, LedgerRow, sqlite_url
from protocol.documents import PROTOCOL_VERSION, Contribution, Genesis, Receipt, ShardRef, sign
from protocol.errors import ConfigError
from protocol.identity import Identity
from protocol.run_template import render_spec
from protocol.signing import sha256_hex
from simulations.calibrate import Calibration, calibrate
from simulations.calibration.fit import describe, fit, fit_overhead
from simulations.calibration.journal import Seen, SeenLease, SeenPeer, SeenRound, read_journal
from simulations.commands import app
from simulations.scenario import Scenario, parse_scenario
from simulations.simulate import make_learner
from simulations.virtual_run import JOURNAL, VirtualRun
from tests.core_run import CoreRun

RUN_ID = "0123456789abcdef"
HASH = sha256_hex(b"")
STEP_FLOPS = 6.0 * 1_000_000 * 8 * 128  # of the scenarios here
FAST: dict[str, Any] = {
    "flops": 5.0 * STEP_FLOPS,
    "up_bps": 2e7,
    "down_bps": 1e8,
    "latency_s": 0.02,
    "jitter": 0.05,
    "dialable": 1.0,
}
SLOW: dict[str, Any] = {
    **FAST,
    "flops": 3.0 * STEP_FLOPS,
    "up_bps": 5e6,
    "lease_s": 0.4,
    "merge_s": 0.3,
    "start_s": 9.0,
}


def make_scenario(*measured: dict[str, Any], hours: float = 0.5, tokens: int = 10**9) -> Scenario:
    peers = [
        {"name": f"peer {index}", "count": 1, "device": "desktop", "link": "fixed", "measured": each}
        for index, each in enumerate(measured)
    ]
    rounds = {"inner_steps": 50, "min_peers": 1, "exchange_s": 30.0}
    run = {"train": {"tokens": tokens}, "data": {"shard_steps": 5}, "round": rounds}
    table = {"name": "known", "hours": hours, "model": {"parameters": 1_000_000}, "run": run, "population": peers}
    return parse_scenario(table, "known.toml")


@dataclass
class KnownRun:
    """A simulated run, and a run folder with its journal and receipts."""

    scenario: Scenario
    folder: Path

    def __post_init__(self) -> None:
        learner, num_shards = make_learner(self.scenario)
        digest = learner.digest
        trace = self.folder / "trace"
        self.run = VirtualRun(self.scenario, learner, num_shards, trace)
        self.run.run()
        self.run.finish()
        count = self.scenario.num_peers
        identities = sorted((Identity.generate() for _ in range(count)), key=lambda identity: identity.peer_id)
        self.identities = dict(zip(self.run.world.by_id, identities, strict=True))
        text = (trace / JOURNAL).read_text()
        for peer, identity in self.identities.items():
            text = text.replace(f'"{peer}"', f'"{identity.peer_id}"')
        self.rows = [json.loads(line) for line in text.splitlines()]
        (self.folder / "run.toml").write_text(render_spec(self.scenario.spec))
        writer = LedgerWriter(Identity.generate(), RUN_ID, self.scenario.spec, None)
        genesis = writer.append_genesis(lambda *place: self.make_genesis(num_shards, digest, *place), 0.0)
        database = Database(sqlite_url(self.folder))
        database.commit(Batch(journal=self.make_journal(), ledger=[genesis, *self.make_receipts()]))
        database.close()

    def make_genesis(self, num_shards: int, digest: str, seq: int, previous: str) -> Genesis:
        return Genesis(
            run_id=RUN_ID,
            seq=seq,
            previous=previous,
            protocol_version=PROTOCOL_VERSION,
            spec=self.scenario.spec,
            created_unix_s=1_800_000_000,
            num_parameters=self.run.world.learner.num_parameters,
            initial_digest=digest,
            model_config_hash=HASH,
            tokenizer_hash=None,
            shard_index_hash=HASH,
            held_out_hash=HASH,
            num_shards=num_shards,
            vocabulary_size=256,
        )

    def make_journal(self) -> list[JournalRow]:
        return [
            JournalRow(seq=seq, now_s=row["now_s"], unix_s=row["now_s"], event=json.dumps(row["event"]).encode())
            for seq, row in enumerate(self.rows, 1)
        ]

    def make_receipts(self) -> list[LedgerRow]:
        """Of every header, accepted or not, with the compute time that its peer's speed makes."""
        step_s = {
            identity.peer_id: float(self.run.world.step_s[self.run.world.by_id[peer].index])
            for peer, identity in self.identities.items()
        }
        signers = {identity.peer_id: identity for identity in self.identities.values()}
        headers = [row["event"] for row in self.rows if row["event"]["kind"] == "contribution_committed"]
        receipts = []
        for seq, event in enumerate(headers, 1):
            units = tuple(ShardRef(pass_index=unit[0], index=unit[1]) for unit in event["units"])
            common = {"run_id": RUN_ID, "round": 0, "peer": event["peer"], "lease_id": event["lease_id"]}
            header = Contribution(
                **common,
                base_digest=event["base_digest"],
                shards=units,
                inner_steps=event["inner_steps"],
                tokens=event["tokens"],
                mean_loss=1.0,
                compute_s=event["inner_steps"] * step_s[event["peer"]],
                codec=event["codec"],
                payload_hash=event["payload_hash"],
                payload_bytes=event["payload_bytes"],
            )
            signed = sign(header, signers[event["peer"]])
            receipt = Receipt(
                **common, seq=seq, previous=HASH, shards=units, tokens=event["tokens"], contribution=signed.to_json()
            )
            body = sign(receipt, signers[event["peer"]])
            receipts.append(
                LedgerRow(
                    seq=seq,
                    kind="receipt",
                    round=0,
                    unix_s=0.0,
                    body=body.body,
                    public_key=body.public_key,
                    signature=body.signature,
                )
            )
        return receipts


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    sessions = {"sessions_hours": [[0.0, 0.1], [0.2]]}
    return calibrate(KnownRun(make_scenario(FAST, SLOW, FAST | sessions), tmp_path_factory.mktemp("known")).folder)


def test_speeds_are_recovered(calibrated: Calibration) -> None:
    # the fast ones have none of the slow one's overhead, which therefore counts as slowness
    overhead = 0.4 / 50 * 4.0
    speeds = [peer.steps_per_s.value for peer in calibrated.fit.peers]
    assert speeds == pytest.approx([5.0, 3.0 * (1 - overhead), 5.0], rel=0.03)
    assert all(peer.steps_per_s.count > 20 for peer in calibrated.fit.peers)
    assert [peer.jitter for peer in calibrated.fit.peers] == pytest.approx([0.05] * 3, abs=0.03)


def test_links_are_recovered(calibrated: Calibration) -> None:
    uploads = [peer.up_bps.value for peer in calibrated.fit.peers if peer.up_bps]
    assert uploads == pytest.approx([2e7, 5e6, 2e7], rel=0.25)
    latencies = [peer.latency_s.value for peer in calibrated.fit.peers if peer.latency_s]
    assert latencies == pytest.approx([0.01] * 3, abs=0.01)  # half of a reveal, whose answer is part of the transfer


def test_sessions_and_starts_are_recovered(calibrated: Calibration) -> None:
    here = [peer.sessions_hours for peer in calibrated.fit.peers]
    assert [len(sessions) for sessions in here] == [1, 1, 2]
    assert here[2][0] == pytest.approx([0.0, 0.1], abs=1e-3)
    assert here[2][1] == pytest.approx([0.2], abs=1e-3)
    starts = [peer.start_s.value for peer in calibrated.fit.peers if peer.start_s]
    transfer_s = 8 * 4_000_000 / 2e7  # of the state, from another peer at the most
    assert 6.0 < starts[0] < 6.5 + transfer_s
    assert 9.0 < starts[1] < 9.5 + transfer_s


def test_the_simulated_rounds_take_as_long(calibrated: Calibration) -> None:
    real, simulated = calibrated.fit.rounds, calibrated.simulated
    assert simulated is not None
    assert simulated.round_s.value == pytest.approx(real.round_s.value, rel=0.03)
    assert simulated.payload_bytes.value == real.payload_bytes.value
    assert real.merge_s is not None
    assert simulated.merge_s is not None
    assert simulated.merge_s.value == pytest.approx(real.merge_s.value, rel=0.1)


def test_the_file_is_a_scenario_that_says_what_was_seen(calibrated: Calibration) -> None:
    scenario = parse_scenario(tomllib.loads(calibrated.text), "known-as-run.toml")
    assert [population.count for population in scenario.population] == [1, 1, 1]
    assert scenario.spec.round.inner_steps == 50
    assert scenario.model.parameters == 1_000_000
    assert "inner steps a second;" in calibrated.text
    assert "leases, ±" in calibrated.text
    assert json.dumps(calibrated.to_json())


def test_a_run_that_is_not_finished_is_simulated_to_its_end(tmp_path: Path) -> None:
    whole = calibrate(KnownRun(make_scenario(FAST, tokens=5_000_000), tmp_path / "whole").folder)
    assert whole.seen.finished
    begun = calibrate(KnownRun(make_scenario(FAST, tokens=5_000_000, hours=0.15), tmp_path / "begun").folder)
    assert not begun.seen.finished
    hours = [tomllib.loads(each.text)["hours"] for each in (whole, begun)]
    assert hours[1] == pytest.approx(hours[0], rel=0.1)


def test_the_command_writes_the_file_once_and_says_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.calibrate.COMPARED_ROUNDS", 10)  # how well it fits is tested elsewhere
    monkeypatch.setattr("simulations.calibrate.COMPARED_HOURS", 0.1)
    folder, out = KnownRun(make_scenario(FAST, SLOW, hours=0.1), tmp_path).folder, tmp_path / "known-as-run.toml"
    command = ["calibrate", str(folder), "--out", str(out)]
    printed = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert "from opening to opening, s" in printed
    assert f"wrote {out}; `manyhands simulate {out}` simulates it" in printed
    with pytest.raises(ConfigError, match="is there already; --force replaces it"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    again = CliRunner().invoke(app, [*command, "--force", "--json"], catch_exceptions=False)
    assert json.loads(again.output)["scenario"] == str(out)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no run.toml"):
        calibrate(tmp_path)
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(ConfigError, match=r"there is no run.db; this run was never started"):
        calibrate(tmp_path)
    assert not (tmp_path / "run.db").exists()
    Database(sqlite_url(tmp_path)).close()
    with pytest.raises(ConfigError, match=r"the ledger is empty"):
        calibrate(tmp_path)


def test_a_run_without_a_merged_round_is_one_line(tmp_path: Path) -> None:
    known = KnownRun(make_scenario(FAST, hours=0.002), tmp_path)
    with pytest.raises(ConfigError, match="no round was merged yet"):
        calibrate(known.folder)


# ---- the journal


def read(run: CoreRun) -> Seen:
    return read_journal(run.fresh_state(), [(now_s, ev.load_event(event)) for now_s, event in run.journal])


def test_a_connection_that_is_soon_back_is_one_session() -> None:
    run = CoreRun()
    run.join("ann", "bob")
    run.send(ev.PeerLeft(peer="ann", reason="gone"), after_s=10.0)
    run.send(ev.PeerLeft(peer="bob", reason="gone"), after_s=5.0)
    run.now_s += 20.0
    run.join("ann")
    run.now_s += 20.0
    run.join("bob")
    peers = read(run).peers
    assert peers["ann"].sessions == [[0.0]]
    assert peers["bob"].sessions == [[0.0, 15.0], [55.0]]


def test_times_are_those_of_lease_header_and_payload() -> None:
    run = CoreRun()
    run.join("ann")
    run.now_s += 3.0
    run.report("ann")
    lease = run.granted["ann"]
    assert isinstance(lease, GrantLease)
    run.contribute("ann", after_s=7.0)
    run.now_s += 2.0
    run.report("ann")
    seen = read(run)
    peer = seen.peers["ann"]
    assert peer.starts_s == [3.0]
    assert (peer.leases[0].granted_s, peer.leases[0].header_s) == (3.0, 10.0)
    assert peer.merges_s == [2.0]
    assert (seen.rounds[0].opened_s, seen.rounds[0].closed_s, seen.rounds[0].next_s) == (3.0, 10.0, 12.0)


# ---- the figures


def seen_of(spans_s: dict[str, list[float]]) -> Seen:
    """Peers with leases of ten steps, one a round, that took so long."""
    peers = {}
    for number, (name, spans) in enumerate(spans_s.items()):
        leases = [
            SeenLease(
                lease_id=100 * number + round_,
                round=round_,
                granted_s=0.0,
                header_s=span,
                inner_steps=10,
                payload_bytes=9,
            )
            for round_, span in enumerate(spans)
        ]
        peers[name] = SeenPeer(name=name, device="", sessions=[[0.0]], leases=leases)
    whole = {"contributions": 1, "payload_bytes": 9, "codec": "int2", "inner_steps": 10}
    rounds = [SeenRound(round=0, opened_s=0.0, closed_s=1.0, next_s=None, **whole)]
    return Seen(peers=peers, rounds=rounds, num_void=0, has_validator=False, finished=False, tokens=1, ends_s=1.0)


def lease_ids(seen: Seen, name: str) -> list[int]:
    return [lease.lease_id for lease in seen.peers[name].leases]


def test_a_figure_is_a_median_that_one_outlier_does_not_move() -> None:
    figure = describe([1.0, 1.1, 0.9, 1.0, 1000.0])
    assert figure is not None
    assert (figure.value, figure.count) == (1.0, 5)
    assert figure.spread == pytest.approx(0.148, abs=0.001)
    assert describe([]) is None


def test_sleep_of_a_throttled_peer_is_told_from_overhead() -> None:
    compute_s = np.random.default_rng(0).uniform(1.0, 1.3, 9).tolist()
    seen = seen_of({"ann": [each / 0.4 + 0.25 for each in compute_s]})
    inside = dict(zip(lease_ids(seen, "ann"), compute_s, strict=True))
    assert fit_overhead(seen, inside).value == pytest.approx(0.25, abs=1e-6)
    fitted = fit(seen, inside)
    assert fitted.peers[0].steps_per_s.value == pytest.approx(10 * 0.4 / float(np.median(compute_s)))


def test_what_slows_everybody_down_is_no_jitter() -> None:
    busy = np.exp(np.random.default_rng(0).normal(0.0, 0.3, 20))
    own = np.exp(np.random.default_rng(1).normal(0.0, 0.05, 20))
    seen = seen_of({"ann": (2.0 * busy).tolist(), "bob": (3.0 * busy * own).tolist()})
    inside = {lease.lease_id: lease.header_s or 0.0 for peer in seen.peers.values() for lease in peer.leases}
    fitted = fit(seen, inside)
    assert all(peer.jitter < 0.08 for peer in fitted.peers)
    assert fitted.together == pytest.approx(exp(0.3) - 1.0, rel=0.4)


def test_a_peer_that_never_contributed_has_its_claim_or_the_others_speed() -> None:
    seen = seen_of({"ann": [2.0] * 3})
    seen.peers["bob"] = SeenPeer(name="bob", device="", sessions=[[0.0]], claimed_steps_per_s=7.0)
    seen.peers["cleo"] = SeenPeer(name="cleo", device="", sessions=[[0.0]])
    fitted = fit(seen, dict.fromkeys(lease_ids(seen, "ann"), 2.0))
    assert [peer.steps_per_s.value for peer in fitted.peers] == pytest.approx([5.0, 7.0, 5.0])
    assert [peer.speed_from for peer in fitted.peers] == ["leases", "its own claim", "the other peers"]


# ---- what a scenario says of measured peers


def test_listed_sessions_are_kept(tmp_path: Path) -> None:
    scenario = make_scenario(FAST, FAST | {"sessions_hours": [[0.05, 0.1], [0.2, 0.3]]})
    known = KnownRun(scenario, tmp_path)
    peer = known.run.world.peers[1]
    assert peer.sessions == 2
    assert peer.online_s == pytest.approx(0.15 * 3600.0)


def test_the_trace_is_replayed_by_a_fresh_core(tmp_path: Path) -> None:
    known = KnownRun(make_scenario(FAST, SLOW), tmp_path)
    assert calibrate(known.folder).seen.tokens == known.run.coordinator.state.tokens_credited
    assert machine.next_deadline(known.run.coordinator.state) is not None
