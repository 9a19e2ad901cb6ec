"""What a worker process does about the process that started it."""

import gc
import multiprocessing
import os
import signal
import threading


def free_videos() -> None:
    """To be called before a fork: frees what is left of videos that were read or written. The new process would free
    it too, and wait for ever for FFmpeg's threads, which it does not have."""
    gc.collect()


def end_with_parent(worker: int = 0) -> None:
    """For `worker_init_fn`: a worker ends at once when its parent is gone, in the midst of decoding too. Ctrl-C is the
    parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
