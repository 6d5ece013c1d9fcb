"""llama.cpp as a peer, by llama-cpp-python and gguf; imports nothing of ours.

Run by :mod:`bench.decode` under the interpreter that has both packages. It makes a model of a given
shape in Q4_0 from random blocks, as :mod:`bench.synthetic` does for packs, and times it::

    python bench/peers/llama.py make '{"path": "m.gguf", "shape": {...}}'
    python bench/peers/llama.py run '{"path": "m.gguf", "load": "private", "threads": 2, ...}'

``run`` answers each line of stdin, ``decode N`` or ``prompt N``, with the seconds that it took,
and begins anew at ``clear 0``. ``batch STEPS SEQUENCES CONTEXT`` begins anew, gives so many
sequences a context each, and answers with the seconds of so many steps, each with a token of every
sequence. Loaded ``private`` the weights are copied into memory of the process and repacked for its
kernels, which is llama.cpp's fastest; loaded ``shared`` they stay in the page cache, one copy for
all processes, as ours do in the arena.
"""

import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
BRANCH_GAIN = 0.1
BLOCK_WEIGHTS, BLOCK_BYTES = 32, 18
DEVIATION = 4.32  # of the integers from 1 to 15
POOL_BLOCKS = (1 << 20) - 3  # drawn once and repeated


