"""One pack, the same tokens: whatever the budget, however many workers, whoever else reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from expertd_inference import load_model
from expertd_inference.experts.cpu import experts_modules, layer_numbers
from expertd_testing.daemon import serving
from expertstore.pack.codec import dequantize, record_parts
from expertstore.pack.manifest import read_manifest
from tests.inference.greedy import greedy, prompt_of
from tests.inference.worker_process import WorkerProcess

Make = Callable[..., Any]

EXAMPLE = Path(__file__).parents[3] / "examples/tiny-mixtral"
NAMED = ("example", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def budgets(pack: Path) -> dict[str, int]:
    """All experts, half of them, and the least that the daemon accepts."""
    manifest = read_manifest(pack).manifest
    return {
        "100%": manifest.expert_bytes,
        "50%": max(manifest.expert_bytes // 2, manifest.working_set_bytes),
        "least": manifest.working_set_bytes,
    }


@pytest.mark.parametrize("budget", ["100%", "50%", "least"])
@pytest.mark.parametrize("architecture", NAMED)
def test_budgets_and_workers(
    architecture: str,
    budget: str,
    stock: Make,
    packed: Make,
    processes: list[WorkerProcess],
) -> None:
    pack = packed(architecture)
    prompts = prompts_for(architecture)
    expected = [greedy(stock(architecture), prompt, 20) for prompt in prompts]
    with serving({"m": pack}, ram=budgets(pack)[budget]) as daemon:
        processes[0].begin(daemon.socket, "m", prompts[0], 20)
        assert processes[0].answer().get("tokens") == expected[0]
        for process, prompt in zip(processes, prompts, strict=True):
            process.begin(daemon.socket, "m", prompt, 20)
        answers = [process.answer() for process in processes]
        assert [answer.get("tokens") for answer in answers] == expected, answers
        misses = sum(answer["nvme_misses"] for answer in answers)
        if budget == "100%":
            assert misses < 3 * read_manifest(pack).manifest.num_experts / 2
        elif budget == "least":
            assert misses > 0, "so small a budget must have made them miss"


def prompts_for(architecture: str) -> list[list[int]]:
    """Of one length, so that three workers are in the prefill's waves, then in decode, at once.

    The trained model gets text that it was not trained on.
    """
    if architecture != "example":
        return [prompt_of(30, seed=seed) for seed in range(3)]
    text = (EXAMPLE / "heldout.txt").read_text()
    tokens = AutoTokenizer.from_pretrained(EXAMPLE)(text[:20_000]).input_ids
    return [tokens[start : start + 30] for start in (100, 1000, 2000)]


@pytest.mark.parametrize("scheme", ["8bit", "4bit", "paper-3bit", "paper-2bit"])
def test_quantized_equals_stock_on_the_dequantized(scheme: str, stock: Make, packed: Make) -> None:
    pack = packed("qwen3_moe", scheme)
    with serving({"m": pack}, ram=budgets(pack)["50%"]) as daemon:
        model = load_model("m", socket=daemon.socket, kernels="reference")
        theirs = dequantized_stock(pack, model)
        prompt = prompt_of(30, seed=1)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            ours_logits, expected = model(ids).logits, theirs(ids).logits
            assert torch.equal(ours_logits, expected)
            # And not by having ignored the quantization.
            assert not torch.allclose(ours_logits, stock("qwen3_moe")(ids).logits, atol=0.05)
        assert greedy(model, prompt, 20) == greedy(theirs, prompt, 20)
        model.expertd.close()


def dequantized_stock(pack: Path, ours: Any) -> Any:
    """A stock model that holds every weight of the pack, dequantized."""
    model_class = type(ours)
    model = model_class.from_pretrained(
        None,
        config=type(ours.config).from_pretrained(pack),
        state_dict={},
        dtype=torch.bfloat16,
        local_files_only=True,
    ).eval()
    model.load_state_dict(ours.state_dict(), strict=False)
    manifest = read_manifest(pack).manifest
    named = experts_modules(model)
    modules: dict[int, Any] = dict(zip(layer_numbers(list(named)), named.values(), strict=True))
    for layer in manifest.layers:
        layout = manifest.layouts[layer.layout]
        for expert in range(layer.num_experts):
            path = pack / manifest.files[layer.files[expert]].name
            with path.open("rb") as file:
                file.seek(layer.offsets[expert])
                parts = record_parts(bytearray(file.read(layout.record_bytes)), layout)
            for matrix in layout.matrices:
                parameter = getattr(modules[layer.layer], f"{matrix.name}_proj")
                with torch.no_grad():
                    parameter[expert] = dequantize(matrix, parts, parameter.dtype)
    return model
