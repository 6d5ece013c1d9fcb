"""Whether a dataclass's fields have values of the types that they are declared with."""

import reprlib
from functools import cache
from typing import Any, get_type_hints

import msgspec

from expertstore.errors import InvalidInputError


def check_types(instance: Any) -> None:  # noqa: ANN401 - a frozen dataclass
    """Checks all fields of ``instance``; lists become tuples where those are declared.

    Raises InvalidInputError that names the field.
    """
    for name, kind in _types_of(instance.__class__).items():
        value = getattr(instance, name)
        if hasattr(value, "tolist"):  # a number or an array of numpy's
            value = value.tolist()
        try:
            converted = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise InvalidInputError(
                f"{name} is {reprlib.repr(value)} ({type(value).__name__}); give {wanted}."
            ) from error
        object.__setattr__(instance, name, converted)


@cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
