"""What a stranger gets from the coordinator's port: health and reflection, and otherwise a refusal with a sentence."""

import asyncio
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator import operator
from coordinator.run_folder import RunFolder
from protocol.documents import PROTOCOL_VERSION, TLS_NAME, JoinRequest, OperatorCommand, sign
from protocol.envelope import pack
from protocol.identity import Identity
from protocol.invite import decode_invite
from protocol.wire import coordinator_pb2 as pb
from protocol.wire.coordinator_pb2_grpc import CoordinatorServiceStub
from tests.processes import RunningCoordinator, start_coordinator

SERVICE = "manyhands.v1.CoordinatorService"


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    folder = tmp_path_factory.mktemp("service") / "run"
    with start_coordinator(folder, options=["--no-validator"]) as running:
        yield running


@pytest.fixture
def channel(coordinator: RunningCoordinator) -> Iterator[grpc.Channel]:
    certificate = (coordinator.folder / "tls.crt").read_bytes()
    options = (("grpc.ssl_target_name_override", TLS_NAME),)
    with grpc.secure_channel(coordinator.address, grpc.ssl_channel_credentials(certificate), options) as channel:
        yield channel


class Stranger:
    """A session spoken by hand."""

    def __init__(self, channel: grpc.Channel, coordinator: RunningCoordinator) -> None:
        self.identity = Identity.generate()
        self.invite = coordinator.invite
        self.run_id = decode_invite(coordinator.invite)[0].run_id
        self._channel = channel

    def open(self, messages: Iterator[pb.PeerMessage]) -> Iterator[pb.CoordinatorMessage]:
        """A session that says these."""
        return iter(CoordinatorServiceStub(self._channel).Session(messages, timeout=20))

    def converse(self, first: Any) -> pb.CoordinatorMessage:
        """The coordinator's answer to `first(nonce)`, the message that follows its challenge."""
        nonces: queue.SimpleQueue[str] = queue.SimpleQueue()

        def messages() -> Iterator[pb.PeerMessage]:
            yield first(nonces.get(timeout=20))

        answers = self.open(messages())
        nonces.put(next(answers).challenge.nonce)
        return next(answers)

    def join(self, nonce: str, **changes: Any) -> pb.PeerMessage:
        facts: dict[str, Any] = {
            "run_id": self.run_id,
            "peer": self.identity.peer_id,
            "nonce": nonce,
            "invite": self.invite,
            "protocol_version": PROTOCOL_VERSION,
            "software": "test",
            "name": "stranger",
            "device": "none",
            "addresses": (),
            "lease_id": None,
        }
        return pb.PeerMessage(join_request=pack(sign(JoinRequest(**{**facts, **changes}), self.identity)))


@pytest.fixture
def stranger(channel: grpc.Channel, coordinator: RunningCoordinator) -> Stranger:
    return Stranger(channel, coordinator)


def test_service_is_healthy_when_it_runs(channel: grpc.Channel) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_service_is_listed_when_reflection_is_asked(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(iter(stub.ServerReflectionInfo(iter([request]), timeout=10)))
    assert SERVICE in [service.name for service in answer.list_services_response.service]


def test_peer_is_welcomed_when_its_request_is_in_order(stranger: Stranger) -> None:
    assert stranger.converse(stranger.join).WhichOneof("message") == "welcome"


def test_recorded_join_request_is_refused_when_it_is_sent_again(stranger: Stranger) -> None:
    answer = stranger.converse(lambda _: stranger.join("ab" * 32))
    assert answer.refused.code == "join"
    assert "challenge" in answer.refused.reason


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, PROTOCOL_VERSION - 2])
def test_join_is_refused_when_the_protocol_version_is_not_spoken(stranger: Stranger, version: int) -> None:
    answer = stranger.converse(lambda nonce: stranger.join(nonce, protocol_version=version))
    assert "pip install --upgrade manyhands" in answer.refused.reason


def test_peer_of_the_version_before_is_welcomed(stranger: Stranger) -> None:
    answer = stranger.converse(lambda nonce: stranger.join(nonce, protocol_version=PROTOCOL_VERSION - 1))
    assert answer.WhichOneof("message") == "welcome"


