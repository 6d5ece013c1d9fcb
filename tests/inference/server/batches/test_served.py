"""Files and batches of a real server, as a client has them."""

import json
import time

import httpx2

from expertd_testing.patience import HANG_SECONDS
from tests.inference.server.batches.lines import answers_of, request


def test_a_batch_of_completions(http: httpx2.Client) -> None:
    lines = [request(f"r{number}", prompt="def", seed=number) for number in range(5)]
    lines[2]["body"]["model"] = "none"
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    file = http.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content.encode())}
    ).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "metadata": {"a": "b"}}
    batch = http.post("/v1/batches", json=body | {"completion_window": "24h"}).json()
    deadline = time.monotonic() + HANG_SECONDS
    while batch["status"] != "completed" and time.monotonic() < deadline:
        time.sleep(0.05)
        batch = http.get(f"/v1/batches/{batch['id']}").json()
    assert batch["request_counts"] == {"total": 5, "completed": 4, "failed": 1}
    assert batch["metadata"] == {"a": "b"}
    answers = answers_of(http.get(f"/v1/files/{batch['output_file_id']}/content").text)
    alone = http.post("/v1/completions", json=lines[1]["body"]).json()
    assert answers["r1"]["response"]["body"]["choices"] == alone["choices"]
    errors = answers_of(http.get(f"/v1/files/{batch['error_file_id']}/content").text)
    assert errors["r2"]["response"]["status_code"] == 404
    assert errors["r2"]["response"]["body"]["error"]["code"] == "model_not_found"
    for id_ in (file["id"], batch["output_file_id"], batch["error_file_id"]):
        assert http.delete(f"/v1/files/{id_}").json()["deleted"]
