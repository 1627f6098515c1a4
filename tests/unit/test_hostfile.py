"""The hostfile: what is read, and what is refused with the number of its line."""

import pytest

from distlora.cluster.addresses import is_loopback
from distlora.cluster.hostfile import Host, parse_hostfile, read_hostfile
from distlora.errors import UserError


def test_hosts_in_their_order_without_comments_and_blank_lines(tmp_path):
    (tmp_path / "hosts").write_text(
        "# two nodes\n\nnode1 slots=8\n  ann@node2.local   slots=4  # fewer\n10.0.0.3 slots=1\n"
    )
    where = tmp_path / "hosts"
    hosts = read_hostfile(where)
    assert hosts == [
        Host("node1", 8, f"{where}:3"), Host("ann@node2.local", 4, f"{where}:4"),
        Host("10.0.0.3", 1, f"{where}:5"),
    ]  # fmt: skip
    assert [host.address for host in hosts] == ["node1", "node2.local", "10.0.0.3"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "hosts names no host"),
        ("# nobody\n\n", "hosts names no host"),
        ("node1 slots=2\nnode2\n", "hosts:2: found 'node2', wanted .* `node2 slots=8`"),
        ("node1 8\n", "hosts:1: found 'node1 8'"),
        ("node1 slots=two\n", "hosts:1: .*slots=two"),
        ("node1 slots=-1\n", "hosts:1: "),
        ("node1 slots=0\n", "hosts:1: node1 has slots=0"),
        ("node1 slots=2 max_slots=4\n", "hosts:1: "),
        ("node1 slots=2\n\nnode2 slots=2\nNODE1 slots=4\n", "hosts:4: NODE1 stands in hosts:1 already"),
        ("node1 slots=2\nann@node1 slots=2\n", "hosts:2: node1 stands in hosts:1"),
        ("node1 slots=2\nnöde2 slots=2\n", "hosts:2: 'nöde2 slots=2' has a character that is not ASCII"),
        ("node1\u00a0slots=2\n", "hosts:1: .*not ASCII"),
        ("-oProxyCommand=x slots=2\n", "hosts:1: '-oProxyCommand=x' is no host name"),
        ("node1;reboot slots=2\n", "hosts:1: 'node1;reboot' is no host name"),
    ],
)
def test_what_is_refused(text, complaint):
    with pytest.raises(UserError, match=f"^{complaint}[^\n]*$"):
        parse_hostfile(text.encode(), "hosts")


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such hostfile"):
        read_hostfile(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path)


def test_names_of_the_machine_itself():
    assert all(map(is_loopback, ["localhost", "localhost.localdomain", "127.0.0.1", "127.0.1.1", "::1"]))
    assert not any(map(is_loopback, ["node1", "localhost1", "10.127.0.1", "1270.example"]))
