"""The operator's own worker, beside the coordinator: keeps a replica, evaluates it, writes checkpoints.

It never holds a round up. When it falls behind it merges first and evaluates the newest state only. It talks to the
coordinator like any peer, with an invite for its role.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import structlog

from protocol.documents import EvaluationReport, Manifest, sign
from protocol.envelope import pack, unpack
from protocol.errors import ManyhandsError
from protocol.exchange.store import BlobStore
from protocol.identity import Identity
from protocol.invite import decode_invite
from protocol.replica import State
from protocol.shard_format import decode_shard
from protocol.signing import canonical_json, sha256_hex
from protocol.tokenizer import load_tokenizer
from protocol.wire import coordinator_pb2 as pb
from worker.checkpoint import CheckpointCard, Contributor, checkpoint_folder, prune_checkpoints, write_checkpoint
from worker.device import choose_device, describe_device
from worker.follower import Follower
from worker.link import CoordinatorLink, Introduction
from worker.trainer import Trainer

log = structlog.get_logger()
EVALUATION_BATCH = 32


@dataclass
class Validator:
    """Evaluates and checkpoints one run. `blobs`: the coordinator's own store, on the same machine."""

    invite_text: str
    home: Path
    blobs: Path
    checkpoints: Path
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.identity = Identity.load_or_create(self.home / "identity.key")
        self._invite, self._coordinator_key = decode_invite(self.invite_text)
        self._store = BlobStore(self.blobs)
        self._follower = Follower(self._store)
        self._tokens_of: Counter[str] = Counter()
        self._names: dict[str, str] = {}
        self._newest = asyncio.Event()
        self._tokens = 0
        self._ledger_head = "0" * 64
        self._plan = ""

    async def run(self) -> None:
        """Follow the run until `stopping` is set. Raises ManyhandsError when the coordinator is gone."""
        async with CoordinatorLink(self.invite_text, self._invite, self._coordinator_key, self.identity) as link:
            await link.join(
                Introduction(
                    name="validator",
                    device=describe_device(choose_device("cpu")),
                    software=f"manyhands {version('manyhands')}",
                )
            )
            self._genesis = link.genesis
            heartbeat = asyncio.create_task(self._send_heartbeats(link))
            follow = asyncio.create_task(self._follow(link))
            evaluate = asyncio.create_task(self._keep_evaluating(link))
            stop = asyncio.create_task(self.stopping.wait())
            tasks = [heartbeat, follow, evaluate, stop]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await link.drain()

    async def _follow(self, link: CoordinatorLink) -> None:
        async for manifest in link.manifests_from(0):
            self._note(manifest)
        await self._follower.catch_up(link)
        self._report(link)
        async for message in link.messages():
            match message.WhichOneof("message"):
                case "manifest":
                    manifest = link.open(unpack(message.manifest.manifest), Manifest)
                    self._note(manifest)
                    await self._follower.apply_notice(message.manifest, manifest, link)
                    self._report(link)
                case "resync":
                    self._follower.forget()
                    await self._follower.catch_up(link)
                    self._report(link)

    def _note(self, manifest: Manifest) -> None:
        """Add a round to the totals; what was counted already is not counted again."""
        if manifest.tokens_after > self._tokens:
            self._tokens = manifest.tokens_after
            self._plan = manifest.plan
            self._ledger_head = sha256_hex(canonical_json(manifest.model_dump(mode="json")))
            self._tokens_of.update({entry.peer: entry.tokens for entry in manifest.contributions})
            self._names.update({entry.peer: entry.name for entry in manifest.contributions})

    def _report(self, link: CoordinatorLink) -> None:
        state = self._follower.state
        if state is not None:
            link.send(state=pb.StateReport(round=state.round, digest=state.digest))
            self._newest.set()

    async def _keep_evaluating(self, link: CoordinatorLink) -> None:
        """Evaluate the first state, then every `every_rounds`, and the last one."""
        spec, vocabulary_size = self._genesis.spec, self._genesis.vocabulary_size
        config = self._store.read(self._genesis.model_config_hash)
        trainer = await asyncio.to_thread(Trainer, spec, vocabulary_size, choose_device("cpu"), model_config=config)
        rows = decode_shard(self._store.read(self._genesis.held_out_hash), vocabulary_size)
        next_round = 0
        while True:
            await self._newest.wait()
            self._newest.clear()
            state, tokens = self._follower.state, self._tokens
            if state is None or (state.round < next_round and tokens < spec.train.tokens):
                continue
            loss = await asyncio.to_thread(trainer.evaluate, state.theta, rows, EVALUATION_BATCH)
            card = CheckpointCard(
                run_id=self._genesis.run_id,
                name=spec.name,
                round=state.round,
                digest=state.digest,
                ledger_head=self._ledger_head,
                tokens=tokens,
                contributors=tuple(
                    Contributor(name=self._names[peer], peer=peer, tokens=credited)
                    for peer, credited in self._tokens_of.most_common()
                ),
                held_out_loss=loss,
                held_out_tokens=rows.shape[0] * (rows.shape[1] - 1),
                plan=self._plan,
            )
            await self._checkpoint(state, card, config, link)
            every = spec.checkpoint.every_rounds
            next_round = (state.round // every + 1) * every

    async def _checkpoint(self, state: State, card: CheckpointCard, config: bytes, link: CoordinatorLink) -> None:
        """Write the checkpoint, put the state where joiners fetch it, then tell the coordinator."""
        try:
            await asyncio.to_thread(self._write, state, card, config)
            stored = True
        except ManyhandsError as error:
            log.error("the checkpoint was not written", round=state.round, error=str(error))
            stored = False
        report = EvaluationReport(
            run_id=card.run_id,
            peer=self.identity.peer_id,
            round=card.round,
            digest=card.digest,
            held_out_loss=card.held_out_loss or 0.0,
            held_out_tokens=card.held_out_tokens or 0,
            checkpoint=stored,
        )
        link.send(evaluation=pack(sign(report, self.identity)))
        log.info("evaluated", round=card.round, held_out_loss=card.held_out_loss, checkpoint=stored)

    def _write(self, state: State, card: CheckpointCard, config: bytes) -> None:
        genesis = self._genesis
        tokenizer = (
            self._store.read(genesis.tokenizer_hash) if genesis.tokenizer_hash else load_tokenizer("bytes").to_json()
        )
        write_checkpoint(
            checkpoint_folder(self.checkpoints, state.round),
            spec=genesis.spec,
            theta=state.theta,
            vocabulary_size=genesis.vocabulary_size,
            tokenizer_json=tokenizer,
            card=card,
            model_config=config,
        )
        self._store.put(state.to_bytes())
        prune_checkpoints(self.checkpoints, genesis.spec.checkpoint.keep)

    async def _send_heartbeats(self, link: CoordinatorLink) -> None:
        while True:
            link.send(heartbeat=pb.Heartbeat(activity="following"))
            await asyncio.sleep(link.welcome.heartbeat_every_s)
