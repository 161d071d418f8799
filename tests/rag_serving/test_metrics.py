"""Metric names have one form, and each service has a registry of its own."""

import pytest

from rag_serving.metrics import Metrics


def test_names_are_rag_service_thing_unit() -> None:
    metrics = Metrics("retriever")
    metrics.counter("searches_total", "Searches", ["kind"]).labels("flat").inc()
    metrics.gauge("index_vectors", "Vectors").set(3)
    metrics.histogram("search_seconds", "Time of a search", buckets=[0.1, 1.0]).observe(0.5)
    value = metrics.registry.get_sample_value
    assert value("rag_retriever_searches_total", {"kind": "flat"}) == 1
    assert value("rag_retriever_index_vectors") == 3
    assert value("rag_retriever_search_seconds_bucket", {"le": "1.0"}) == 1


def test_a_counter_without_total_and_a_bad_name_are_refused() -> None:
    with pytest.raises(ValueError, match="ends in _total"):
        Metrics("x").counter("searches", "Searches")
    with pytest.raises(ValueError, match="lower case"):
        Metrics("x").gauge("Index-Vectors", "Vectors")


def test_a_name_may_be_used_once() -> None:
    metrics = Metrics("x")
    metrics.gauge("index_vectors", "Vectors")
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.gauge("index_vectors", "Vectors")


def test_two_services_of_one_process_do_not_share_metrics() -> None:
    assert Metrics("x").gauge("a_bytes", "A") is not Metrics("x").gauge("a_bytes", "A")
