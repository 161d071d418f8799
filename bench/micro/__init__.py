"""Components, in one process."""
