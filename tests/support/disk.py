"""A disk on which large files cannot be written: the system itself refuses the write."""

import contextlib
import resource


@contextlib.contextmanager
def files_limited_to(num_bytes):
    """Let every write of this process beyond `num_bytes` of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
