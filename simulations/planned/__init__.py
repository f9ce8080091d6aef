"""The parts of fidelity `plan`: a run by its rounds, vectorised over peers, without the core and without events."""
