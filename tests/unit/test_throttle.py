"""A rate limit that many share: how fast things pass, and what becomes of a turn that is not taken."""

import asyncio

import pytest

from protocol.exchange.throttle import Throttle


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def test_chunks_share_the_rate_when_they_wait_together() -> None:
    throttle = Throttle(8 * 10_000)  # 10 KB a second
    started_s = now_s()
    await asyncio.gather(*(throttle.wait(1000) for _ in range(4)))  # the first passes at once
    assert 0.29 < now_s() - started_s < 2.0


async def test_turn_is_given_back_when_its_owner_stops_waiting() -> None:
    throttle = Throttle(8 * 10_000)
    await throttle.wait(1000)
    waiting = asyncio.create_task(throttle.wait(1_000_000))
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(15):  # not 100 s
        await asyncio.gather(waiting, return_exceptions=True)
        await throttle.wait(1000)


@pytest.mark.parametrize("max_bps", [0, -1.0])
def test_limit_is_refused_when_nothing_could_pass(max_bps: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Throttle(max_bps)


async def test_limit_that_is_set_later_holds_for_whoever_comes_then() -> None:
    throttle = Throttle(None)
    await throttle.wait(10**9)
    throttle.limit(8 * 10_000)
    started_s = now_s()
    await asyncio.gather(*(throttle.wait(1000) for _ in range(4)))
    assert 0.29 < now_s() - started_s < 2.0
    throttle.limit(None)
    async with asyncio.timeout(15):
        await throttle.wait(10**9)
