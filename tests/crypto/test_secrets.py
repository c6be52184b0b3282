"""Passphrases from files, from the command line and from standard input."""

from __future__ import annotations

import base64
import io
import os
import threading
from pathlib import Path

import pytest
import trio

from fusedisk.core.errors import FusediskError, HostError, OptionError
from fusedisk.crypto import luks, secrets
from fusedisk.crypto.secrets import Secret, read_line
from tests.conftest import ToolError, run_tool
from tests.crypto import images
from tests.hostile.sentence import assert_sentence

TEXT = "pässword\t1"


def test_data_and_files(tmp_path: Path) -> None:
    raw, encoded = tmp_path / "raw", tmp_path / "base64"
    raw.write_text(TEXT)
    encoded.write_bytes(base64.encodebytes(TEXT.encode()))
    for secret in (
        Secret(data=TEXT),
        Secret(data=base64.b64encode(TEXT.encode()).decode(), format="base64"),
        Secret(file=str(raw)),
        Secret(file=str(encoded), format="base64"),
    ):
        assert secret.passphrase() == TEXT.encode(), secret


def test_a_newline_counts_in_a_file_and_not_on_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_text("pw\n")
    assert Secret(file=str(path)).passphrase() == b"pw\n"
    assert read_line(io.BytesIO(b"pw\nmore\n")) == b"pw"
    assert read_line(io.BytesIO(b"pw")) == b"pw"
    assert read_line(io.BytesIO(b" pw \r\n")) == b" pw \r"


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (b"plain", "raw"),
        (b"ends with a newline\n", "raw"),
        ("ünïcode".encode(), "raw"),
        (base64.encodebytes(b"wrapped" * 20), "base64"),
        (b"\xff\xfe", "raw"),
        (b"a\0b", "raw"),
        (base64.b64encode(b"\xff"), "base64"),
        (b"not base64!", "base64"),
    ],
)
def test_as_qemu_reads_them(tmp_path: Path, content: bytes, format: str) -> None:
    """QEMU opens a container of ours with the secret file, or refuses the file where we refuse it."""
    path, image = tmp_path / "secret", tmp_path / "disk.luks"
    path.write_bytes(content)
    try:
        passphrase = Secret(file=str(path), format=format).passphrase()
    except OptionError:
        passphrase = None
    made = luks.format(passphrase or b"x", luks.Options(iterations=1000))
    image.write_bytes(bytes(made.header.payload_offset + images.MIB))
    images.write_pieces(image, made.pieces)
    secret = f"secret,id=sec0,file={path},format={format}"
    opened = f"driver=luks,key-secret=sec0,file.filename={image}"
    command = ("--object", secret, "--image-opts", opened, "-c", "read 0 512")
    if passphrase is not None:
        run_tool("qemu-io", *command)
    else:
        with pytest.raises(ToolError, match=r"UTF-8|base64"):
            run_tool("qemu-io", *command)


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        (Secret(), "neither data nor file, expected one of them"),
        (Secret(data="x", file="y"), "both data and file, expected one of them"),
        (Secret(data="x", format="hex"), "format is 'hex', expected raw or base64"),
        (Secret(data=""), "The secret's data is empty, expected a passphrase"),
        (Secret(data="=", format="base64"), "The secret's data is not base64"),
        (Secret(data="a\0b"), "zero byte"),
        (Secret(data="\udcff"), "not UTF-8"),
        (Secret(data="ä" * secrets.MAX_SIZE), f"more than {secrets.MAX_SIZE} bytes"),
        (Secret(file="/dev/zero"), f"/dev/zero' has more than {secrets.MAX_SIZE} bytes"),
        (Secret(file="/dev/null"), "The secret file '/dev/null' is empty"),
    ],
)
def test_bad_secrets_are_refused(secret: Secret, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        secret.passphrase()
    assert_sentence(caught.value, text)


@pytest.mark.parametrize(("name", "text"), [("none", "No such file"), ("", "Is a directory")])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(HostError) as caught:
        Secret(file=path).passphrase()
    assert_sentence(caught.value, path.rstrip("/"), text)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\n", b"x" * (secrets.MAX_SIZE + 1)])
def test_bad_lines_are_refused(content: bytes) -> None:
    with pytest.raises(FusediskError) as caught:
        read_line(io.BytesIO(content))
    assert_sentence(caught.value, "The passphrase from standard input")


def test_a_pipe_is_read_once_and_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the daemon needs it after the command, and making an image after checking its options. A wait is told."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    told = threading.Event()
    writer = threading.Thread(target=lambda: told.wait(60) and pipe.write_text(TEXT))
    writer.start()
    monkeypatch.setattr(caplog.handler, "emit", lambda record: told.set())
    try:
        assert secrets.read_blocking(str(pipe), None) == TEXT.encode()
    finally:
        told.set()
        writer.join()
    pipe.unlink()
    assert secrets.read_blocking(str(pipe), "raw") == TEXT.encode()


async def test_waiting_for_a_pipe_can_be_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with trio.move_on_after(0) as scope:
        await secrets.read(str(tmp_path / "pipe"), None)
    assert scope.cancelled_caught
    os.close(os.open(tmp_path / "pipe", os.O_RDWR))  # lets the thread go that was left behind
