"""Why a worker does not compute: every reason, in the order of the ladder."""

from enum import StrEnum


class PauseReason(StrEnum):
    """The first that holds is the one that is shown. `sentence` is for the volunteer."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> "PauseReason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member

    USER_PAUSE = "user_pause", "You paused it; `manyhands worker resume` ends that."
    BATTERY = "battery", "The computer is not plugged in, or its battery is low."
    USER_ACTIVE = "user_active", "Somebody is using the computer."
    OTHER_PROGRAMS = "other_programs", "Other programs need the processor."
    TEMPERATURE = "temperature", "The computer is too hot."
    SCHEDULE = "schedule", "Your schedule has no computing at this time."
    METERED = "metered", "The network connection is metered."
    TRAFFIC_CAP = "traffic_cap", "This month's traffic is used up."
    MEMORY = "memory", "Too little memory is free."
    DISK = "disk", "The disk is too full, or the worker's own files are too large."
