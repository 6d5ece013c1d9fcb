import pytest

from expertd_inference.server.serve import ServerSettings
from expertstore.errors import InvalidInputError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "lab"])
def test_others_may_ask_only_with_keys_or_if_that_is_said(host: str) -> None:
    with pytest.raises(InvalidInputError, match="is open to other hosts"):
        ServerSettings(host=host)
    ServerSettings(host=host, no_auth=True)
    with pytest.raises(InvalidInputError, match=r"The socket unit's address .* is open"):
        ServerSettings().check_address(host, f"The socket unit's address {host}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_host_may_ask(host: str) -> None:
    assert ServerSettings(host=host).host == host
