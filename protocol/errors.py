"""Every error that manyhands raises on purpose, on one page.

The message is for the person who reads the command line: one line, what happened and what to do. `exit_code` is what
the command ends with. Anything else that escapes is a bug and is shown as one.
"""


class ManyhandsError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 1


class ConfigError(ManyhandsError):
    """A run.toml or an option that cannot be used. Names the place and the remedy."""

    exit_code = 2


class DataError(ManyhandsError):
    """The text to train on is missing, unreadable or too short."""

    exit_code = 2


class InviteError(ManyhandsError):
    """An invite that is truncated, forged, expired, revoked or used up."""

    exit_code = 3


class ConnectionFailedError(ManyhandsError):
    """The coordinator cannot be reached, or is not the one that the invite names."""

    exit_code = 4


class RefusedError(ManyhandsError):
    """The coordinator answered, and said no."""

    exit_code = 5


class DiskFullError(ManyhandsError):
    """A write failed because the disk is full or read-only. Nothing that was committed is lost."""

    exit_code = 6


class MissingBlobError(ManyhandsError, LookupError):
    """The store does not hold the blob that a hash names."""


class TransferError(ManyhandsError):
    """A source did not deliver a blob. `source` names it, `reason` says why."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason


class NotYetError(TransferError):
    """The source answered, but cannot give the bytes now; ask again. `coming`: it is fetching them itself."""

    def __init__(self, source: str, reason: str, *, coming: bool = False) -> None:
        super().__init__(source, reason)
        self.coming = coming


class UnavailableError(ManyhandsError):
    """No source delivered a blob. `failures` maps the blob's hash to (source, reason) pairs in the order of trying."""

    def __init__(self, failures: dict[str, tuple[tuple[str, str], ...]]) -> None:
        blob_hash, tried = next(iter(failures.items()))
        why = "; ".join(f"{source}: {reason}" for source, reason in tried) or "nobody is known to have it"
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        super().__init__(f"blob {blob_hash[:12]}… is not to be had{more}: {why}")
        self.failures = failures


class ButterflyError(ManyhandsError):
    """A butterfly round failed, and nothing was averaged.

    `peer` is the one to blame, as far as that can be told, and `reason` says why; `reported_by` is the peer that says
    so, where it is not what we saw ourselves.
    """

    def __init__(self, peer: str, reason: str, reported_by: str = "") -> None:
        witness = f" (says {reported_by})" if reported_by else ""
        super().__init__(f"{peer}: {reason}{witness}; nothing was averaged")
        self.peer = peer
        self.reason = reason
        self.reported_by = reported_by


class VerificationError(ManyhandsError):
    """A signature, a hash, a chain or a digest does not hold."""

    exit_code = 7


class PayloadError(VerificationError):
    """A payload that is not what its header claims. Raised before anything large is allocated."""


class DivergedError(ManyhandsError):
    """Training gives NaN or infinities. A lower learning rate helps."""


class DeviceMemoryError(ManyhandsError):
    """The device is too small for one sequence of this model."""
