"""The worker's loop in this process, at the other end of its socket."""

from __future__ import annotations

import gc
import socket
import threading
from pathlib import Path

import torch

from generator_service.engine import messages
from generator_service.engine.frames import receive_frame
from generator_service.engine.messages import Ready
from generator_service.engine.worker_process import WorkerProcess
from tests.generator_service.engine.test_worker import options
from tests.parity.tiny_models import tiny_rag


def test_what_a_worker_has_loaded_is_left_out_of_garbage_collections_while_it_serves(tmp_path: Path) -> None:
    tiny_rag("bart").generator.save_pretrained(tmp_path)
    ours, its = socket.socketpair()
    threads = torch.get_num_threads()
    worker = threading.Thread(target=WorkerProcess(its, options(tmp_path)).run)
    worker.start()
    try:
        frame = receive_frame(ours)
        assert frame is not None
        assert isinstance(messages.decode_report(frame), Ready)
        assert gc.get_freeze_count() > 1000
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        worker.join(30)
        torch.set_num_threads(threads)
        ours.close()
        its.close()
    assert not worker.is_alive()
    assert gc.get_freeze_count() == 0
