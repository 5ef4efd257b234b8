"""SHA256SUMS: written like `sha256sum` writes it, and every departure from it is refused."""

import hashlib
import shutil
import subprocess

import pytest

from hmoe_jax.checkpoint import integrity
from hmoe_jax.checkpoint.integrity import covered_bytes, should_verify, verify, write_sums
from hmoe_jax.core import CheckpointError

from .crafted import SHARD_NAMES, folder_content, write_folder

ZEROS = "0" * 64


@pytest.fixture
def folder(tmp_path):
    """A verified folder."""
    write_sums(write_folder(tmp_path, folder_content()))
    return tmp_path


def rejected(folder) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    return caught.value


def test_sums_just_written_verify(folder):
    verify(folder)
    verify(str(folder), num_threads=1)


def test_sums_list_every_file_in_order_and_nothing_else_is_left_behind(folder):
    text = (folder / "SHA256SUMS").read_text()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in folder_content().items()}
    assert text == "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    assert {path.name for path in folder.iterdir()} == {"SHA256SUMS", *digests}


def test_sums_can_be_written_again(folder):
    before = (folder / "SHA256SUMS").read_bytes()
    assert write_sums(folder) == folder / "SHA256SUMS"
    assert (folder / "SHA256SUMS").read_bytes() == before


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this machine")
@pytest.mark.parametrize("mode", ["--text", "--binary"])
def test_sha256sum_reads_our_sums_and_we_read_its(folder, mode):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    names = [name for name in folder_content() if not name.startswith("SHA")]
    written = subprocess.run(["sha256sum", mode, *names], cwd=folder, check=True, capture_output=True).stdout
    (folder / "SHA256SUMS").write_bytes(written)
    verify(folder)


def test_a_changed_byte_is_refused_with_both_digests(folder):
    path = folder / SHARD_NAMES[1]
    good = path.read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1])
    path.write_bytes(bad)
    error = rejected(folder)
    assert (error.problem, error.file) == ("SHA-256 is not that of SHA256SUMS", str(path))
    assert (error.expected, error.actual) == (
        hashlib.sha256(good).hexdigest(),
        hashlib.sha256(bad).hexdigest(),
    )


def test_a_listed_file_must_exist(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is in SHA256SUMS, but not in the folder"):
        verify(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "extra.safetensors"])
def test_a_file_that_could_steer_the_load_must_be_listed(folder, name):
    (folder / name).write_bytes(b"{}")
    error = rejected(folder)
    assert (error.problem, error.file) == ("is not in SHA256SUMS", str(folder / name))


def test_other_files_need_not_be_listed(folder):
    (folder / "README.md").write_text("hello")
    verify(folder)


def test_sums_are_required_to_verify(tmp_path):
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: cannot be read \(No such file or directory\)"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "malformed line 1"),
        (f"{ZEROS}  a\n\n".encode(), "malformed line 2"),
        (f"{ZEROS} a\n".encode(), "malformed line 1"),
        (f"{ZEROS}  \n".encode(), "malformed line 1"),
        (f"{ZEROS[1:]}  a\n".encode(), "malformed line 1"),
        (f"{'G' * 64}  a\n".encode(), "malformed line 1"),
        (f"\\{ZEROS}  a\\nb\n".encode(), "malformed line 1"),
        (f"{ZEROS}  ../a\n".encode(), "unusable file name"),
        (f"{ZEROS}  ..\n".encode(), "unusable file name"),
        (f"{ZEROS}  /a\n".encode(), "unusable file name"),
        (f"{ZEROS}  a/b\n".encode(), "unusable file name"),
        (f"{ZEROS}  a\r\n".encode(), "unusable file name"),
        (f"{ZEROS}  a\n{ZEROS}  a\n".encode(), "line 2 lists 'a' a second time"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_malformed_sums_are_refused(folder, text, problem):
    (folder / "SHA256SUMS").write_bytes(text)
    error = rejected(folder)
    assert error.problem.startswith(problem)
    assert error.file == str(folder / "SHA256SUMS")


def test_a_name_that_cannot_be_listed_is_refused_when_writing(folder):
    before = (folder / "SHA256SUMS").read_bytes()
    (folder / "a\nb").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"unusable file name: .* got 'a\\nb'"):
        write_sums(folder)
    assert (folder / "SHA256SUMS").read_bytes() == before


def test_hashed_bytes_are_reported_and_add_up(folder):
    reported = []
    verify(folder, on_bytes=reported.append)
    assert sum(reported) == covered_bytes(folder) == sum(map(len, folder_content().values()))


def test_verification_is_automatic_for_small_folders_with_sums(folder, monkeypatch):
    assert should_verify(folder, "auto")
    monkeypatch.setattr(integrity, "AUTO_LIMIT_BYTES", covered_bytes(folder))
    assert not should_verify(folder, "auto")
    (folder / "SHA256SUMS").unlink()
    monkeypatch.undo()
    assert not should_verify(folder, "auto")


def test_a_clear_answer_is_taken_without_looking(tmp_path):
    assert should_verify(tmp_path / "nowhere", True)
    assert not should_verify(tmp_path / "nowhere", False)
