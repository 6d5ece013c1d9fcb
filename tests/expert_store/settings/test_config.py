"""The daemon's settings: what is accepted, and that each refusal names file, key and value."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from expertd.log import LogFormat
from expertd.settings import users
from expertd.settings.config import ServeConfig, load_config, parse_model
from expertd.settings.disk_io import DiskIo
from expertd.settings.limits import ModelConfig
from expertd.settings.loopback import LoopbackAddress
from expertstore.errors import ConfigError


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "expertd.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = load_config(None, socket=Path("/run/x"), ram_bytes=1 << 20)
    assert config == ServeConfig(socket=Path("/run/x"), ram_bytes=1 << 20)
    assert (config.socket_mode, config.lock_memory, config.models) == (0o660, True, {})


def test_every_setting_in_a_file(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        """
        socket = "/run/expertd"
        ram = "1.5GiB"
        allowed_uids = [1000, 1001]
        writable_uids = [1001]
        allowed_groups = ["expertd", 990]
        socket_mode = "600"
        lock_memory = false
        disk_io = "mmap"
        page_cache = "3GiB"
        loader_threads = 2
        hint_depth = 3
        stall_seconds = 3
        fetch_seconds = 2.5
        drain_seconds = 0
        max_sessions = 9
        read_buffer = "64MiB"
        log_format = "json"
        metrics = "127.0.0.1:9464"
        [models]
        tiny = "/packs/tiny"
        """,
    )
    config = load_config(path)
    assert config == ServeConfig(
        socket=Path("/run/expertd"),
        ram_bytes=3 << 29,
        models={"tiny": ModelConfig(Path("/packs/tiny"))},
        allowed_uids=(1000, 1001),
        writable_uids=(1001,),
        allowed_groups=("expertd", 990),
        socket_mode=0o600,
        lock_memory=False,
        disk_io=DiskIo.MMAP,
        page_cache_bytes=3 << 30,
        loader_threads=2,
        hint_depth=3,
        stall_seconds=3.0,
        fetch_seconds=2.5,
        drain_seconds=0.0,
        max_sessions=9,
        read_buffer_bytes=64 << 20,
        log_format=LogFormat.JSON,
        metrics=LoopbackAddress("127.0.0.1", 9464),
    )
    assert isinstance(config.stall_seconds, float)


def test_what_is_given_beside_the_file_wins(tmp_path: Path) -> None:
    path = _file(tmp_path, 'socket = "/run/a"\nram = "1GiB"\n[models]\na = "/a"')
    config = load_config(path, ram_bytes=4096, socket=None, models={"b": ModelConfig(Path("/b"))})
    assert (config.ram_bytes, config.socket) == (4096, Path("/run/a"))
    assert config.models == {"b": ModelConfig(Path("/b"))}


def test_quotas_by_uid(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        'socket = "s"\nram = 8192\ndefault_quota = "1MiB"\n[quotas]\n1000 = "2GiB"\n7 = 4096',
    )
    config = load_config(path)
    assert config.quotas == {1000: 2 << 30, 7: 4096}
    assert config.default_quota_bytes == 1 << 20


def test_users_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"alice": 1001, "bob": 1002}
    monkeypatch.setattr(users.pwd, "getpwnam", lambda name: SimpleNamespace(pw_uid=known[name]))
    path = _file(
        tmp_path,
        'ram = 8192\nallowed_uids = ["alice", 7, "8"]\nwritable_uids = ["bob"]\n'
        '[quotas]\nalice = "2GiB"\n9 = 4096',
    )
    config = load_config(path)
    assert config.allowed_uids == (1001, 7, 8)
    assert config.writable_uids == (1002,)
    assert config.quotas == {1001: 2 << 30, 9: 4096}
    twice = _file(tmp_path, 'ram = 8192\n[quotas]\nalice = "2GiB"\n1001 = "1GiB"')
    with pytest.raises(ConfigError, match=r"quotas has two for uid 1001, one by the name '1001'"):
        load_config(twice)


def test_ram_in_plain_bytes(tmp_path: Path) -> None:
    assert load_config(_file(tmp_path, 'socket = "s"\nram = 8192')).ram_bytes == 8192


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("rum = 1", ["unknown setting 'rum'", "ram", "socket"]),
        ('ram = "much"', ["ram = 'much'", "512MiB"]),
        (f'ram = "{"9" * 400}"', ["ram = ", "not a size"]),
        ("ram = 1.5", ["ram = 1.5", "float"]),
        ("ram = true", ["ram = True", "bool"]),
        ("ram = 4095", ["ram", "4095"]),
        ("socket = 3", ["socket = 3", "int"]),
        ("socket_mode = 660", ["socket_mode = 660", "int"]),
        ('socket_mode = "rw"', ["socket_mode = 'rw'", "base 8"]),
        ('socket_mode = "1777"', ["socket_mode", "1777"]),
        ('socket_mode = "-7"', ["socket_mode", "-7"]),
        ("lock_memory = 1", ["lock_memory = 1", "int"]),
        ('disk_io = "fast"', ["'fast'", "disk_io is auto, direct, mmap"]),
        ("disk_io = true", ["True", "disk_io is auto, direct, mmap"]),
        ("direct_io = true", ["unknown setting 'direct_io'", "disk_io"]),
        ("page_cache = -1", ["page_cache", "-1"]),
        ('page_cache = "all"', ["page_cache = 'all'", "not a size"]),
        ("loader_threads = 2.5", ["loader_threads = 2.5", "float"]),
        ("loader_threads = true", ["loader_threads = True", "bool"]),
        ("loader_threads = 0", ["loader_threads", "0"]),
        ("loader_threads = 100000", ["loader_threads", "100000"]),
        ("stall_seconds = false", ["stall_seconds = False", "bool"]),
        ("stall_seconds = nan", ["stall_seconds", "nan"]),
        ("fetch_seconds = inf", ["fetch_seconds", "inf"]),
        ("fetch_seconds = -1", ["fetch_seconds", "-1"]),
        ("drain_seconds = -0.5", ["drain_seconds", "-0.5"]),
        ("max_sessions = 0", ["max_sessions", "0"]),
        ("max_sessions_per_uid = 0", ["max_sessions_per_uid", "0"]),
        ('default_quota = "all"', ["default_quota = 'all'", "not a size"]),
        ("default_quota = 0", ["default_quota", "positive"]),
        ("default_quota = true", ["default_quota = True", "bool"]),
        ('quotas = "1GiB"', ["quotas = '1GiB'", "str"]),
        ('quotas = {nobody-here = "1GiB"}', ["quotas names 'nobody-here', and", "no such user"]),
        ('quotas = {-1 = "1GiB"}', ["quotas names '-1', and", "no such user"]),
        ('quotas = {1000 = "lots"}', ["quotas", "'lots' is not a size"]),
        ("quotas = {1000 = 1.5}", ["quotas", "that of 1000 is a float"]),
        ("quotas = {1000 = -1}", ["quota of 1000", "positive"]),
        ("read_buffer = 0", ["read_buffer", "0"]),
        ('read_buffer = "much"', ["read_buffer = 'much'", "512MiB"]),
        ('log_format = "xml"', ["log_format = 'xml'", "text, json"]),
        ("log_format = []", ["log_format = []", "text, json"]),
        ("metrics = 9464", ["metrics = 9464", "int"]),
        ('metrics = "0.0.0.0:9464"', ["metrics = '0.0.0.0:9464'", "other hosts"]),
        ("allowed_uids = 1000", ["allowed_uids = 1000", "int"]),
        ('allowed_uids = ["nobody-here"]', ["allowed_uids names 'nobody-here', and"]),
        ('allowed_uids = ["a\\u0000b"]', ["allowed_uids names 'a\\x00b', and"]),
        ("allowed_uids = [true]", ["allowed_uids", "bool"]),
        ("allowed_uids = [-1]", ["allowed_uids", "-1"]),
        ("writable_uids = [-1]", ["writable_uids", "-1"]),
        ('writable_uids = ["nobody-here"]', ["writable_uids names 'nobody-here', and"]),
        ('allowed_groups = "expertd"', ["allowed_groups = 'expertd'", "str"]),
        ("allowed_groups = [1.5]", ["allowed_groups", "float"]),
        ("allowed_groups = [-1]", ["allowed_groups", "-1"]),
        ('models = "tiny"', ["models = 'tiny'", "str"]),
        ("models = {tiny = 3}", ["models.tiny", "int"]),
        ('models = {"a/b" = "/p"}', ["a/b", "name a model"]),
        ("ram = ", ["not valid TOML"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, names: list[str]) -> None:
    path = _file(tmp_path, line)
    with pytest.raises(ConfigError) as caught:
        load_config(path, socket=Path("s"), ram_bytes=4096)
    message = str(caught.value)
    assert all(name in message for name in [str(path), *names]), message
    assert "\n" not in message
    assert message.endswith(".")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.toml cannot be read: No such file"):
        load_config(tmp_path / "missing.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.toml is not valid TOML"):
        load_config(binary)


def test_what_must_be_given() -> None:
    with pytest.raises(ConfigError, match="ram is not set; give --ram"):
        load_config(None, socket=Path("s"))


def test_models_on_the_command_line() -> None:
    assert parse_model("a=/packs/x=y") == ("a", ModelConfig(Path("/packs/x=y")))
    assert parse_model("a=packs/x") == ("a", ModelConfig(Path("packs/x").absolute()))


def test_a_pack_in_its_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_PACKS", str(tmp_path))
    (tmp_path / "there").mkdir()
    (tmp_path / "there/pack.json").touch()
    assert parse_model("there") == ("there", ModelConfig(tmp_path / "there"))
    assert parse_model("a=there") == ("a", ModelConfig(tmp_path / "there"))
    with pytest.raises(ConfigError, match="or a name that `expertd packs` lists"):
        parse_model("absent")


@pytest.mark.parametrize("text", ["", "a", "a=", "=/p", "a/b=/p", "a\n=/p", "x" * 129 + "=/p"])
def test_what_is_no_model(text: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        parse_model(text)
