"""Decoding as pure functions on tensors."""
