"""`manyhands verify`: a run folder checked from its ledger and its payloads alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress

from coordinator.run_folder import RunFolder
from coordinator.storage.database import Database
from protocol.codecs import get_codec
from protocol.documents import Manifest
from protocol.errors import MissingBlobError, VerificationError
from protocol.ledger import Audit, audit, replay
from protocol.replica import State, merge_group
from protocol.run_spec import BUTTERFLY
from protocol.signing import sha256_hex


def verify_run(folder: Path, *, as_json: bool) -> None:
    """Check the ledger and replay θ; print what was found. Raises VerificationError naming the entry or round."""
    home = RunFolder(folder)
    database = home.open_database(home.spec())
    found = Audit()
    last = database.last_ledger_entry()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking the ledger", total=(last.seq + 1) if last else None)
        manifests = []
        for document in audit((row.signed for row in database.read_ledger()), found):
            progress.advance(task)
            if isinstance(document, Manifest):
                manifests.append(document)
        task = progress.add_task("replaying the merges", total=len(manifests))
        state = None
        for state in _replay(home, found, manifests):
            progress.advance(task)
            if found.digests.get(state.round, state.digest) != state.digest:
                raise VerificationError(f"round {state.round}: the replay gives another state than was signed for")
    _check_database(database, found)
    _print(found, state, as_json)


def _replay(home: RunFolder, found: Audit, manifests: list[Manifest]) -> Iterator[State]:
    if found.genesis is None:
        return
    store = home.store
    try:
        data = store.read(found.genesis.initial_digest)
        initial = State.from_bytes(data, 0, found.genesis.num_parameters, has_momentum=False)
        yield initial
        for manifest, state in zip(manifests, replay(manifests, initial, store.read), strict=True):
            if found.genesis.spec.exchange.method != BUTTERFLY:  # whose vectors were never seen
                _check_groups(manifest, found.genesis.num_parameters, store.read)
            yield state
    except MissingBlobError as error:
        raise VerificationError(f"a payload is missing, so the parameters cannot be computed again: {error}") from error


def _check_groups(manifest: Manifest, num_parameters: int, read_payload: Callable[[str], bytes]) -> None:
    """Merge each group again: its payload must be what its contributions give."""
    for group in manifest.groups:
        contributions = [entry for entry in manifest.contributions if entry.peer in group.peers]
        payload = merge_group(contributions, get_codec(group.codec), num_parameters, read_payload)
        if sha256_hex(payload) != group.payload_hash:
            raise VerificationError(
                f"round {manifest.round}: the payload of the group of {', '.join(group.peers)} is not what they sent"
            )


def _check_database(database: Database, found: Audit) -> None:
    """The table that the page shows must say what the ledger says."""
    rounds = database.read_rounds(last=1)
    shown = rounds[0].tokens_after if rounds else 0
    if shown != found.tokens:
        raise VerificationError(f"the page's table counts {shown} tokens, the ledger {found.tokens}")


def _print(found: Audit, state: State | None, as_json: bool) -> None:
    digest = state.digest if state else ""
    if as_json:
        facts = {
            "entries": found.entries,
            "rounds": found.rounds,
            "tokens": found.tokens,
            "credit": found.credit,
            "head": found.head,
            "digest": digest,
        }
        typer.echo(json.dumps(facts))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"chain       {found.entries} entries, each signed and in its place; head {found.head[:16]}")
    console.print(f"credit      {found.tokens:,} tokens in {found.rounds} rounds, every shard once a pass:")
    for peer, tokens in sorted(found.credit.items(), key=lambda item: -item[1]):
        console.print(f"            {found.names.get(peer, '')}  {tokens:,}  {peer[-8:]}")
    console.print(f"parameters  computed again from the payloads, bit for bit: {digest}")
    console.print("[green]the run is what it says it is[/green]")
