"""Another library's exception as a part of one of our sentences."""

MAX_CHARACTERS = 300


def reason_of(error: BaseException) -> str:
    """What ``error`` says, in one line and without a stop; its type where it says nothing."""
    text = " ".join(str(error).split())
    if not text.endswith("..."):
        text = text.rstrip(".")
    if isinstance(error, KeyError):
        text = f"unknown: {text}"
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}..."
    return text or type(error).__name__