def test_join_is_refused_when_another_peer_signed_it(stranger: Stranger) -> None:
    other = Identity.generate().peer_id
    answer = stranger.converse(lambda nonce: stranger.join(nonce, peer=other))
    assert answer.WhichOneof("message") == "refused"


def test_join_is_refused_when_it_is_garbage(stranger: Stranger) -> None:
    garbage = pb.PeerMessage(join_request=pb.SignedDocument(body=b"\xff\x00", public_key=b"1", signature=b"2"))
    assert stranger.converse(lambda _: garbage).WhichOneof("message") == "refused"


def test_session_is_refused_when_it_begins_with_something_else(stranger: Stranger) -> None:
    answer = stranger.converse(lambda _: pb.PeerMessage(heartbeat=pb.Heartbeat(activity="x")))
    assert answer.WhichOneof("message") == "refused"


@pytest.mark.parametrize("token", ["", "00" * 32])
def test_blobs_and_ledger_are_refused_when_the_session_is_unknown(channel: grpc.Channel, token: str) -> None:
    stub, metadata = CoordinatorServiceStub(channel), (("session-token", token),)
    for call in (
        lambda: list(stub.FetchBlobs(pb.FetchBlobsRequest(hashes=["ab" * 32]), metadata=metadata, timeout=10)),
        lambda: list(stub.GetLedger(pb.GetLedgerRequest(), metadata=metadata, timeout=10)),
        lambda: stub.PushBlob(iter([pb.BlobChunk(hash="ab" * 32, size=1, data=b"x")]), metadata=metadata, timeout=10),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def operator_command(run_id: str, **changes: Any) -> OperatorCommand:
    import time

    facts: dict[str, Any] = {"run_id": run_id, "verb": "status", "nonce": "cd" * 32, "unix_s": int(time.time())}
    return OperatorCommand(**{**facts, **changes})


def test_operator_command_is_refused_when_a_stranger_signs_it(channel: grpc.Channel, stranger: Stranger) -> None:
    request = pb.OperatorRequest(command=pack(sign(operator_command(stranger.run_id), stranger.identity)))
    with pytest.raises(grpc.RpcError) as refused:
        CoordinatorServiceStub(channel).Operate(request, timeout=10)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_operator_command_is_refused_when_it_is_replayed_or_old(
    channel: grpc.Channel, coordinator: RunningCoordinator, stranger: Stranger
) -> None:
    identity = Identity.load_or_create(coordinator.folder / "coordinator.key")
    stub = CoordinatorServiceStub(channel)
    fresh = pb.OperatorRequest(command=pack(sign(operator_command(stranger.run_id), identity)))
    assert stub.Operate(fresh, timeout=10).json.startswith("{")
    old = pb.OperatorRequest(command=pack(sign(operator_command(stranger.run_id, unix_s=1, nonce="ef" * 32), identity)))
    for request in (fresh, old):
        with pytest.raises(grpc.RpcError) as refused:
            stub.Operate(request, timeout=10)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_coordinator_process_never_loads_torch(coordinator: RunningCoordinator) -> None:
    maps = Path(f"/proc/{coordinator.pid}/maps")
    if not maps.exists():
        pytest.skip("only Linux shows what a process has loaded")
    assert "/torch/" not in maps.read_text()


# ---- the operator's word on who may join


class Conversation:
    """A session spoken by hand that goes on: a stranger that has joined."""

    def __init__(self, stranger: Stranger) -> None:
        self._mine: queue.SimpleQueue[pb.PeerMessage | None] = queue.SimpleQueue()
        self._answers = stranger.open(iter(self._mine.get, None))
        self.say(stranger.join(self.hear().challenge.nonce))

    def say(self, message: pb.PeerMessage) -> None:
        self._mine.put(message)

    def hear(self) -> pb.CoordinatorMessage:
        return next(self._answers)


def operate(coordinator: RunningCoordinator, verb: Any, **options: Any) -> dict[str, Any]:
    return asyncio.run(operator.operate(RunFolder(coordinator.folder), verb, **options))


def find(coordinator: RunningCoordinator, stranger: Stranger) -> dict[str, Any]:
    peers = operate(coordinator, "status")["peers"]
    return next(peer for peer in peers if peer["peer"] == stranger.identity.peer_id)


def test_session_gets_nothing_of_the_run_when_it_waits_for_approval(tmp_path: Path) -> None:
    with start_coordinator(
        tmp_path / "run", options=["--no-validator"], invite={"approval": True}, round={"heartbeat_timeout_s": 1.0}
    ) as coordinator:
        certificate = (coordinator.folder / "tls.crt").read_bytes()
        options = (("grpc.ssl_target_name_override", TLS_NAME),)
        with grpc.secure_channel(coordinator.address, grpc.ssl_channel_credentials(certificate), options) as channel:
            stranger = Stranger(channel, coordinator)
            session = Conversation(stranger)
            notice = session.hear()
            assert notice.phase == pb.PhaseNotice(
                phase="waiting_for_approval", reason="waiting for the operator's approval"
            )
            session.say(pb.PeerMessage(state=pb.StateReport(round=0, digest="ab" * 32)))
            operate(coordinator, "pause")
            operate(coordinator, "resume")
            assert find(coordinator, stranger)["status"] == "syncing", "what it says of its state does not count"
            operate(coordinator, "approve", peer=stranger.identity.peer_id)
            welcome = session.hear()  # and not the phases in between
            assert len(welcome.welcome.session_token) == 64
            assert session.hear().phase.phase == "warmup"
            assert session.hear().refused.code == "silent", "from now on it is to be heard"


def test_session_token_is_worthless_at_once_when_its_peer_is_banned(
    channel: grpc.Channel, coordinator: RunningCoordinator, stranger: Stranger
) -> None:
    session = Conversation(stranger)
    token = session.hear().welcome.session_token
    stub, metadata = CoordinatorServiceStub(channel), (("session-token", token),)
    assert list(stub.GetLedger(pb.GetLedgerRequest(), metadata=metadata, timeout=10))
    operate(coordinator, "ban", peer=stranger.identity.peer_id, reason="noise")
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.GetLedger(pb.GetLedgerRequest(), metadata=metadata, timeout=10))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    heard: list[pb.CoordinatorMessage] = []
    while not heard or heard[-1].WhichOneof("message") != "refused":
        heard.append(session.hear())
    assert heard[-1].refused == pb.Refused(code="banned", reason="its operator banned it (noise)")
    peer = find(coordinator, stranger)
    assert (peer["banned"], peer["connected"], peer["lost"]) == (True, False, None)


