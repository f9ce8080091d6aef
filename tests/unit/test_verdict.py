"""The verdict as a pure function of a status's facts: each cause, their order, and what says nothing."""

from typing import Any

import pytest

from coordinator.verdict import Level, describe_span, judge

NOW = 10_000.0


def make_peer(name: str, **changes: Any) -> dict[str, Any]:
    peer = {
        "peer": f"12D3KooW{name}",
        "name": name,
        "role": "worker",
        "pause_reason": "",
        "steps_per_s": 10.0,
        "connected": True,
        "activity": "training",
        "lease": "open",
        "heartbeat_age_s": 1.0,
        "unmoved_s": 1.0,
        "lost": None,
    }
    return peer | changes


def make_loss(age_s: float, *, held_lease: bool = True, silent_s: float = 1.0) -> dict[str, Any]:
    lost = {"unix_s": NOW - age_s, "held_lease": held_lease, "silent_s": silent_s}
    return {"connected": False, "lease": "away", "heartbeat_age_s": None, "unmoved_s": None, "lost": lost}


def make_facts(*peers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    facts = {
        "phase": "train",
        "reason": "why",
        "round": 12,
        "round_expected_unix_s": NOW + 40.5,
        "started_unix_s": NOW - 5_000,
        "restarted": False,
        "workers_before_restart": 0,
        "min_peers": 1,
        "heartbeat_timeout_s": 15.0,
        "disk_free_bytes": 100 << 30,
        "validator_expected": True,
        "troubles": [],
        "peers": [*peers, make_peer("validator", role="validator", lease="")],
    }
    return facts | changes


def make_trouble(kind: str, age_s: float, count: int = 1) -> dict[str, Any]:
    return {
        "kind": kind,
        "unix_s": NOW - age_s,
        "round": 12,
        "peer": "eve-id",
        "name": "" if kind == "void" else "eve",
        "reason": "because",
        "count": count,
    }


ADA, BEN = make_peer("ada"), make_peer("ben")
LOST_BEN = make_peer("ben", **make_loss(5))
NO_VALIDATOR = make_peer("validator", role="validator", **make_loss(3))


def test_healthy_run_says_what_goes_on_when_nothing_is_wrong() -> None:
    verdict = judge(make_facts(ADA, BEN), NOW)
    assert (verdict.level, verdict.also) == (Level.HEALTHY, ())
    assert verdict.cause == "round 12: 2 of 2 workers train, merge expected in 40 s"
    merging = judge(make_facts(ADA, BEN, phase="merge", reason="1 of 2 workers have merged round 11"), NOW)
    assert merging.cause == "1 of 2 workers have merged round 11"


@pytest.mark.parametrize(
    ("facts", "level", "cause"),
    [
        (make_facts(ADA, LOST_BEN), "degraded", "worker ben was lost: its connection ended without goodbye"),
        (
            make_facts(ADA, make_peer("ben", **make_loss(5, silent_s=15.0))),
            "degraded",
            "worker ben was lost: nothing was heard from it for 15 s",
        ),
        (
            make_facts(ADA, make_peer("ben", **make_loss(5, held_lease=False))),
            "degraded",
            "worker ben was lost: its connection ended between two leases",
        ),
        (make_facts(LOST_BEN, make_peer("cyd", **make_loss(7))), "degraded", "2 workers were lost: ben, cyd"),
        (make_facts(ADA, make_peer("ben", heartbeat_age_s=8.0)), "degraded", "worker ben stalls: connected, but no"),
        (make_facts(ADA, make_peer("ben", unmoved_s=9.0)), "degraded", "worker ben stalls: connected and with work"),
        (
            make_facts(make_peer("ada", unmoved_s=9.0), make_peer("ben", unmoved_s=9.0)),
            "degraded",
            "2 workers stall (ada, ben): connected and with work",
        ),
        (make_facts(ADA, peers=[ADA, NO_VALIDATOR]), "degraded", "the validator is gone"),
        (make_facts(ADA, peers=[ADA]), "degraded", "the validator has not joined"),
        (
            make_facts(ADA, restarted=True, started_unix_s=NOW - 20, workers_before_restart=2),
            "degraded",
            "the coordinator was restarted; 1 of 2 workers are back",
        ),
        (make_facts(ADA, disk_free_bytes=0), "stalled", "the disk of the run folder is full: 0 MB"),
        (make_facts(ADA, disk_free_bytes=500 << 20), "degraded", "little room is left on the disk of the run folder"),
        (
            make_facts(ADA, troubles=[make_trouble("refused", 5)]),
            "degraded",
            "worker eve, round 12: a contribution was",
        ),
        (make_facts(ADA, troubles=[make_trouble("resync", 5)]), "degraded", "worker eve, round 12: fetches the state"),
        (make_facts(ADA, troubles=[make_trouble("void", 500)]), "degraded", "round 12 was void: because"),
        (make_facts(ADA, troubles=[make_trouble("void", 5, 3)]), "stalled", "round 12 was void 3 times: because"),
        (make_facts(phase="waiting_for_peers"), "stalled", "too few workers: why"),
        (make_facts(ADA, phase="warmup"), "degraded", "warming up: why"),
        (make_facts(make_peer("ada", pause_reason="on_battery")), "stalled", "the only worker is paused (on battery)"),
        (make_facts(ADA, phase="paused"), "stalled", "paused by the operator"),
        (make_facts(LOST_BEN, phase="finished"), "healthy", "finished: why"),
    ],
)
def test_verdict_names_the_cause_when_one_thing_is_wrong(facts: dict[str, Any], level: str, cause: str) -> None:
    verdict = judge(facts, NOW)
    assert verdict.level == level
    assert verdict.cause.startswith(cause)


@pytest.mark.parametrize(
    "facts",
    [
        make_facts(ADA, make_peer("ben", **make_loss(61))),
        make_facts(ADA, make_peer("ben", heartbeat_age_s=7.0)),
        make_facts(ADA, make_peer("ben", unmoved_s=9.0, steps_per_s=0.2)),
        make_facts(ADA, make_peer("ben", unmoved_s=9.0, activity="sending")),
        make_facts(ADA, make_peer("ben", unmoved_s=9.0, lease="accepted")),
        make_facts(ADA, restarted=True, started_unix_s=NOW - 20, workers_before_restart=1),
        make_facts(ADA, restarted=True, started_unix_s=NOW - 200, workers_before_restart=9),
        make_facts(ADA, peers=[ADA, NO_VALIDATOR], validator_expected=False),
        make_facts(ADA, troubles=[make_trouble("refused", 61)]),
        make_facts(ADA, peers=[ADA], started_unix_s=NOW - 30),
    ],
)
def test_verdict_is_healthy_when_it_is_long_ago_or_too_soon_to_say(facts: dict[str, Any]) -> None:
    assert judge(facts, NOW).level is Level.HEALTHY


def test_the_cause_comes_first_and_the_level_is_the_worst_when_several_things_are_wrong() -> None:
    verdict = judge(make_facts(LOST_BEN, phase="waiting_for_peers", troubles=[make_trouble("refused", 1)]), NOW)
    assert verdict.level is Level.STALLED
    assert verdict.cause.startswith("worker ben was lost")
    assert [cause.partition(":")[0] for cause in verdict.also] == ["too few workers", "worker eve, round 12"]
    assert verdict.since_unix_s == NOW - 5


def test_the_newest_comes_first_when_causes_are_of_one_kind() -> None:
    stalled = make_peer("ada", heartbeat_age_s=8.0)
    verdict = judge(make_facts(peers=[stalled, make_peer("ben", **make_loss(20)), NO_VALIDATOR]), NOW)
    causes = [verdict.cause, *verdict.also]
    assert [cause.split()[1] for cause in causes] == ["validator", "ada", "ben"]


def test_a_hostile_name_is_short_and_plain_when_it_is_in_the_cause() -> None:
    cause = judge(make_facts(make_peer("\x1b[31m\n" + "x" * 10_000, **make_loss(5)), phase="train"), NOW).cause
    assert len(cause) < 160
    assert cause.isprintable()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.9, "59 s"), (61, "1 min"), (3720, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_span_has_two_units_at_most_when_it_is_long(seconds: float, words: str) -> None:
    assert describe_span(seconds) == words
