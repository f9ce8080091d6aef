"""Small files that are complete or not there."""

import os
import secrets
from pathlib import Path

from protocol.errors import ConfigError
from protocol.exchange.store import naming_full_disks


def replace_file(path: Path, text: str) -> None:
    """Write `text` in one step, flushed to the disk. Raises DiskFullError or ConfigError, and changes nothing then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming_full_disks(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
