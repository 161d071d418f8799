"""Modules that run on the device, and their caches."""
