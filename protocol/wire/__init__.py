"""Generated from protocol/coordinator.proto by `make proto`; not edited by hand."""
