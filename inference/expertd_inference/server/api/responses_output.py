"""The items of a response while they grow, and the events that say so."""

from collections.abc import Iterator, Mapping
from typing import Any

from expertd_inference.server.chat.answer import Piece
from expertd_inference.server.front import new_id

Event = dict[str, Any]
Item = dict[str, Any]


class Output:
    """What a response says: reasoning, a message, calls of functions, in this order of coming."""

    def __init__(self, namespaces: Mapping[str, str] | None = None) -> None:
        """``namespaces`` are those of functions that are in one."""
        self.items: list[Item] = []
        self._namespaces = namespaces or {}
        self._is_open = False
        self._logprobs: list[Any] = []
        """Of tokens whose text is held back."""

    def add(self, piece: Piece, logprobs: list[Any]) -> Iterator[Event]:
        """What a piece changes; ``logprobs`` are of its token."""
        self._logprobs += logprobs
        if piece.reasoning:
            self._logprobs = []
            yield from self._in("reasoning")
            yield self._grow("response.reasoning_text.delta", piece.reasoning)
        if piece.content:
            yield from self._in("message")
            certain, self._logprobs = self._logprobs, []
            yield self._grow("response.output_text.delta", piece.content, certain)
        for call in piece.calls:
            yield from self.end()
            yield from self._call(call.id, call.name, call.arguments)

    def end(self, status: str = "completed") -> Iterator[Event]:
        """Of the item that is open, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        part = item["content"][0]
        if item["type"] == "message":
            more = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", content_index=0, **more)
        else:
            yield self._event("response.reasoning_text.done", content_index=0, text=part["text"])
        yield self._event("response.content_part.done", content_index=0, part={**part})
        yield self._item_event("response.output_item.done", item)

    def complete(self, status: str) -> Iterator[Event]:
        """The end of all; there is a message even if the model said nothing."""
        if not self.items:
            yield from self._in("message")
        yield from self.end(status)

    def _in(self, kind: str) -> Iterator[Event]:
        """Opens an item of a kind unless the last one is."""
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self.end()
        self._is_open = True
        if kind == "message":
            item: Item = {"id": new_id("msg_"), "type": kind, "role": "assistant"}
            part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": new_id("rs_"), "type": kind, "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self.items.append({**item, "status": "in_progress", "content": []})
        yield self._item_event("response.output_item.added", {**self.items[-1], "content": []})
        self.items[-1]["content"].append(part)
        yield self._event("response.content_part.added", content_index=0, part={**part})

    def _grow(self, kind: str, text: str, logprobs: list[Any] | None = None) -> Event:
        part = self.items[-1]["content"][0]
        part["text"] += text
        more = {}
        if logprobs is not None:
            part["logprobs"] += logprobs
            more["logprobs"] = logprobs
        return self._event(kind, content_index=0, delta=text, **more)

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[Event]:
        item: Item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "completed",
            "call_id": call_id,
            "name": name,
            "arguments": arguments,
        }
        if (namespace := self._namespaces.get(name)) is not None:
            item["namespace"] = namespace
        self.items.append(item)
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._item_event("response.output_item.added", begun)
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", delta=arguments)
        yield self._event(f"{kind}.done", name=name, arguments=arguments)
        yield self._item_event("response.output_item.done", item)

    def _event(self, kind: str, **more: Any) -> Event:  # noqa: ANN401
        index = len(self.items) - 1
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": index, **more}

    def _item_event(self, kind: str, item: Item) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": item}
