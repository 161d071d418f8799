"""Threads that give way to searches where cores are short."""

import os
import sys
import threading

_NICENESS = 10


def give_way() -> None:
    """Lowers the priority of this thread and of those that it makes, so that the others run first.

    What is left of the cores is enough to go on: with every core busy, the kernel still gives it a tenth of one.
    """
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
