"""A model's tokenizer and chat template, as the front uses them: its engine knows only tokens."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertd_inference.model.tokenizer import load_tokenizer
from expertd_inference.process.reasons import reason_of
from expertd_inference.server.chat.images import Images
from expertd_inference.settings import check_prompt
from expertstore.errors import InvalidInputError, PackError
from expertstore.pack.seeing import sees, why_blind

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
"""How SentencePiece names the bytes of what it has no token for."""


class ModelText:
    """Text to tokens and back, for the model called ``name``, whose pack is in a directory."""

    def __init__(
        self,
        name: str,
        pack: Path,
        template: str | None = None,
        chat_format: str | None = None,
        images_folder: Path | None = None,
    ) -> None:
        """``template`` is a chat template in place of the pack's, ``chat_format`` its answers'.

        Files of images may be in ``images_folder``, and nowhere else. Raises PackError.
        """
        self.name = name
        self.chat_format = chat_format
        self.tokenizer = load_tokenizer(pack)
        self.chat_template: str | dict[str, str] | None = template
        """As the tokenizer has it, or in its place."""
        if template is None:
            self.chat_template = getattr(self.tokenizer, "chat_template", None)
        self.temperature = _wished_temperature(pack)
        """What the pack wishes where a request does not say; 1 unless it does."""
        described = getattr(self.tokenizer, "response_template", None)
        self.response_template: Mapping[str, Any] | None = described
        """The format of answers as the tokenizer describes it, if it does."""
        added = _added_tokens(self.tokenizer)
        self.added_tokens: dict[str, int] = {str(one): id_ for id_, one in added.items()}
        """Tokens that are no part of the text that the tokenizer learned from."""
        self.special_tokens: dict[int, str] = {
            id_: str(one) for id_, one in added.items() if one.special
        }
        """Those of them which are left out of texts if ``skip_special_tokens``."""
        self._byte_of_character = _byte_level(self.tokenizer)
        self._image_token, self._why_blind = _sight_of(name, pack)
        self._images_folder = images_folder
        self._fast: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        """Of the tokenizers library; None for a tokenizer of Python."""

    @property
    def templates(self) -> str:
        """The chat template; of several, all, one after the other. Empty if there is none."""
        found = self.chat_template
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return not self._why_blind

    def images(self) -> Images:
        """What takes those of one request."""
        return Images(self._images_folder, self._why_blind)

    def check_places(self, tokens: Sequence[int], num_images: int) -> None:
        """Raises InvalidInputError unless ``tokens`` have one image token for each image."""
        if not self.sees or (num := tokens.count(self._image_token)) == num_images:
            return
        if num < num_images:
            raise InvalidInputError(
                f"The chat template of {self.name} has {num} places for {num_images} images; start "
                "the server with another (--chat-template FILE)."
            )
        marker = self.decode([self._image_token])
        raise InvalidInputError(
            f"The text has {marker}, which stands for an image; leave it out, and send the image."
        )

    def in_format(self, template: str | None, chat_format: str | None) -> "ModelText":
        """The same tokenizer with another chat template, if one is given, and another format."""
        if template is None and chat_format is None:
            return self
        other = copy.copy(self)
        other.chat_template = self.chat_template if template is None else template
        other.chat_format = chat_format or self.chat_format
        return other

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, with those that begin one if ``special``. Raises InvalidInputError."""
        check_prompt(text)
        try:
            if self._fast is None:
                tokens: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
            else:
                # In half of the tokenizer's own time, as it keeps no places in the text.
                encoded = self._fast.encode_batch_fast([text], add_special_tokens=special)
                tokens = encoded[0].ids
        except Exception as error:  # the tokenizers library has none but Exception
            raise PackError(
                f"The tokenizer of {self.name} fails: {reason_of(error)}; copy its files again."
            ) from error
        return tokens

    def decode(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of tokens."""
        text: str = self.tokenizer.decode([*tokens], skip_special_tokens=skip_special)
        return text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat, in the model's template; ``arguments`` are for the template.

        Raises InvalidInputError if there is no template, or none that takes the messages.
        """
        if not (template or self.chat_template):
            raise InvalidInputError(
                f"The model {self.name} has no chat template; ask for a completion, or start the "
                "server with --chat-template FILE."
            )
        for message in messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else [content]:
                said = part.get("text") if isinstance(part, dict) else part
                if isinstance(said, str):
                    check_prompt(said)
        if template is None and isinstance(self.chat_template, str):
            template = self.chat_template  # of several, which only it can have, the tokenizer takes
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None if documents is None else [dict(one) for one in documents],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=template,
                tokenize=False,
                **(arguments or {}),
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise InvalidInputError(
                f"The chat template of {self.name} does not take these messages: "
                f"{reason_of(error)}; send what it takes, or start the server with another "
                "(--chat-template FILE)."
            ) from error
        return text

    def token_text(self, token: int) -> str:
        """One token by itself; bytes that are no character are replaced."""
        return self.decode([token])

    def token_bytes(self, token: int) -> bytes:
        """One token by itself, which may be a part of a character."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if piece in _BYTE_TOKENS:
            return _BYTE_TOKENS[piece]
        if self._byte_of_character and all(one in self._byte_of_character for one in piece):
            return bytes(self._byte_of_character[one] for one in piece)
        return self.token_text(token).encode()


def _sight_of(name: str, pack: Path) -> tuple[int, str]:
    """The token that stands for an image, and why there is none."""
    try:
        config = json.loads((pack / CONFIG).read_bytes())
        kind, token = str(config.get("model_type")), config.get("image_token_id")
        if sees(pack, kind) and isinstance(token, int):
            return token, ""
    except (OSError, ValueError, AttributeError):
        kind = ""  # The engine says what is wrong with the pack.
    return -1, why_blind(name, kind)


def _added_tokens(tokenizer: Any) -> dict[int, Any]:  # noqa: ANN401 - transformers is untyped
    try:
        added: dict[int, Any] = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):  # mistral-common's
        return {}
    return added


def _wished_temperature(pack: Path) -> float:
    try:
        wished = json.loads((pack / GENERATION_CONFIG).read_bytes()).get("temperature")
    except (OSError, ValueError, AttributeError):
        return 1.0  # The engine says what is wrong with the file.
    return float(wished) if isinstance(wished, (int, float)) and wished >= 0 else 1.0


def _byte_level(tokenizer: Any) -> dict[str, int]:  # noqa: ANN401 - transformers is untyped
    """GPT-2's names of bytes, if the tokenizer's tokens are made of them; else nothing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in repr(backend.decoder):
        return {}
    # The printable ones are themselves, the others follow from 256 on (GPT-2's encoder.py).
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + at): byte for at, byte in enumerate(others)
    }
