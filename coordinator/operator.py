"""The operator's side of a running coordinator: one signed command over the same gRPC port, from the run folder."""

import json
import time
from secrets import token_hex
from typing import Any

import grpc
from pydantic import ValidationError

from coordinator.run_folder import RunFolder
from protocol.documents import OperatorCommand, Verb, sign
from protocol.envelope import pack
from protocol.errors import ConfigError, ConnectionFailedError, ManyhandsError
from protocol.exchange.dial import open_channel
from protocol.run_spec import describe
from protocol.wire import coordinator_pb2 as pb
from protocol.wire.coordinator_pb2_grpc import CoordinatorServiceStub

TIMEOUT_S = 10.0


async def operate(folder: RunFolder, verb: Verb, **options: Any) -> dict[str, Any]:
    """Send one command to the coordinator of this folder. `options`: as Server.perform has them.

    Raises ConnectionFailedError when none runs, ConfigError for an option that no command can have, ManyhandsError
    with the coordinator's sentence when it refuses.
    """
    running = folder.read_running()
    if running is None:
        folder.spec()  # says so where there is no run at all
        raise ConnectionFailedError(
            f"no coordinator runs on {folder.path}; `manyhands coordinator start {folder.path}`"
        )
    run_id, now_unix_s = str(running["run_id"]), int(time.time())
    try:
        command = OperatorCommand(run_id=run_id, verb=verb, nonce=token_hex(32), unix_s=now_unix_s, **options)
    except ValidationError as error:
        raise ConfigError(describe(error, OperatorCommand)) from error
    _, certificate = folder.tls()
    address = str(running["listen"]).replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")  # noqa: S104 - not bound
    channel = open_channel(address, certificate)
    try:
        stub = CoordinatorServiceStub(channel)
        request = pb.OperatorRequest(command=pack(sign(command, folder.identity())))
        reply = await stub.Operate(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            raise ManyhandsError(str(error.details())) from error
        raise ConnectionFailedError(f"the coordinator at {address} does not answer: {error.details()}") from error
    finally:
        await channel.close(grace=None)
    answer: dict[str, Any] = json.loads(reply.json)
    return answer
