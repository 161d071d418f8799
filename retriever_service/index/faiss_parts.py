"""What a composed faiss index is made of, and the parameters that reach each of its parts."""

import re
from typing import Any

import faiss
import numpy as np

from retriever_service.types import SearchParameters

# The names that SWIG generates have no types.
_faiss: Any = faiss


def find_part(index: Any, kind: type) -> Any:
    """Returns the part of a composed index that is a `kind`, or None; an IVF's coarse quantizer counts."""
    index = faiss.downcast_index(index)
    if isinstance(index, kind):
        return index
    if isinstance(index, faiss.IndexIVF):
        return find_part(index.quantizer, kind)
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        return find_part(index.index, kind)
    if isinstance(index, faiss.IndexRefine):
        return find_part(index.base_index, kind)
    return None


def set_knobs(index: Any, nprobe: int | None, ef_search: int | None) -> None:
    """Makes these the index's own settings of the knobs it has; None leaves one as it is."""
    ivf, hnsw = find_part(index, faiss.IndexIVF), find_part(index, faiss.IndexHNSW)
    if ivf is not None and nprobe is not None:
        ivf.nprobe = min(nprobe, ivf.nlist)
    if hnsw is not None and ef_search is not None:
        hnsw.hnsw.efSearch = ef_search


def order_no_codes(index: Any) -> None:
    """Leaves out of training what orders a product quantizer's centroids for searches by Hamming distance.

    It takes most of the time of training, and no search here is one: distances do not depend on the order.
    """
    graph = find_part(index, faiss.IndexHNSW)
    for whole, kind in (
        (index, faiss.IndexPQ),
        (index, faiss.IndexIVFPQ),
        (None if graph is None else graph.storage, faiss.IndexPQ),
    ):
        quantized = None if whole is None else find_part(whole, kind)
        if quantized is not None:
            quantized.do_polysemous_training = False


def names_rows(index: Any) -> bool:
    """Whether the ids that a search finds are 0 … ntotal - 1, each once: an IDMap or an IVF may hold others."""
    mapped, ivf = find_part(index, faiss.IndexIDMap), find_part(index, faiss.IndexIVF)
    if mapped is not None:
        ids = faiss.vector_to_array(mapped.id_map)
    elif ivf is not None:
        lists = ivf.invlists
        ids = np.concatenate(
            [
                faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))
                for cell in range(ivf.nlist)
                if lists.list_size(cell)
            ]
            or [np.empty(0, np.int64)]
        )
    else:
        return True
    return bool(np.array_equal(np.sort(ids), np.arange(index.ntotal)))


def has_exact_scores(index: Any) -> bool:
    """Whether the scores of a search are those of the vectors as they were added, not of shorter codes."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexHNSW):
        return has_exact_scores(index.storage)
    if isinstance(index, faiss.IndexIDMap):
        return has_exact_scores(index.index)
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexRefineFlat)


def is_exhaustive(index: Any) -> bool:
    """Whether a search compares with every vector as it was added: what it finds is the truth."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        return is_exhaustive(index.index)
    return isinstance(index, faiss.IndexFlat)


def takes_selector(index: Any) -> bool:
    """Whether faiss takes a selector on this kind: found by asking it, for no table of kinds stays true."""
    if index.ntotal == 0:
        return True
    selector = _faiss.IDSelectorBitmap(np.zeros((index.ntotal + 7) // 8, dtype=np.uint8))
    parameters = search_parameters(index, SearchParameters(), selector)
    try:
        _, rows = index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=parameters)
    except RuntimeError:
        return False
    return bool((rows < 0).all())


def search_parameters(index: Any, parameters: SearchParameters, selector: Any = None) -> Any:
    """Returns faiss's parameter object for this call, or None where the index's own settings hold.

    Objects, never attributes of the shared index: two requests may differ at the same moment. `selector` says
    which rows may be found.
    """
    if parameters == SearchParameters() and selector is None:
        return None
    index = faiss.downcast_index(index)
    selected = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        return _faiss.SearchParametersPreTransform(
            index_params=search_parameters(index.index, parameters, selector)
        )
    if isinstance(index, faiss.IndexRefine):
        return _faiss.IndexRefineSearchParameters(
            k_factor=index.k_factor,
            base_index_params=search_parameters(index.base_index, parameters, selector),
        )
    if isinstance(index, faiss.IndexIDMap):
        return search_parameters(index.index, parameters, selector)
    if isinstance(index, faiss.IndexIVF):
        return _faiss.SearchParametersIVF(
            nprobe=parameters.nprobe or index.nprobe,
            max_codes=index.max_codes,
            quantizer_params=search_parameters(index.quantizer, parameters),
            **selected,
        )
    if isinstance(index, faiss.IndexHNSW):
        return _faiss.SearchParametersHNSW(efSearch=parameters.ef_search or index.hnsw.efSearch, **selected)
    return _faiss.SearchParameters(**selected) if selected else None


def reason_of(error: Exception) -> str:
    """Returns what faiss says is wrong, without the C++ function and file it says it in."""
    said = str(error).strip().partition("\n")[0]
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", said) or type(error).__name__
