"""The decoding engine: one worker process a device, questions batched step by step."""
