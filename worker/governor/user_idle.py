"""For how long nobody has touched this computer: X11, GNOME, logind, macOS, Windows. Elsewhere that is unknown.

KDE and others on Wayland are seen through logind, as far as the desktop tells it: it says "idle" only after the
desktop's own delay.
"""

import ctypes
import ctypes.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache

RETRY_AFTER_S = 60.0
COMMAND_TIMEOUT_S = 1.0


class UserIdle:
    """Finds the first source that answers and keeps to it. Called from one thread at a time."""

    def __init__(self, sources: tuple[Callable[[], float | None], ...] | None = None) -> None:
        self._sources = sources if sources is not None else _sources()
        self._source: Callable[[], float | None] | None = None
        self._retry_at_s = 0.0

    def read(self) -> float | None:
        """Seconds; None: nobody can tell. While nobody can, it is tried again once a minute."""
        if self._source is not None:
            idle_s = self._source()
            if idle_s is not None:
                return idle_s
            self._source = None
        if time.monotonic() < self._retry_at_s:
            return None
        for source in self._sources:
            idle_s = source()
            if idle_s is not None:
                self._source = source
                return idle_s
        self._retry_at_s = time.monotonic() + RETRY_AFTER_S
        return None


def ask(*command: str) -> str | None:
    """What a command prints; None when it is not there, fails, or takes over a second."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _sources() -> tuple[Callable[[], float | None], ...]:
    if sys.platform == "darwin":
        return (_ask_macos,)
    if sys.platform == "win32":
        return (_ask_windows,)
    graphical: list[Callable[[], float | None]] = []
    if os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):  # Xwayland sees its own windows alone
        graphical.append(_ask_x11)
    return (*graphical, _ask_gnome, _ask_logind)


def _ask_gnome() -> float | None:
    answer = ask(
        *("gdbus", "call", "--session", "--timeout", "1", "--dest", "org.gnome.Mutter.IdleMonitor"),
        *(
            "--object-path",
            "/org/gnome/Mutter/IdleMonitor/Core",
            "--method",
            "org.gnome.Mutter.IdleMonitor.GetIdletime",
        ),
    )
    found = re.search(r"\(uint64 (\d+),\)", answer or "")
    return int(found[1]) / 1e3 if found else None


def _ask_logind() -> float | None:
    answer = ask("loginctl", "show-seat", "seat0", "--property=IdleHint", "--property=IdleSinceHint")
    return parse_logind(answer or "", time.time())


def parse_logind(answer: str, now_unix_s: float) -> float | None:
    """Seconds from a seat's IdleHint and IdleSinceHint (µs); in use is 0."""
    if "IdleHint=no" in answer:
        return 0.0
    since = re.search(r"IdleSinceHint=(\d+)", answer)
    return max(now_unix_s - int(since[1]) / 1e6, 0.0) if since and "IdleHint=yes" in answer else None


def _ask_macos() -> float | None:
    found = re.search(r'"HIDIdleTime" = (\d+)', ask("ioreg", "-c", "IOHIDSystem", "-d", "4") or "")
    return int(found[1]) / 1e9 if found else None


class _LastInput(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("tick_ms", ctypes.c_uint32))


def _ask_windows() -> float | None:
    windll = getattr(ctypes, "windll", None)
    info = _LastInput(ctypes.sizeof(_LastInput), 0)
    if windll is None or not windll.user32.GetLastInputInfo(ctypes.byref(info)):
        return None
    now_ms = int(windll.kernel32.GetTickCount())
    return ((now_ms - int(info.tick_ms)) & 0xFFFF_FFFF) / 1e3  # both wrap after 49 days


class _ScreenSaverInfo(ctypes.Structure):
    _fields_ = (
        ("window", ctypes.c_ulong),
        ("state", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("til_or_since_ms", ctypes.c_ulong),
        ("idle_ms", ctypes.c_ulong),
        ("event_mask", ctypes.c_ulong),
    )


def _ask_x11() -> float | None:
    """One connection a question: Xlib ends the whole process when a connection that it keeps breaks."""
    libraries = _load_x11()
    if libraries is None:
        return None
    x11, xss = libraries
    display = x11.XOpenDisplay(None)
    if not display:
        return None
    try:
        info = _ScreenSaverInfo()
        answered = xss.XScreenSaverQueryInfo(display, x11.XDefaultRootWindow(display), ctypes.byref(info))
        return info.idle_ms / 1e3 if answered else None
    finally:
        x11.XCloseDisplay(display)


@cache
def _load_x11() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    x11_name, xss_name = ctypes.util.find_library("X11"), ctypes.util.find_library("Xss")
    if not x11_name or not xss_name:
        return None
    x11, xss = ctypes.CDLL(x11_name), ctypes.CDLL(xss_name)
    x11.XOpenDisplay.restype = ctypes.c_void_p
    x11.XOpenDisplay.argtypes = (ctypes.c_char_p,)
    x11.XDefaultRootWindow.restype = ctypes.c_ulong
    x11.XDefaultRootWindow.argtypes = (ctypes.c_void_p,)
    x11.XCloseDisplay.argtypes = (ctypes.c_void_p,)
    xss.XScreenSaverQueryInfo.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.POINTER(_ScreenSaverInfo))
    return x11, xss
