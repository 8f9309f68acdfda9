"""The hostfile, refused where DeepSpeed would misread it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.hosts import read_hostfile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("n1 slots=2\nn1 slots=2", ":2: host n1 is named twice"),
        ("n1", ":1: 'n1'; write NAME slots=RANKS"),
        ("# hosts\nn1 slots=0", ":2:"),
        ("n1 slots=2 slots=3", ":1:"),
    ],
)
def test_hostfiles_that_deepspeed_would_misread(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ClusterError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_an_error_not_a_local_run(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot read the hostfile .*nowhere: No such file"):
        read_hostfile(tmp_path / "nowhere")


def test_hostfile_with_comments(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two machines\n\nn1 slots=2\n n2   slots=4 # the big one\n")
    assert read_hostfile(tmp_path / "hosts") == {"n1": 2, "n2": 4}


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfn1 slots=2\n")
    assert read_hostfile(tmp_path / "hosts") == {"n1": 2}


def test_the_example_can_be_read() -> None:
    import cluster

    example = Path(cluster.__file__).parent / "hostfile.example"
    assert read_hostfile(example) == {"node-1": 8, "node-2": 8}
