"""One module a page: `build(frame, viewer)` makes its part and adds what brings it up to date."""
