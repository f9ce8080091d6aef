"""What the sensors say at one moment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """None is unknown, and unknown never pauses."""

    user_pause_until_unix_s: float | None = None  # infinite: until `resume`
    on_battery: bool | None = None
    battery_percent: float | None = None
    user_idle_s: float | None = None  # since the last key, click or touch
    other_cpu_share: float | None = None  # of all cores, 0 to 1; this machine's workers are not counted
    cpu_celsius: float | None = None
    gpu_celsius: float | None = None
    metered: bool | None = None
    traffic_bytes: int | None = None  # of the workers, sent and received in this calendar month
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None
    store_bytes: int | None = None  # what the worker itself keeps on the disk
