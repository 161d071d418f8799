"""Client channels to a service: round robin over replicas, keepalive, sizes, retries where safe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc


@dataclass(frozen=True)
class RetryPolicy:
    """Which calls may be sent again when the server was UNAVAILABLE, and how.

    `methods` are full names, "rag.retriever.v1.RetrieverService/Retrieve", or a service's name alone for
    all of its methods. Name only those that may run twice. Waits grow from `initial_backoff_s` to
    `max_backoff_s`, with jitter, and never outlast the call's deadline; a server in trouble is spared by
    retry throttling.
    """

    methods: Sequence[str]
    max_attempts: int = 3
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 1.0


def open_channel(
    address: str,
    *,
    max_message_bytes: int = 64 * 2**20,
    keepalive_time_s: float = 30.0,
    keepalive_timeout_s: float = 10.0,
    retry: RetryPolicy | None = None,
    health_service: str | None = None,
) -> grpc.aio.Channel:
    """Returns a channel to `address` ("host:port" or any gRPC target); close it with `await channel.close()`.

    A host name is resolved by DNS to all of its addresses, as a headless Kubernetes Service has them, and
    calls go round them. With `health_service` a replica gets calls only while it says that this service is
    SERVING.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", int(keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.dns_min_time_between_resolutions_ms", 5000),
        ("grpc.service_config", json.dumps(service_config(retry, health_service))),
    ]
    return grpc.aio.insecure_channel(target_of(address), options=options)


def target_of(address: str) -> str:
    """Returns the gRPC target of an address: "retriever:50051" -> "dns:///retriever:50051"."""
    scheme = address.split(":", 1)[0]
    return address if scheme in {"dns", "unix", "unix-abstract", "ipv4", "ipv6"} else f"dns:///{address}"


def service_config(retry: RetryPolicy | None, health_service: str | None) -> dict[str, Any]:
    """Returns the gRPC service config of a channel, as a JSON object."""
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_service is not None:
        config["healthCheckConfig"] = {"serviceName": health_service}
    if retry is not None:
        config["retryThrottling"] = {"maxTokens": 10, "tokenRatio": 0.5}
        config["methodConfig"] = [
            {
                "name": [_method_name(method) for method in retry.methods],
                "retryPolicy": {
                    "maxAttempts": retry.max_attempts,
                    "initialBackoff": f"{retry.initial_backoff_s}s",
                    "maxBackoff": f"{retry.max_backoff_s}s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return config


def _method_name(method: str) -> dict[str, str]:
    service, _, name = method.strip("/").partition("/")
    return {"service": service, "method": name} if name else {"service": service}
