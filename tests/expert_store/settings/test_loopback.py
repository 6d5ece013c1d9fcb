import pytest

from expertd.settings.loopback import LoopbackAddress, parse_loopback


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9464", "127.0.0.1", 9464),
        ("127.8.9.1:0", "127.8.9.1", 0),
        ("localhost:1", "127.0.0.1", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_what_only_this_host_reaches(text: str, host: str, port: int) -> None:
    address = parse_loopback(text)
    assert address == LoopbackAddress(host, port)
    assert parse_loopback(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0:9464",
        "[::]:9464",
        "192.168.1.2:9464",
        "10.0.0.1:1",
        "8.8.8.8:53",
        "[2001:db8::1]:1",
    ],
)
def test_what_others_reach(text: str) -> None:
    with pytest.raises(ValueError, match="other hosts; give a loopback address"):
        parse_loopback(text)


@pytest.mark.parametrize(
    "text",
    ["", ":", "9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:1e3",
     "::1:9464", "[::1:1", "example.org:1", ":9464", "127.0.0.1:\u0661", "127.1:1"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="write it like"):
        parse_loopback(text)
