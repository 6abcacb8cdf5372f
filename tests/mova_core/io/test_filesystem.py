"""Which errors of a filesystem are worth another attempt, and what is said about the others."""

import errno
import pickle

import pytest

from mova_core.io import filesystem
from mova_core.io.filesystem import (
    AccessDeniedError,
    NotFoundError,
    ReadError,
    open_filesystem,
    read_file,
    with_retries,
)


class NoCredentialsError(Exception):
    """As botocore's: an error of its own, no OSError."""


NoCredentialsError.__module__ = "botocore.exceptions"


class ClientError(Exception):
    """As botocore's, the cause of what s3fs raises."""


ClientError.__module__ = "botocore.exceptions"


class HttpError(Exception):
    """As aiohttp's."""

    def __init__(self, status: int):
        self.status, self.message = status, "of the server"


HttpError.__module__ = "aiohttp.client_exceptions"


def attempts_on(error: BaseException, cause: BaseException | None = None) -> tuple[int, ReadError]:
    attempts = 0

    def call() -> None:
        nonlocal attempts
        attempts += 1
        raise error from cause

    with pytest.raises(ReadError) as caught:
        with_retries(call)
    return attempts, caught.value


@pytest.mark.parametrize(
    ("error", "cause", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), None, "Input/output error"),
        (ConnectionResetError("reset"), None, "reset"),
        (TimeoutError(), None, "TimeoutError"),
        (HttpError(503), None, "HTTP 503 of the server"),
        (FileNotFoundError("http://h/a"), HttpError(503), "HTTP 503 of the server"),
        (FileNotFoundError("http://h/a"), ConnectionRefusedError("refused"), "refused"),
    ],
)
def test_errors_that_pass_are_tried_again(error, cause, said):
    attempts, raised = attempts_on(error, cause)
    assert attempts == filesystem.ATTEMPTS and type(raised) is ReadError
    assert str(raised) == f"cannot be read ({filesystem.ATTEMPTS} attempts failed: {said})"
    assert raised.__cause__ is error


@pytest.mark.parametrize(
    ("error", "cause", "kind", "said"),
    [
        (FileNotFoundError("memory://a"), None, NotFoundError, "No such file or directory"),
        (FileNotFoundError("memory://a"), KeyError("a"), NotFoundError, "No such file or directory"),
        (FileNotFoundError("bucket/a"), ClientError("404"), NotFoundError, "No such file or directory"),
        (FileNotFoundError("http://h/a"), HttpError(404), NotFoundError, "No such file or directory"),
        (HttpError(403), None, AccessDeniedError, "HTTP 403 of the server"),
        (PermissionError("Access Denied"), ClientError("403"), AccessDeniedError, "Access Denied"),
        (NoCredentialsError("no keys"), None, AccessDeniedError, "NoCredentialsError: no keys"),
        (OSError(errno.EMFILE, "Too many open files"), None, ReadError, "Too many open files"),
        (OSError(errno.ENOSPC, "No space left"), None, ReadError, "No space left"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), None, ReadError, "Is a directory"),
        (HttpError(400), None, ReadError, "HTTP 400 of the server"),
        (KeyError("a bug"), None, ReadError, "KeyError: 'a bug'"),
        (NotFoundError(errno.ENOENT, "as it is"), None, NotFoundError, "as it is"),
    ],
)
def test_other_errors_are_raised_at_once_with_their_reason(error, cause, kind, said):
    attempts, raised = attempts_on(error, cause)
    assert attempts == 1 and type(raised) is kind
    assert str(raised) == f"cannot be read ({said})" and raised.strerror == said
    assert raised.errno == (getattr(error, "errno", None) or raised.errno)


def test_a_later_attempt_may_succeed():
    outcomes: list[str | Exception] = [ConnectionResetError(), ConnectionResetError(), "content"]

    def call() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert with_retries(call) == "content" and not outcomes


def test_errors_survive_a_process():
    error = pickle.loads(pickle.dumps(NotFoundError(errno.ENOENT, "no such file")))
    assert isinstance(error, FileNotFoundError) and str(error) == "cannot be read (no such file)"
    assert error.errno == errno.ENOENT


def test_files_here_and_elsewhere(web, tmp_path):
    (web.folder / "a.txt").write_bytes(b"content")
    assert read_file(f"{web.url}/a.txt") == read_file(web.folder / "a.txt") == b"content"
    with pytest.raises(FileNotFoundError):
        read_file(f"{web.url}/b.txt")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "b.txt")


def test_filesystems_that_cannot_be_opened(monkeypatch):
    with pytest.raises(ReadError, match="Protocol not known: nosuch"):
        open_filesystem("nosuch://a")

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(filesystem, "url_to_fs", missing)
    with pytest.raises(ReadError, match=r"Install s3fs to access S3: pip install 'mova-ray\[s3\]'"):
        open_filesystem("s3://bucket/a")
    with pytest.raises(ReadError, match=r"Install s3fs to access S3\)$"):
        open_filesystem("other://bucket/a")
