"""The pair under load: latency at a rate, and what serving costs."""
