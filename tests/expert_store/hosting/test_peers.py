"""Who a certificate is for, and whether that name is on the list."""

from typing import Any

import pytest

from expertd.hosting.peers import PLAINTEXT_NAME, Peers, certificate_names, matches
from expertd.settings.tcp_config import TcpConfig
from expertstore.errors import CapacityError, PermissionDeniedError


class Context:
    """A call, as far as its peer is concerned."""

    def __init__(self, address: str = "ipv4:10.0.0.9:5", *dns: str) -> None:
        self._address, self._dns = address, dns

    def peer(self) -> str:
        return self._address

    def auth_context(self) -> dict[str, list[bytes]]:
        names = [name.encode() for name in self._dns]
        return {"x509_subject_alternative_name": names, "peer_dns": names}


def peers(*names: str, **settings: Any) -> Peers:
    values: dict[str, Any] = {"certificate": "c", "key": "k", "client_ca": "a"}
    return Peers(TcpConfig("127.0.0.1:0", allowed_names=names, **{**values, **settings}))


def of(table: Peers, *context: str) -> Any:
    return table.of(Context(*context))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("auth", "names"),
    [
        ({"x509_subject_alternative_name": [b"a"], "peer_dns": [b"a"]}, ["a"]),
        (
            {
                "x509_subject_alternative_name": [b"a", b"spiffe://x/y", b"10.0.0.1"],
                "peer_dns": [b"a"],
                "peer_uri": [b"spiffe://x/y"],
                "peer_ip": [b"10.0.0.1"],
                "x509_common_name": [b"cn"],
            },
            ["a", "spiffe://x/y"],
        ),
        ({"x509_common_name": [b"cn"]}, ["cn"]),
        # A certificate with other names is not also for what its subject happens to say.
        (
            {"x509_subject_alternative_name": [b"10.0.0.1"], "x509_common_name": [b"cn"]},
            [],
        ),
        ({"x509_common_name": [b""]}, []),
        ({}, []),
    ],
)
def test_names_of_a_certificate(auth: dict[str, list[bytes]], names: list[str]) -> None:
    assert certificate_names(auth) == names


@pytest.mark.parametrize(
    ("name", "pattern", "result"),
    [
        ("worker-1.lab", "worker-1.lab", True),
        ("Worker-1.LAB", "worker-1.lab", True),
        ("worker-1.lab", "worker-2.lab", False),
        ("worker-1.lab.evil.org", "worker-1.lab", False),
        ("worker-1.lab", "*.lab", True),
        ("a.worker-1.lab", "*.lab", False),
        ("lab", "*.lab", False),
        (".lab", "*.lab", False),
        ("*.lab", "*.lab", False),
        ("evil-lab", "*.lab", False),
        ("spiffe://lab/worker", "spiffe://lab/worker", True),
        ("spiffe://lab/Worker", "spiffe://lab/worker", False),
        ("", "worker", False),
    ],
)
def test_matching(name: str, pattern: str, result: bool) -> None:
    assert matches(name, pattern) is result


def test_a_process_of_this_host_has_no_name() -> None:
    assert of(peers("w"), "unix:") is None


def test_any_name_of_the_certificate_will_do() -> None:
    assert of(peers("w"), "ipv4:10.0.0.9:5", "other", "w").name == "w"


def test_without_tls_there_is_one_name_for_all() -> None:
    table = Peers(TcpConfig("127.0.0.1:0", plaintext=True))
    assert of(table, "ipv4:127.0.0.1:5").name == PLAINTEXT_NAME


def test_strangers_are_refused_and_their_names_logged_only_so_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = peers("w")
    with caplog.at_level("INFO", "expertd"):
        for number in range(1000):
            for _ in range(2):
                with pytest.raises(PermissionDeniedError, match=f"for n{number} is not on"):
                    of(table, "ipv4:10.0.0.9:5", f"n{number}")
        with pytest.raises(PermissionDeniedError, match="no name"):
            of(table)
    assert len(caplog.records) == 64
    assert not list(table)


def test_reads_at_once_are_limited_by_name() -> None:
    table = peers("*.lab", max_reads=2)
    one, other = of(table, "ipv4:a:1", "a.lab"), of(table, "ipv4:b:1", "b.lab")
    one.begin_read()
    of(table, "ipv4:elsewhere:2", "a.lab").begin_read()
    with pytest.raises(CapacityError, match=r"a\.lab has 2 reads under way.*max_reads") as caught:
        one.begin_read()
    assert (caught.value.requested, caught.value.available, caught.value.unit) == (3, 2, "reads")
    other.begin_read()
    one.end_read()
    one.begin_read()


def test_any_number_of_names_is_remembered_in_bounded_memory() -> None:
    table = peers("*.lab")
    busy = of(table, "ipv4:a:1", "busy.lab")
    busy.begin_read()
    for number in range(1000):
        of(table, "ipv4:a:1", f"w{number}.lab")
    names = [peer.name for peer in table]
    assert len(names) == 256
    assert {"busy.lab", "w999.lab"} <= set(names)
