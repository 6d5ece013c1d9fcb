"""Batches of a server, with a double for its models; servers that end and are started again."""

import asyncio
import contextlib
import errno
import os
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from expertd_inference.server.api import files as files_api
from expertd_inference.server.app import make_app
from expertd_inference.server.batches import batch_output, batch_worker, batches, stored_files
from expertd_inference.server.batches.batch_file import BatchRequest
from expertd_inference.server.batches.batch_run import Reply
from expertd_inference.server.front import Front
from expertd_inference.server.metrics import ServerMetrics
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import PreconditionError
from tests.inference.server.batches.lines import answers_of, request, write_lines

OK = Reply(200, "id", b'{"choices": []}')
WRONG = Reply(400, "id", b'{"error": {"message": "No."}}')
END = "/v1/completions"


class Model:
    """Answers once it is told to; requests named wrong get an error."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.going = asyncio.Event()
        self.running = self.most = 0

    def door(self, user: str) -> Callable[[BatchRequest], Any]:
        async def ask(request: BatchRequest) -> Reply:
            self.asked.append((user, request.custom_id))
            if request.custom_id == "keyless":
                raise PreconditionError("There is no key any more.")
            self.running += 1
            self.most = max(self.most, self.running)
            if not request.custom_id.startswith("now"):
                await self.going.wait()
            await asyncio.sleep(0)
            self.running -= 1
            return WRONG if "wrong" in request.custom_id else OK

        return ask


@asynccontextmanager
async def serving(
    state: Path | None, model: Model, user: str = "", at_once: int = 2
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server whose requests are ``user``'s."""
    front = Front(None, ServerMetrics(), lambda _: None)  # type: ignore[arg-type]
    async with contextlib.AsyncExitStack() as stack:
        if state is not None:
            await stack.enter_async_context(front.room.kept(state, model.door, at_once))
        yield await stack.enter_async_context(client_of(make_app(front), user))