def make(path: str, shape: dict[str, Any]) -> None:
    """Writes the model of that ``config.json``, one tensor in memory at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    architecture = ARCHITECTURES[shape["model_type"]]
    writer = GGUFWriter(path, architecture)
    for key, value in _settings(architecture, shape):
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_file_type(2)  # mostly Q4_0
    # Words that were never learned: llama-server has to have a text for each token.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{number}" for number in range(shape["vocab_size"])])
    writer.add_token_merges(["w 0"])
    tensors = list(_tensors(architecture, shape))
    for name, dims, gain in tensors:
        if gain is None or name.endswith("gate_inp.weight"):
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * math.prod(dims))
        else:
            bytes_shape = (*dims[:-1], dims[-1] // BLOCK_WEIGHTS * BLOCK_BYTES)
            writer.add_tensor_info(
                name,
                bytes_shape,
                np.dtype(np.uint8),
                math.prod(bytes_shape),
                raw_dtype=GGMLQuantizationType.Q4_0,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    pools: dict[float, np.ndarray] = {}
    for name, dims, gain in tensors:
        if gain is None:
            data = np.ones(dims, np.float32)
        elif name.endswith("gate_inp.weight"):
            data = (random.standard_normal(dims) * gain).astype(np.float32)
        else:
            if gain not in pools:
                pools[gain] = _blocks(random, gain)
            data = np.resize(pools[gain], (math.prod(dims) // BLOCK_WEIGHTS, BLOCK_BYTES))
        writer.write_tensor_data(data)
    writer.close()


def _settings(architecture: str, shape: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    head = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    yield f"{architecture}.context_length", 4096
    yield f"{architecture}.embedding_length", shape["hidden_size"]
    yield f"{architecture}.block_count", shape["num_hidden_layers"]
    yield f"{architecture}.feed_forward_length", shape["intermediate_size"]
    yield f"{architecture}.expert_feed_forward_length", _inner(shape)
    yield f"{architecture}.attention.head_count", shape["num_attention_heads"]
    yield f"{architecture}.attention.head_count_kv", shape["num_key_value_heads"]
    yield f"{architecture}.attention.key_length", head
    yield f"{architecture}.attention.value_length", head
    yield f"{architecture}.rope.dimension_count", head
    yield f"{architecture}.attention.layer_norm_rms_epsilon", float(shape["rms_norm_eps"])
    yield f"{architecture}.rope.freq_base", float(shape["rope_parameters"]["rope_theta"])
    yield f"{architecture}.expert_count", _experts(shape)
    yield f"{architecture}.expert_used_count", shape["num_experts_per_tok"]
    yield f"{architecture}.vocab_size", shape["vocab_size"]


def _tensors(
    architecture: str, shape: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, dimensions [..., in], and deviation: None for norms, which are one."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim", hidden // heads)
    keys = shape["num_key_value_heads"] * head
    queries, inner, experts = heads * head, _inner(shape), _experts(shape)
    yield "token_embd.weight", (shape["vocab_size"], hidden), 1.0
    for layer in range(shape["num_hidden_layers"]):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,), None
        yield f"{block}.ffn_norm.weight", (hidden,), None
        if architecture != "llama":
            whole = architecture == "olmoe"  # its norm is over all heads at once
            yield f"{block}.attn_q_norm.weight", (queries if whole else head,), None
            yield f"{block}.attn_k_norm.weight", (keys if whole else head,), None
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{block}.attn_{name}.weight", (rows, hidden), hidden**-0.5
        yield f"{block}.attn_output.weight", (hidden, queries), BRANCH_GAIN * queries**-0.5
        yield f"{block}.ffn_gate_inp.weight", (experts, hidden), hidden**-0.5
        yield f"{block}.ffn_gate_exps.weight", (experts, inner, hidden), hidden**-0.5
        yield f"{block}.ffn_up_exps.weight", (experts, inner, hidden), hidden**-0.5
        yield f"{block}.ffn_down_exps.weight", (experts, hidden, inner), BRANCH_GAIN * inner**-0.5
    yield "output_norm.weight", (hidden,), None
    yield "output.weight", (shape["vocab_size"], hidden), hidden**-0.5


def _inner(shape: dict[str, Any]) -> int:
    # OLMoE's experts have the one size that there is.
    name = "intermediate_size" if shape["model_type"] == "olmoe" else "moe_intermediate_size"
    inner: int = shape.get(name, shape["intermediate_size"])
    return inner


def _experts(shape: dict[str, Any]) -> int:
    experts: int = shape.get("num_experts", shape.get("num_local_experts"))
    return experts


def _blocks(random: np.random.Generator, deviation: float) -> np.ndarray:
    """Blocks of Q4_0: a float16 scale, and 32 integers in 16 bytes.

    They are from 1 to 15, whose mean is Q4_0's zero: with another mean all rows of a step become
    alike, the same token follows every prompt, and few experts are ever asked.
    """
    pairs = random.integers(1, 16, (2, POOL_BLOCKS, BLOCK_BYTES), np.uint8)
    blocks = pairs[0] | pairs[1] << 4
    scales = random.uniform(0.9, 1.1, POOL_BLOCKS) * deviation / DEVIATION
    blocks[:, :2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks


def run(path: str, load: str, threads: int, context: int, vocab: int, sequences: int = 1) -> None:
    """Answers the lines of stdin until it ends."""
    from llama_cpp import llama_cpp as lib

    lib.llama_backend_init()
    _be_quiet(lib)
    options = lib.llama_model_default_params()
    shared = load == "shared"
    options.n_gpu_layers = 0
    options.use_extra_bufts = not shared
    if hasattr(options, "load_mode"):
        options.load_mode = lib.LLAMA_LOAD_MODE_MMAP if shared else lib.LLAMA_LOAD_MODE_NONE
    else:
        options.use_mmap = shared
    model = lib.llama_load_model_from_file(path.encode(), options)

    def open_session(num_sequences: int) -> Any:  # noqa: ANN401 - ctypes
        settings = lib.llama_context_default_params()
        settings.n_batch, settings.n_ubatch = 512, 512
        # Each sequence has a memory of its own, so that it attends to that alone: llama.cpp's
        # fastest. One sequence may have all of it, for a long prompt.
        settings.n_ctx = context // sequences * num_sequences if num_sequences > 1 else context
        settings.n_threads = settings.n_threads_batch = threads
        settings.n_seq_max, settings.kv_unified = num_sequences, False
        session = lib.llama_init_from_model(model, settings) if model else None
        if not session:
            raise SystemExit(f"llama.cpp cannot load {path}")
        return session

    num_sequences, session = 1, open_session(1)
    random = np.random.default_rng(0)
    print(json.dumps({"ready": load}), flush=True)
    for line in sys.stdin:
        what, count, *more = line.split()
        tokens = random.integers(10, vocab - 10, int(count))
        if what == "clear":
            lib.llama_memory_clear(lib.llama_get_memory(session), True)
        if what != "batch":
            more = ["1"]
        if int(more[0]) != num_sequences:
            lib.llama_free(session)
            num_sequences = int(more[0])
            session = open_session(num_sequences)
        if what == "batch":
            _begin(lib, session, int(more[1]), int(more[0]), vocab)
        began = time.perf_counter()
        if what == "prompt":
            for start in range(0, len(tokens), 512):
                _decode(lib, session, tokens[start : start + 512])
        elif what == "decode":
            for token in tokens:
                _decode(lib, session, [token])
        elif what == "batch":
            for step in range(int(count)):
                _step(
                    lib, session, random.integers(10, vocab - 10, int(more[0])), int(more[1]) + step
                )
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def _decode(lib: Any, session: Any, tokens: Any) -> None:  # noqa: ANN401 - ctypes
    array = (lib.llama_token * len(tokens))(*map(int, tokens))
    if lib.llama_decode(session, lib.llama_batch_get_one(array, len(tokens))):
        raise SystemExit("llama.cpp failed")
    if not lib.llama_get_logits_ith(session, -1):
        raise SystemExit("llama.cpp has no logits")


def _begin(lib: Any, session: Any, context: int, sequences: int, vocab: int) -> None:  # noqa: ANN401
    """Each sequence's context, one after the other."""
    lib.llama_memory_clear(lib.llama_get_memory(session), True)
    for sequence in range(sequences):
        tokens = np.random.default_rng(sequence).integers(10, vocab - 10, context)
        rows = [(int(token), place, sequence) for place, token in enumerate(tokens)]
        for start in range(0, context, 512):
            _decode_rows(lib, session, rows[start : start + 512])


def _step(lib: Any, session: Any, tokens: np.ndarray, position: int) -> None:  # noqa: ANN401
    """A token more of each sequence, and the logits of all."""
    rows = [(int(token), position, sequence) for sequence, token in enumerate(tokens)]
    _decode_rows(lib, session, rows)
    for row in range(len(rows)):
        if not lib.llama_get_logits_ith(session, row):
            raise SystemExit("llama.cpp has no logits")


def _decode_rows(lib: Any, session: Any, rows: list[tuple[int, int, int]]) -> None:  # noqa: ANN401
    batch = lib.llama_batch_init(len(rows), 0, 1)
    last = {sequence: row for row, (_, _, sequence) in enumerate(rows)}
    for row, (token, position, sequence) in enumerate(rows):
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = last[sequence] == row
    batch.n_tokens = len(rows)
    failed = lib.llama_decode(session, batch)
    lib.llama_batch_free(batch)
    if failed:
        raise SystemExit("llama.cpp failed")


def _be_quiet(lib: Any) -> None:  # noqa: ANN401 - ctypes
    # Kept on the module, since C keeps only its address.
    global _log
    _log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) if level >= 4 else 0
    )
    lib.llama_log_set(_log, None)


_log: Any = None

if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](**json.loads(sys.argv[2]))
