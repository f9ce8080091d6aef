"""`/cost`: device-hours, energy and tokens of every run beside this one, and what they would cost at a price."""

from nicegui import ui

from coordinator.dashboard.data_table import Column, DataTable, Row, row
from coordinator.dashboard.elements import UNKNOWN, Facts, box, number, section, text
from coordinator.dashboard.frame import Frame, Viewer
from coordinator.dashboard.snapshot import Snapshot
from coordinator.records.runs import read_cost
from coordinator.records.views import Cost

RUNS = (
    Column("Run"),
    Column("Rounds", "number"),
    Column("Tokens", "number"),
    Column("Device-hours", "number"),
    Column("Energy", "number"),
    Column("Would cost", "number"),
    Column("Note", "wide quiet"),
)
DEVICES = (
    Column("Device class"),
    Column("Device-hours", "number"),
    Column("Tokens", "number"),
    Column("Stated power", "number"),
    Column("Energy", "number"),
    Column("Would cost", "number"),
)


class CostPage:
    """The prices are the viewer's own, and kept nowhere."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        with section("sum", "All runs"):
            self._facts = Facts(
                {"hours": "Device-hours", "energy": "Energy, estimated", "tokens": "Tokens", "price": "Would cost"}
            )
            with box("p", "buttons form"):
                self._hour = ui.number("Price of a device-hour", value=0.0, min=0, step=0.1)
                self._energy = ui.number("Price of a kWh", value=0.0, min=0, step=0.01)
                for field in (self._hour, self._energy):
                    field.props("outlined dense debounce=300").on_value_change(lambda _: viewer.refresh())
            text(
                "p",
                "In any currency; 0 counts nothing. Only verified work is counted: what a contribution that was "
                "accepted names as its compute time.",
                "muted",
            )
        with section("runs", "Each run"):
            self._runs = DataTable(RUNS, labelledby="runs", empty="No run has merged a round yet.")
            self._unread = text("p", "", "muted")
        with section("devices", "This run by device class"):
            text(
                "p", "Energy is compute time times a stated power of the class; nobody's machine was measured.", "muted"
            )
            self._devices = DataTable(DEVICES, labelledby="devices", empty="Nobody was credited yet.")

    async def show(self, _: Snapshot) -> None:
        board = self._viewer.board
        cost = await board.share(read_cost, board.server.database.readers, board.server.folder.path, every_s=30.0)
        runs = [run for run in cost.runs if run.rounds]
        hours, energy = sum(run.hours for run in runs), sum(run.energy_kwh for run in runs)
        self._facts.show(
            hours=describe_hours(hours),
            energy=describe_energy(energy),
            tokens=f"{sum(run.tokens for run in runs):,}",
            price=self._price(hours, energy),
        )
        self._runs.show(
            [
                row(
                    run.folder,
                    run.name,
                    f"{run.rounds:,}",
                    f"{run.tokens:,}",
                    describe_hours(run.hours),
                    describe_energy(run.energy_kwh),
                    self._price(run.hours, run.energy_kwh),
                    run.note or UNKNOWN,
                )
                for run in runs
            ]
        )
        self._unread.text = f"Could not be read: {', '.join(cost.unread)}" if cost.unread else ""
        self._devices.show(self._describe_devices(cost))

    def _describe_devices(self, cost: Cost) -> list[Row]:
        return [
            row(
                device.device_class,
                device.device_class,
                describe_hours(device.hours),
                f"{device.tokens:,}",
                f"{device.watts:,.0f} W",
                describe_energy(device.energy_kwh),
                self._price(device.hours, device.energy_kwh),
            )
            for device in cost.runs[0].devices
        ]

    def _price(self, hours: float, energy_kwh: float) -> str:
        hour, energy = self._hour.value or 0.0, self._energy.value or 0.0
        return number(hours * hour + energy_kwh * energy if hour or energy else None, ",.2f")


def describe_hours(hours: float) -> str:
    return f"{hours:,.3f} h" if hours < 1 else f"{hours:,.1f} h"


def describe_energy(energy_kwh: float) -> str:
    return f"{1000 * energy_kwh:,.1f} Wh" if energy_kwh < 1 else f"{energy_kwh:,.1f} kWh"


async def build(_: Frame, viewer: Viewer) -> None:
    viewer.updaters.append(CostPage(viewer).show)
