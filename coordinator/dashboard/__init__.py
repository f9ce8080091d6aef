"""The coordinator's page, on its HTTP port."""
