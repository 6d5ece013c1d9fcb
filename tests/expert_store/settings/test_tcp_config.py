"""The [tcp] table: off unless asked for, and each mistake is one sentence that names it."""

from pathlib import Path

import pytest

from expertd.settings.config import load_config
from expertd.settings.tcp_config import TcpConfig
from expertstore.errors import ConfigError

SECURED = {
    "listen": '"0.0.0.0:7443"',
    "certificate": '"/tls/c.pem"',
    "key": '"/tls/c.key"',
    "client_ca": '"/tls/ca.pem"',
    "allowed_names": '["worker-1.lab", "*.lab", "spiffe://lab/worker"]',
}


def load(tmp_path: Path, **settings: str) -> TcpConfig:
    path = tmp_path / "expertd.toml"
    lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
    path.write_text(f"[tcp]\n{lines}\n")
    return load_config(path, socket=Path("s"), ram_bytes=4096).tcp


def test_off_by_default(tmp_path: Path) -> None:
    assert not load_config(None, socket=Path("s"), ram_bytes=4096).tcp.enabled
    assert not load(tmp_path).enabled
    assert not load(tmp_path, listen='""').enabled


def test_mutual_tls(tmp_path: Path) -> None:
    config = load(tmp_path, **SECURED)
    assert config == TcpConfig(
        listen="0.0.0.0:7443",
        certificate=Path("/tls/c.pem"),
        key=Path("/tls/c.key"),
        client_ca=Path("/tls/ca.pem"),
        allowed_names=("worker-1.lab", "*.lab", "spiffe://lab/worker"),
    )
    assert config.enabled


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("localhost:7443", ("127.0.0.1", 7443)),
        ("[::1]:7443", ("::1", 7443)),
    ],
)
def test_plaintext_on_loopback(tmp_path: Path, listen: str, address: tuple[str, int]) -> None:
    config = load(tmp_path, listen=f'"{listen}"', plaintext="true")
    assert config.address == address


@pytest.mark.parametrize("listen", ["0.0.0.0:7443", "[::]:7443", "10.0.0.1:7443"])
def test_plaintext_is_refused_where_other_hosts_can_connect(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"tcp\.plaintext is refused on .*loopback"):
        load(tmp_path, listen=f'"{listen}"', plaintext="true")


@pytest.mark.parametrize("missing", ["certificate", "key", "client_ca", "allowed_names"])
def test_what_mutual_tls_needs(tmp_path: Path, missing: str) -> None:
    settings = {name: value for name, value in SECURED.items() if name != missing}
    with pytest.raises(ConfigError, match=rf"tcp\.{missing} is not set; .*mutual TLS"):
        load(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("listen", '"7443"', "IP address and a port"),
        ("listen", '"worker.lab:7443"', "IP address and a port"),
        ("listen", '"::1:7443"', "IP address and a port"),
        ("listen", '"127.0.0.1:70000"', "IP address and a port"),
        ("listen", '""', "no listen"),
        ("listen", "7443", "listen is a int"),
        ("allowed_names", "[]", "allowed_names is not set"),
        ("allowed_names", '["w*.lab"]', r"allowed_names has 'w\*\.lab'"),
        ("allowed_names", '["*."]', "allowed_names has"),
        ("allowed_names", '["a\\nb"]', "allowed_names has"),
        ("allowed_names", '"worker"', "allowed_names is a str"),
        ("max_reads", "0", "max_reads is 0"),
        ("plaintext", "true", "plaintext"),
        ("plaintext", "1", "plaintext is a int"),
        ("cert", '"x"', "unknown setting tcp.cert; known are .*certificate"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path, **{**SECURED, name: value})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/expertd.toml: ")
    assert "\n" not in message
    assert message.endswith(".")


def test_plaintext_and_certificates_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contradicts tcp\.certificate"):
        load(tmp_path, **{**SECURED, "listen": '"127.0.0.1:0"', "plaintext": "true"})
