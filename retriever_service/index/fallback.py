"""Why the CPU does what GPUs were to do."""

import enum


class IndexFallback(enum.StrEnum):
    """Why an index that was to be on GPUs is on the CPU."""

    MEMORY_MAP = "memory_map"  # a mapped file's pages are read as they are used
    NO_GPU = "no_gpu"  # none that faiss finds, or a faiss without GPU code
    KIND = "kind"  # faiss has no such index on GPUs
    COPY_FAILED = "copy_failed"  # most often no room; tried again when another index leaves


class SearchFallback(enum.StrEnum):
    """Why the CPU answered a search of an index that is on GPUs."""

    SELECTION = "selection"  # leaves out more rows than a GPU should find and drop
    CANDIDATES = "candidates"  # more than faiss selects on a GPU
    TOO_FEW_LEFT = "too_few_left"  # of what the GPU found, too little was of the selection
    FAILED = "failed"  # faiss gave an error, the log has the first one
