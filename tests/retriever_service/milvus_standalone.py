"""Milvus' own server, standalone on loopback: the engine of the distribution `milvus`, with its log and its storage.

It is Milvus 2.3, older than what clusters run today and without their indexes on JSON, but no peer: growing and
sealed segments, a log that is replayed, timestamps that reads wait for.
"""

import importlib.util
import lzma
import os
import re
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.retriever_service.milvus_process import MilvusProcess

_STARTS_WITHIN_S = 120.0
_PORTS = ("etcd_port", "root_coord_port", "proxy_port", "proxy_internal_port", "query_coord_port")
_PORTS += ("query_node_port", "index_coord_port", "index_node_port", "data_coord_port", "data_node_port")
# etcd within Milvus listens where it always does, unless a file of its own says otherwise.
_ETCD = """
name: default
data-dir: {data}
listen-client-urls: http://127.0.0.1:{client}
advertise-client-urls: http://127.0.0.1:{client}
listen-peer-urls: http://127.0.0.1:{peer}
initial-advertise-peer-urls: http://127.0.0.1:{peer}
initial-cluster: default=http://127.0.0.1:{peer}
log-level: error
log-outputs: [{log}]
"""


def is_installed() -> bool:
    """Whether the engine is there; the extra dev brings it where it can run."""
    return importlib.util.find_spec("milvus") is not None


class StandaloneMilvus(MilvusProcess):
    """One engine; `stop` kills it, and `start` begins another on the same ports and data."""

    def __init__(self, folder: Path) -> None:
        """Writes its configuration below the folder."""
        super().__init__()
        self._folder = folder
        package = _package()
        ports = _free_ports(len(_PORTS) + 2)
        self._health_port, etcd_peer_port = ports[-2:]
        values = dict(zip(_PORTS, map(str, ports), strict=False)) | {
            "etcd_data_dir": str(folder / "data" / "etcd"),
            "etcd_log_path": str(folder / "logs" / "etcd.log"),
            "local_storage_dir": str(folder / "data"),
            "rocksmq_data_dir": str(folder / "data" / "rocksmq"),
            "system_log_path": str(folder / "logs"),
        }
        self.uri = f"http://127.0.0.1:{values['proxy_port']}"
        for name in ("data", "logs", "configs", "run"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "configs" / "glog.conf").write_bytes((package / "glog.conf").read_bytes())
        template = (package / "config.yaml.template").read_text()
        # How long, in seconds, those that start wait for the parts of an engine that was killed.
        template = re.sub(r"\bttl: \d+", "ttl: 5", template)
        hole = re.compile(r"\{\{ *(\w+)(?:\(\w+\))? *(?:: *(.*?))? *\}\}")
        (folder / "configs" / "milvus.yaml").write_text(
            hole.sub(lambda found: values.get(found[1], found[2]), template)
        )
        self._etcd_file = folder / "configs" / "etcd.yaml"
        self._etcd_file.write_text(
            _ETCD.format(
                data=values["etcd_data_dir"],
                client=values["etcd_port"],
                peer=etcd_peer_port,
                log=values["etcd_log_path"],
            )
        )

    def start(self) -> None:
        """Starts it and waits until it is well."""
        binaries = _binaries()
        environment = os.environ | {
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(self._health_port),
            "MILVUS_RUN_DIR": str(self._folder / "run"),
            "LD_LIBRARY_PATH": str(binaries),
            "ETCD_CONFIG_PATH": str(self._etcd_file),
        }
        with (self._folder / "logs" / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [binaries / "milvus", "run", "standalone"],
                cwd=self._folder,
                env=environment,
                stdout=output,
                stderr=output,
            )
        self._await(self._is_well, _STARTS_WITHIN_S)

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health_port}/healthz", timeout=5) as answer:
                return b"OK" in answer.read()
        except (urllib.error.URLError, OSError):
            return False


def _package() -> Path:
    found = importlib.util.find_spec("milvus")
    if found is None or found.origin is None:
        raise RuntimeError("the distribution milvus is not installed")
    return Path(found.origin).parent / "data"


def _binaries() -> Path:
    """Returns the folder with the engine unpacked, which takes ten seconds once a machine."""
    packed = _package() / "bin"
    version = max(int(file.stat().st_mtime) for file in packed.iterdir())
    folder = Path(tempfile.gettempdir()) / f"ragpair-milvus-{os.getuid()}-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            unpacked = Path(made) / "bin"
            unpacked.mkdir()
            for file in packed.glob("*.lzma"):
                target = unpacked / file.stem
                target.write_bytes(lzma.decompress(file.read_bytes()))
                target.chmod(0o755)
            unpacked.rename(folder)
    return folder


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
