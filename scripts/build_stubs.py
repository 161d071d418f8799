"""Builds the importable `rag` package (messages, services and their types) from the contract in proto/."""

import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB_PACKAGE = "rag"
_INIT = '"""Generated from proto/ by scripts/build_stubs.py; edits here are lost."""\n'


def stub_packages(proto_root: Path) -> list[str]:
    """Names the packages that `build` will make: one for every folder of proto/ from `rag` down."""
    top = proto_root / STUB_PACKAGE
    folders = [top, *(path for path in top.rglob("*") if path.is_dir())]
    return sorted(".".join(folder.relative_to(proto_root).parts) for folder in folders)


def build(proto_root: Path, target: Path) -> None:
    """Writes the stubs of every .proto under proto_root to target/rag, replacing what stood there.

    Raises RuntimeError where protoc refuses the contract, leaving the stubs of before in place.
    """
    protos = sorted(str(path.relative_to(proto_root)) for path in proto_root.rglob("*.proto"))
    if not protos:
        raise RuntimeError(f"no .proto file under {proto_root}")
    with tempfile.TemporaryDirectory(dir=target, prefix=".stubs-") as scratch:
        _run_protoc(proto_root, Path(scratch), protos)
        fresh = Path(scratch) / STUB_PACKAGE
        for package in stub_packages(proto_root):
            folder = Path(scratch, *package.split("."))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text(_INIT)
        (fresh / "py.typed").touch()
        shutil.rmtree(target / STUB_PACKAGE, ignore_errors=True)
        fresh.rename(target / STUB_PACKAGE)


def is_current(proto_root: Path, target: Path) -> bool:
    """Whether target/rag is newer than every .proto file and than this script."""
    marker = target / STUB_PACKAGE / "py.typed"
    if not marker.exists():
        return False
    sources = [Path(__file__), *proto_root.rglob("*.proto")]
    return all(source.stat().st_mtime <= marker.stat().st_mtime for source in sources)


def _run_protoc(proto_root: Path, out: Path, protos: list[str]) -> None:
    from grpc_tools import protoc  # here, so that listing packages needs no grpcio-tools

    well_known = str(resources.files("grpc_tools") / "_proto")
    plugins = Path(sys.executable).parent
    arguments = ["protoc", f"-I{proto_root}", f"-I{well_known}"]
    for name in ("mypy", "mypy_grpc"):
        plugin = shutil.which(f"protoc-gen-{name}", path=str(plugins)) or shutil.which(f"protoc-gen-{name}")
        if plugin is None:
            raise RuntimeError(f"protoc-gen-{name} is missing: install mypy-protobuf")
        arguments += [f"--plugin=protoc-gen-{name}={plugin}", f"--{name}_out=quiet:{out}"]
    arguments += [f"--python_out={out}", f"--grpc_python_out={out}", *protos]
    status = protoc.main(arguments)
    if status != 0:
        raise RuntimeError(f"protoc refused the contract in {proto_root} (exit status {status})")


def main() -> None:
    """Builds ./rag from ./proto of this project, unless --if-changed is given and nothing changed."""
    if "--if-changed" in sys.argv[1:] and is_current(ROOT / "proto", ROOT):
        return
    build(ROOT / "proto", ROOT)
    print(f"stubs: {', '.join(stub_packages(ROOT / 'proto'))}")


if __name__ == "__main__":
    main()
