"""Files of any filesystem that fsspec knows: opening, time limits, retries, and errors that say what is wrong.

The only module that decides which errors are worth another attempt: reading of images, listing of data and the feature
store on an object store all use `with_retries`.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, BinaryIO, TypeVar

import fsspec
import tenacity
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mova_core.io.uris import is_url, local_path, scheme

ATTEMPTS = 5
# Waits of about 0.2, 0.6, 1.8 and 5.4 s: together longer than a server takes to restart. The random part keeps the actors
# of a cluster from asking a server again all at once.
WAIT: tenacity.wait.wait_base = tenacity.wait_exponential_jitter(initial=0.2, exp_base=3, jitter=0.5)
CONNECT_TIMEOUT_S = 15  # until an HTTP server accepts the connection
READ_TIMEOUT_S = 60  # longest pause of an HTTP server within its answer
REQUEST_TIMEOUT_S = 1800  # longest answer of an HTTP server: one byte after the other is no pause
RETRY_S = 600.0  # no further attempt begins after so many seconds
DOWNLOAD_S = 60.0  # a download may take so long, ...
LEAST_RATE = 50_000  # ... and a second longer for each so many bytes

# Packages to install for a URL scheme, as extras of the distribution mova-ray.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_FINAL_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
)
_ERRNOS: dict[type[OSError], int] = {  # of errors that fsspec's filesystems raise without a number
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    TimeoutError: errno.ETIMEDOUT,
}
# Limits of this machine, which another attempt meets again.
_FINAL_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG}
_NETWORK_PACKAGES = ("aiohttp", "botocore", "gcsfs")  # their errors are no OSErrors
_HTTP_TRANSIENT = (408, 425, 429)  # request timeout, too early, too many requests; and all of 500 and above

_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

T = TypeVar("T")


class ReadError(OSError):
    """A file, folder or object cannot be accessed now: the storage, the network or the rights are at fault, not the content.

    `strerror` holds the reason in one line without the path or URL, which the caller knows; `errno` holds the error
    number of the filesystem, EIO where the filesystem names none.
    """

    def __str__(self) -> str:
        return f"cannot be read ({self.strerror})"


class NotFoundError(ReadError, FileNotFoundError):
    """No file, folder or object of this name exists."""


class AccessDeniedError(ReadError, PermissionError):
    """Credentials are missing or wrong, or do not grant this access."""


def open_filesystem(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path in that filesystem.

    Args:
        options: for the constructor of the filesystem.

    Raises:
        ReadError: fsspec knows no filesystem for the URL, or its package is not installed.
    """
    if scheme(url) in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
        )
        options = {"client_kwargs": {"timeout": timeout}, **options}
    if (path := local_path(url)) is not None:
        return LocalFileSystem(), os.path.abspath(path)  # fsspec would take "a::b" for a chain of filesystems
    if "::" in url:
        raise ReadError(errno.EINVAL, "'::' in a URL names a chain of filesystems, which is not supported: rename it")
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme(url))
        install = f": pip install 'mova-ray[{extra}]'" if extra else ""
        raise ReadError(errno.ENOPKG, f"{message(error)}{install}") from error
    except ValueError as error:
        raise ReadError(errno.EPROTONOSUPPORT, message(error)) from error


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A whole local or remote file of any size, fetched anew on every call.

    Raises:
        OSError: the file cannot be read; FileNotFoundError: no such file.
    """
    if not is_url(path):
        with open_file(path) as file:
            return file.read()
    filesystem, inner_path = open_filesystem(os.fspath(path))
    return with_retries(lambda: filesystem.cat_file(inner_path))


def open_file(path: str | os.PathLike[str], block_size: int | None = None) -> Any:
    """A local or remote file, opened for reading bytes.

    Args:
        block_size: bytes fetched at a time of a remote file; default the filesystem's own.

    Raises:
        OSError: the file cannot be read, or is none: see `check_regular`; FileNotFoundError: no such file.
    """
    if not is_url(path):
        check_regular(path)
        return open(path, "rb")
    filesystem, inner_path = open_filesystem(os.fspath(path))
    return with_retries(lambda: filesystem.open(inner_path, "rb", block_size=block_size))


@contextlib.contextmanager
def open_seekable(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A local file, or a remote file's copy in a temporary file: read piece by piece, it takes no memory for its size.

    Raises:
        OSError: the file cannot be read, or is a pipe or a device, which cannot be read twice; FileNotFoundError: no such file.
    """
    if (local := local_path(path)) is not None:
        with open_file(local) as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:

        def download() -> None:
            copy.seek(0)
            copy.truncate()
            filesystem, inner_path = open_filesystem(os.fspath(path))
            with filesystem.open(inner_path, "rb") as remote:
                shutil.copyfileobj(remote, copy, 1 << 20)

        with_retries(download)
        copy.seek(0)
        yield copy


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a local file, without opening it: to open a named pipe or a device may wait for ever.

    Raises:
        OSError: no such file, or not a regular one.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        kind = next((name for test, name in _SPECIAL if test(status.st_mode)), "a special file")
        raise ReadError(errno.EINVAL, f"it is {kind}, not a file")
    return status


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, if it does so in time.

    A thread cannot be ended: one that is late goes on until the filesystem's own time limit, and nobody waits for it.

    Raises:
        ReadError: it is late. Otherwise what `call` raises.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    if not wait([result], seconds).done:
        raise ReadError(errno.ETIMEDOUT, f"the download took longer than {seconds:,.0f} s")
    return result.result()


