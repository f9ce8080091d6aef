"""The world that a scenario describes: devices, links, availability, faults. Arrays over peers, drawn from one seed."""
