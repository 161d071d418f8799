"""The data that the demo generator was trained on."""