def client_of(app: Starlette, user: str = "") -> httpx2.AsyncClient:
    async def as_user(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": {"user": user} if user else {}}, receive, send)

    transport = httpx2.ASGITransport(as_user)
    return httpx2.AsyncClient(transport=transport, base_url="http://server")


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def client(tmp_path: Path, model: Model) -> AsyncGenerator[httpx2.AsyncClient]:
    async with serving(tmp_path / "state", model) as client:
        await opened(client)
        yield client


def full(*_: object) -> None:
    """As a disk without room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def opened(client: httpx2.AsyncClient) -> None:
    await until(lambda: client.get("/v1/files"), lambda found: found.status_code == 200)


async def until(ask: Callable[[], Any], true: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(HANG_SECONDS):
        while not true(found := await ask()):  # noqa: ASYNC110 - of what another task does
            await asyncio.sleep(0.005)
    return found


async def upload(client: httpx2.AsyncClient, content: bytes, **form: str) -> httpx2.Response:
    data = {"purpose": "batch", **form}
    return await client.post("/v1/files", data=data, files={"file": ("in.jsonl", content)})


async def begin(client: httpx2.AsyncClient, path: Path, *custom_ids: str) -> dict[str, Any]:
    content = write_lines(path, [request(one) for one in custom_ids]).read_bytes()
    file = (await upload(client, content)).raise_for_status().json()
    body = {"input_file_id": file["id"], "endpoint": END, "completion_window": "24h"}
    batch: dict[str, Any] = (await client.post("/v1/batches", json=body)).raise_for_status().json()
    return batch


async def ended(client: httpx2.AsyncClient, id_: str) -> dict[str, Any]:
    over = {"completed", "failed", "cancelled"}
    found: dict[str, Any] = (
        await until(
            lambda: client.get(f"/v1/batches/{id_}"), lambda one: one.json()["status"] in over
        )
    ).json()
    return found


async def content(client: httpx2.AsyncClient, id_: str) -> str:
    return (await client.get(f"/v1/files/{id_}/content")).raise_for_status().text


async def test_answers_and_errors_come_in_files_of_their_own(
    client: httpx2.AsyncClient, tmp_path: Path, model: Model
) -> None:
    batch = await begin(client, tmp_path / "in.jsonl", "a", "wrong", "c")
    assert (batch["object"], batch["status"], batch["endpoint"]) == ("batch", "validating", END)
    model.going.set()
    batch = await ended(client, batch["id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert batch["created_at"] <= batch["in_progress_at"] <= batch["completed_at"]
    good = answers_of(await content(client, batch["output_file_id"]))
    assert {one["response"]["status_code"] for one in good.values()} == {200}
    assert sorted(good) == ["a", "c"]
    bad = answers_of(await content(client, batch["error_file_id"]))
    assert bad["wrong"]["response"]["body"] == {"error": {"message": "No."}}
    files = (await client.get("/v1/files")).json()["data"]
    assert [file["purpose"] for file in files].count("batch_output") == 2


async def test_a_batch_goes_on_with_the_next_server(tmp_path: Path, model: Model) -> None:
    state = tmp_path / "state"
    async with serving(state, model) as first:
        await opened(first)
        id_ = (await begin(first, tmp_path / "in.jsonl", "now-a", "b", "c", "d"))["id"]
        await until(
            lambda: first.get(f"/v1/batches/{id_}"),
            lambda one: one.json()["request_counts"]["completed"] == 1,
        )
    (answers,) = (state / "batches").glob("*.jsonl")
    with answers.open("ab") as file:
        file.write(b'{"id":"batch_req_torn')  # as a kill leaves it
    model.asked.clear()
    model.going.set()
    async with serving(state, model) as second:
        await opened(second)
        batch = await ended(second, id_)
        assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        found = answers_of(await content(second, batch["output_file_id"]))
        assert sorted(found) == ["b", "c", "d", "now-a"]
        assert batch["error_file_id"] is None
    assert sorted(name for _, name in model.asked) == ["b", "c", "d"]
    assert not [*(state / "batches").glob("*.jsonl")]
    stray = state / "batches/batch_none.jsonl"
    stray.write_text("")
    async with serving(state, model) as third:
        await opened(third)
        assert not stray.exists()
        assert (await ended(third, id_)) == batch
        assert [one["id"] for one in (await third.get("/v1/batches")).json()["data"]] == [id_]
        # What was complete is not begun again.
        await ended(third, (await begin(third, tmp_path / "in.jsonl", "e"))["id"])
        assert sorted(name for _, name in model.asked) == ["b", "c", "d", "e"]


async def test_an_end_while_files_are_made_makes_them_again(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    killings = []

    def killed(*_: object) -> None:
        killings.append(1)
        raise asyncio.CancelledError

    state = tmp_path / "state"
    async with serving(state, model) as first:
        await opened(first)
        id_ = (await begin(first, tmp_path / "in.jsonl", "a"))["id"]
        with monkeypatch.context() as patch:
            patch.setattr(stored_files.StoredFiles, "adopt", killed)
            model.going.set()
            await until(
                lambda: first.get(f"/v1/batches/{id_}"),
                lambda one: one.json()["status"] == "finalizing",
            )
            await until(lambda: first.get("/v1/files"), lambda _: killings)
    async with serving(state, model) as second:
        await opened(second)
        batch = await ended(second, id_)
        assert batch["status"] == "completed"
        assert [*answers_of(await content(second, batch["output_file_id"]))] == ["a"]


async def test_a_cancelled_batch_has_what_was_answered(
    client: httpx2.AsyncClient, tmp_path: Path, model: Model
) -> None:
    id_ = (await begin(client, tmp_path / "in.jsonl", "now-a", "b", "c"))["id"]
    await until(
        lambda: client.get(f"/v1/batches/{id_}"),
        lambda one: one.json()["request_counts"]["completed"] == 1,
    )
    assert (await client.post(f"/v1/batches/{id_}/cancel")).json()["status"] == "cancelling"
    batch = await ended(client, id_)
    assert batch["status"] == "cancelled"
    assert [*answers_of(await content(client, batch["output_file_id"]))] == ["now-a"]
    again = await client.post(f"/v1/batches/{id_}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "batch_is_over")


@pytest.mark.parametrize("name", ["BatchFile", "BatchOutput"])
async def test_a_batch_cancelled_while_it_opens_its_files_lets_go_of_them(
    client: httpx2.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opening, going = threading.Event(), threading.Event()
    real = getattr(batch_worker, name)

    def slow(*arguments: Any) -> Any:
        opened = real(*arguments)
        opening.set()
        assert going.wait(HANG_SECONDS)
        return opened

    monkeypatch.setattr(batch_worker, name, slow)
    id_ = (await begin(client, tmp_path / "in.jsonl", "a"))["id"]
    assert await asyncio.to_thread(opening.wait, HANG_SECONDS)
    for _ in range(2):
        cancelling = await client.post(f"/v1/batches/{id_}/cancel")
        assert cancelling.json()["status"] == "cancelling"
    going.set()
    batch = await ended(client, id_)
    assert (batch["status"], batch["errors"]) == ("cancelled", None)
    assert not [one for one in open_files() if re.search("state/(files|batches)/", one)]


def open_files() -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(descriptor.readlink()))
    return found


async def test_a_file_without_sense_fails_the_batch(client: httpx2.AsyncClient) -> None:
    file = (await upload(client, b"{}\n")).json()
    body = {"input_file_id": file["id"], "endpoint": END, "completion_window": "24h"}
    batch = await ended(client, (await client.post("/v1/batches", json=body)).json()["id"])
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert error["message"].startswith("The file, line 1: Object missing required field")


async def test_a_batch_that_fails_midway_has_what_was_answered(
    tmp_path: Path, model: Model
) -> None:
    async with serving(tmp_path / "state", model, at_once=1) as client:
        await opened(client)
        batch = await begin(client, tmp_path / "in.jsonl", "now-a", "keyless", "now-b")
        batch = await ended(client, batch["id"])
        assert batch["status"] == "failed"
        assert batch["errors"]["data"][0]["message"] == "There is no key any more."
        assert [*answers_of(await content(client, batch["output_file_id"]))] == ["now-a"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(batch_worker, "write_struct", id="the batch"),
        pytest.param(stored_files, "write_struct", id="a file's description"),
        pytest.param(batch_output.BatchOutput, "_split", id="a file's content"),
    ],
)
async def test_a_disk_that_is_full_at_the_end_is_waited_for(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    monkeypatch.setattr(batch_worker, "WRITE_SECONDS", 0.01)
    async with serving(tmp_path / "state", model) as client:
        await opened(client)
        id_ = (await begin(client, tmp_path / "in.jsonl", "a", "wrong"))["id"]
        await until(lambda: client.get("/v1/files"), lambda _: len(model.asked) == 2)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            model.going.set()
            batch = await until(
                lambda: client.get(f"/v1/batches/{id_}"), lambda one: one.json()["errors"]
            )
            (error,) = batch.json()["errors"]["data"]
            assert (batch.json()["status"], error["code"]) == ("finalizing", "not_written")
            assert re.fullmatch(
                r"The answers cannot be written \(.*No space left on device\); they are kept, and "
                r"it is tried again until they can: make room on the server's disk\.",
                error["message"],
            )
        batch = await ended(client, id_)
        assert (batch["status"], batch["errors"]) == ("completed", None)
        assert [*answers_of(await content(client, batch["output_file_id"]))] == ["a"]
        assert [*answers_of(await content(client, batch["error_file_id"]))] == ["wrong"]
    async with serving(tmp_path / "state", model) as second:
        await opened(second)
        assert await ended(second, id_) == batch
        assert len(model.asked) == 2


async def test_a_server_that_ends_with_a_full_disk_leaves_it_to_the_next(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.going.set()
    with monkeypatch.context() as patch:
        patch.setattr(batch_output.BatchOutput, "_split", full)
        async with serving(tmp_path / "state", model) as client:
            await opened(client)
            id_ = (await begin(client, tmp_path / "in.jsonl", "a"))["id"]
            await until(lambda: client.get(f"/v1/batches/{id_}"), lambda one: one.json()["errors"])
    async with serving(tmp_path / "state", model) as second:
        await opened(second)
        batch = await ended(second, id_)
        assert [*answers_of(await content(second, batch["output_file_id"]))] == ["a"]
        assert len(model.asked) == 1


async def test_what_cannot_be_noted_does_not_happen(
    client: httpx2.AsyncClient, tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await begin(client, tmp_path / "in.jsonl", "a")
    id_ = batch["id"]
    body = {"endpoint": END, "input_file_id": batch["input_file_id"], "completion_window": "24h"}
    with monkeypatch.context() as patch:
        patch.setattr(batch_worker, "write_struct", full)
        for path in (f"/v1/batches/{id_}/cancel", "/v1/batches"):
            response = await client.post(path, json=body)
            assert response.status_code == 507, response.text
            assert response.json()["error"]["message"] == (
                "The batch cannot be kept: No space left on device."
            )
    after = (await client.get("/v1/batches")).json()
    assert [one["id"] for one in after["data"]] == [id_]
    assert after["data"][0]["cancelling_at"] is None
    model.going.set()
    assert (await ended(client, id_))["status"] == "completed"


async def test_lines_ask_the_batch_s_endpoint(client: httpx2.AsyncClient, tmp_path: Path) -> None:
    lines = [request("a", "/v1/chat/completions")]
    file = await upload(client, write_lines(tmp_path / "in", lines).read_bytes())
    body = {"input_file_id": file.json()["id"], "endpoint": END, "completion_window": "24h"}
    batch = await ended(client, (await client.post("/v1/batches", json=body)).json()["id"])
    found = answers_of(await content(client, batch["error_file_id"]))
    assert "give /v1/completions" in found["a"]["error"]["message"]


async def test_batches_take_turns_at_the_same_places(
    client: httpx2.AsyncClient, tmp_path: Path, model: Model
) -> None:
    batches = [
        await begin(client, tmp_path / "in.jsonl", *(f"{name}{at}" for at in range(20)))
        for name in "ab"
    ]
    for batch in batches:
        await until(
            lambda batch=batch: client.get(f"/v1/batches/{batch['id']}"),
            lambda one: one.json()["status"] == "in_progress",
        )
    model.going.set()
    for batch in batches:
        await ended(client, batch["id"])
    names = [name for _, name in model.asked]
    assert {name[0] for name in names[:20]} == {"a", "b"}
    assert model.most == 2


async def test_files_and_batches_are_their_owners(tmp_path: Path, model: Model) -> None:
    model.going.set()
    state = tmp_path / "state"
    async with serving(state, model, "alice") as alice:
        await opened(alice)
        batch = await begin(alice, tmp_path / "in.jsonl", "a")
        await ended(alice, batch["id"])
    assert model.asked == [("alice", "a")]
    async with serving(state, model, "bob") as bob:
        await opened(bob)
        assert (await bob.get("/v1/files")).json()["data"] == []
        assert (await bob.get("/v1/batches")).json()["data"] == []
        for path in (f"/v1/files/{batch['input_file_id']}", f"/v1/batches/{batch['id']}"):
            assert (await bob.get(path)).status_code == 404
        body = {"input_file_id": batch["input_file_id"], "endpoint": END}
        assert (await bob.post("/v1/batches", json=body)).status_code == 404


async def test_files(client: httpx2.AsyncClient, tmp_path: Path, model: Model) -> None:
    ids = [(await upload(client, content)).json()["id"] for content in (b"one", b"two", b"three")]
    file = (await client.get(f"/v1/files/{ids[2]}")).json()
    assert (file["bytes"], file["filename"], file["purpose"]) == (5, "in.jsonl", "batch")
    assert await content(client, ids[1]) == "two"
    listed = (await client.get("/v1/files", params={"order": "asc", "limit": 2})).json()
    assert len(listed["data"]) == 2
    assert listed["has_more"]
    rest = await client.get("/v1/files", params={"order": "asc", "after": listed["last_id"]})
    assert {one["id"] for one in listed["data"] + rest.json()["data"]} == set(ids)
    assert (await client.get("/v1/files", params={"limit": "1" * 5000})).status_code == 400
    deleted = (await client.delete(f"/v1/files/{ids[0]}")).json()
    assert deleted == {"id": ids[0], "object": "file", "deleted": True}
    assert (await client.get(f"/v1/files/{ids[0]}/content")).status_code == 404
    batch = await begin(client, tmp_path / "in.jsonl", "a")
    used = await client.delete(f"/v1/files/{batch['input_file_id']}")
    assert (used.status_code, used.json()["error"]["code"]) == (409, "in_use")


async def test_how_files_are_listed(client: httpx2.AsyncClient) -> None:
    ids = [(await upload(client, content)).json()["id"] for content in (b"one", b"two")]
    got = await client.get(f"/v1/files/{ids[0]}/content")
    assert got.headers["content-type"] == "application/jsonl"

    async def listed(**asked: str) -> dict[str, Any]:
        answer = await client.get("/v1/files", params=asked)
        assert answer.headers["content-type"] == "application/json"
        found: dict[str, Any] = answer.json()
        return found

    newest = await listed()
    assert newest["data"] == (await listed(order="asc"))["data"][::-1]
    assert newest["first_id"] == newest["data"][0]["id"]
    assert len((await listed(purpose="batch"))["data"]) == 2
    none = await listed(purpose="batch_output")
    assert (none["data"], none["first_id"], none["last_id"]) == ([], None, None)


@pytest.mark.parametrize("form", ["multipart/form-data", "multipart/form-data; boundary=x"])
async def test_a_form_that_is_none(client: httpx2.AsyncClient, form: str) -> None:
    answer = await client.post("/v1/files", content=b"x", headers={"content-type": form})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


async def test_a_file_that_does_not_come(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_api, "UPLOAD_SECONDS", 0.01)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"--x"
        await asyncio.Event().wait()

    form = {"content-type": "multipart/form-data; boundary=x"}
    late = await client.post("/v1/files", content=slowly(), headers=form)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")


async def test_a_client_that_leaves_its_file_half(client: httpx2.AsyncClient) -> None:
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(message)

    form = (b"content-type", b"multipart/form-data; boundary=x")
    scope = {"type": "http", "method": "POST", "path": "/v1/files", "query_string": b""}
    transport: Any = client._transport
    await transport.app({**scope, "headers": [form]}, receive, send)
    assert said[0]["status"] == 400
    assert b"left before its file was complete" in said[1]["body"]


async def test_the_oldest_complete_batches_are_forgotten(
    client: httpx2.AsyncClient, tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_worker, "MAX_KEPT", 2)
    model.going.set()
    ids = []
    for name in "abc":
        ids.append((await begin(client, tmp_path / "in.jsonl", name))["id"])
        await ended(client, ids[-1])
    listed = {one["id"] for one in (await client.get("/v1/batches")).json()["data"]}
    assert len(listed) == 2
    assert ids[2] in listed
    assert {path.stem for path in (tmp_path / "state/batches").glob("*.json")} == listed


async def test_what_is_refused(client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refusal(response: httpx2.Response) -> tuple[int, str]:
        return response.status_code, response.json()["error"]["message"]

    assert await refusal(await client.post("/v1/files", json={})) == (
        400,
        "The body is no multipart/form-data; send file and purpose so.",
    )
    status, message = await refusal(await upload(client, b"x", purpose="vision"))
    assert (status, message) == (400, "purpose is 'vision', and may only be 'batch'.")
    only = await client.post("/v1/files", files={"other": ("name", b"x")})
    assert (await refusal(only))[1] == "file is missing; send it as a file."
    status, message = await refusal(await client.get("/v1/files", params={"limit": 0}))
    assert (status, message) == (400, "limit is '0'; give 1 to 10000.")
    assert (await client.get("/v1/files", params={"after": "x"})).status_code == 400
    file = (await upload(client, b"x")).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/embeddings"}
    assert "give one of" in (await refusal(await client.post("/v1/batches", json=body)))[1]
    body = {"input_file_id": file, "endpoint": END, "completion_window": "1h"}
    assert "give '24h'" in (await refusal(await client.post("/v1/batches", json=body)))[1]
    monkeypatch.setattr(batch_worker, "MAX_OPEN", 0)
    body = {"input_file_id": file, "endpoint": END}
    assert (await client.post("/v1/batches", json=body)).status_code == 429
    monkeypatch.setattr(stored_files, "MAX_BYTES", 8)
    assert (await upload(client, b"12345678")).status_code == 429
    monkeypatch.setattr(files_api, "MAX_UPLOAD_BYTES", 1000)
    assert (await upload(client, b"x" * 2000)).status_code == 413


async def test_a_full_disk_is_said(
    client: httpx2.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files_api.shutil, "copyfileobj", full)
        response = await upload(client, b"x")
    assert response.status_code == 507
    assert (
        response.json()["error"]["message"] == "The file cannot be kept: No space left on device."
    )
    assert not [*(tmp_path / "state/files").iterdir()]


async def test_without_a_directory_there_are_none(tmp_path: Path, model: Model) -> None:
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged/files"
    damaged.mkdir(parents=True)
    (damaged / "file-a.json").write_text("{")
    for state, why in (
        (None, "--state DIR"),
        (tmp_path / "file", "cannot be used (File exists)"),
        (tmp_path / "damaged", "file-a.json cannot be used: "),
    ):
        async with serving(state, model) as client:
            found = await until(
                lambda client=client: client.get("/v1/batches"),
                lambda one, why=why: why in one.text,
            )
            assert found.status_code == 501
            assert found.json()["error"]["code"] == "not_implemented"


async def test_one_server_has_a_directory_until_its_end(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_RETRY_SECONDS", 0.01)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(tmp_path, model) as first:
            await opened(first)
            second = await stack.enter_async_context(serving(tmp_path, model))
            waits = await until(
                lambda: second.get("/v1/files"), lambda found: "another server" in found.text
            )
            assert waits.status_code == 501
        await opened(second)
