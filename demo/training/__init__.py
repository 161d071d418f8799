"""How the demo generator was trained: data, warm start, loop, export, offline evaluation."""