def test_banned_peer_is_refused_when_it_joins_again_with_another_invite(
    coordinator: RunningCoordinator, stranger: Stranger
) -> None:
    assert stranger.converse(stranger.join).WhichOneof("message") == "welcome"
    operate(coordinator, "ban", peer=stranger.identity.peer_id)
    stranger.invite = operate(coordinator, "invite", uses=1)["invite"]
    answer = stranger.converse(lambda nonce: stranger.join(nonce, name="somebody else"))
    assert answer.refused == pb.Refused(code="banned", reason="its operator banned it")
    assert operate(coordinator, "invites")["invites"][0]["uses_left"] == 1, "a refusal uses no invite up"


def test_signed_ban_is_refused_when_it_is_replayed_or_changed(
    channel: grpc.Channel, coordinator: RunningCoordinator, stranger: Stranger
) -> None:
    assert stranger.converse(stranger.join).WhichOneof("message") == "welcome"
    identity = Identity.load_or_create(coordinator.folder / "coordinator.key")
    command = operator_command(stranger.run_id, verb="ban", peer=stranger.identity.peer_id, nonce="12" * 32)
    request = pb.OperatorRequest(command=pack(sign(command, identity)))
    stub = CoordinatorServiceStub(channel)
    stub.Operate(request, timeout=10)
    operate(coordinator, "unban", peer=stranger.identity.peer_id)
    changed = pb.OperatorRequest(command=request.command)
    changed.command.body = changed.command.body.replace(b"12" * 32, b"34" * 32)
    for again in (request, changed):
        with pytest.raises(grpc.RpcError) as refused:
            stub.Operate(again, timeout=10)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert find(coordinator, stranger)["banned"] is False