def with_retries(call: Callable[[], T]) -> T:
    """Calls `call`, up to `ATTEMPTS` times while its error is one that passes (see `is_transient`).

    Raises:
        ReadError: the last attempt failed, or an error that does not pass; NotFoundError or AccessDeniedError where the
            filesystem says so. `__cause__` is the filesystem's own error.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_after_delay(RETRY_S),
        wait=WAIT,
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    try:
        return retrying(call)
    except ReadError:
        raise
    except Exception as error:
        raise as_read_error(error) from error


def is_transient(error: BaseException) -> bool:
    """Whether another attempt a moment later may succeed."""
    error = _real_cause(error)
    if isinstance(error, ReadError) or _lacks_credentials(error):
        return False
    if (status := _http_status(error)) is not None:
        return status >= 500 or status in _HTTP_TRANSIENT
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL_ERRORS) and error.errno not in _FINAL_ERRNOS
    return _package(error) in _NETWORK_PACKAGES


@contextlib.contextmanager
def read_errors() -> Iterator[None]:
    """An error of the operating system within it becomes a `ReadError`, which says in our words what is wrong."""
    try:
        yield
    except ReadError:
        raise
    except OSError as error:
        raise as_read_error(error) from error


def as_read_error(error: BaseException) -> ReadError:
    """A filesystem's error as one of ours; transient errors are taken to have failed at every attempt."""
    cause = _real_cause(error)
    status = _http_status(cause)
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        return NotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if isinstance(cause, PermissionError) or status in (401, 403) or _lacks_credentials(cause):
        return AccessDeniedError(errno.EACCES, message(cause))
    reason = f"{ATTEMPTS} attempts failed: {message(cause)}" if is_transient(cause) else message(cause)
    number = getattr(cause, "errno", None) or next(
        (n for kind, n in _ERRNOS.items() if isinstance(cause, kind)), errno.EIO
    )
    return ReadError(number, reason)


def message(error: BaseException) -> str:
    """An error in one line, without the URL that HTTP errors repeat."""
    if (status := _http_status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    name = type(error).__name__
    return text if text and isinstance(error, (OSError, ImportError, ValueError)) else f"{name}: {text}".rstrip(": ")


def _real_cause(error: BaseException) -> BaseException:
    """fsspec's HTTP filesystem raises FileNotFoundError whatever went wrong, with the real error as its cause."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        return cause if isinstance(cause, OSError) or _package(cause) == "aiohttp" else error
    return error


def _http_status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _lacks_credentials(error: BaseException) -> bool:
    """NoCredentialsError, PartialCredentialsError (botocore), DefaultCredentialsError (google.auth), ..."""
    return "Credentials" in type(error).__name__


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
