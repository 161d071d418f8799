"""Vector indexes: rows and approximate scores of the vectors nearest to a question."""

import os

# Before any module here loads faiss, whose OpenMP reads it once: threads that have searched then sleep. By default
# they spin for a while in case more comes, on the cores that assemble contexts and answer calls.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # noqa: TID251  (told to OpenMP, not read)
