"""Who is the operator: whoever has shown the run folder's token, for some hours.

Knows nothing of web servers. Tries are limited for each client and for all together, so nobody guesses fast; whoever
floods the sign-in shuts it for a minute, not the sessions that exist, and not the command line. Only hashes of session
ids are kept, and none outlives the process.
"""

import hashlib
import hmac
import time
from collections import Counter, deque
from collections.abc import Callable
from secrets import token_urlsafe

SESSION_S = 12 * 3600.0
TRIES_WITHIN_S = 60.0
MAX_TRIES = 5  # failed ones of one client
MAX_TRIES_OF_ALL = 100
MAX_SESSIONS = 100


class Access:
    """The sessions of one run's operator. `now_s`: a clock that never goes back, in seconds."""

    def __init__(self, token: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self._token = token.encode()
        self._now_s = now_s
        self._expiry_s: dict[bytes, float] = {}  # by the session id's hash, oldest first
        self._failed: deque[tuple[float, str]] = deque()  # (when, client), oldest first

    def sign_in(self, token: str, client: str) -> str | None:
        """A new session id for the right token; None for a wrong one, and after too many failed tries."""
        now_s = self._now_s()
        while self._failed and now_s - self._failed[0][0] >= TRIES_WITHIN_S:
            self._failed.popleft()
        tries = Counter(who for _, who in self._failed)
        if tries[client] >= MAX_TRIES or len(self._failed) >= MAX_TRIES_OF_ALL:
            return None
        if not hmac.compare_digest(token.strip().encode(errors="replace"), self._token):
            self._failed.append((now_s, client))
            return None
        session_id = token_urlsafe(32)
        while len(self._expiry_s) >= MAX_SESSIONS:
            del self._expiry_s[next(iter(self._expiry_s))]
        self._expiry_s[_hash(session_id)] = now_s + SESSION_S
        return session_id

    def is_operator(self, session_id: str | None) -> bool:
        """Whether this session was signed in here, and not too long ago. Ask again before each action."""
        return session_id is not None and self._now_s() < self._expiry_s.get(_hash(session_id), 0.0)

    def sign_out(self, session_id: str | None) -> None:
        """End the session; its id is worthless from now on."""
        self._expiry_s.pop(_hash(session_id or ""), None)


def _hash(session_id: str) -> bytes:
    return hashlib.sha256(session_id.encode(errors="replace")).digest()
