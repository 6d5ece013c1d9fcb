"""Users of this host, as settings name them: by name or by number."""

import pwd

from expertstore.errors import ConfigError


def uid_of(user: str | int, setting: str) -> int:
    """The uid that ``user`` has, or is.

    Raises :class:`ConfigError` that names the user and the ``setting`` if there is no such one.
    """
    if isinstance(user, int):
        return user
    if user.isascii() and user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):  # ValueError: of what no name can have, such as a zero byte
        raise ConfigError(
            f"{setting} names {user!r}, and this host has no such user; give a name that it has or "
            "a uid, or take it out."
        ) from None
