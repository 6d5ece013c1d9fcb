"""How near attention comes to memory's speed, and prompts to torch's: ``make bench-attention``.

Decoding: one row of each sequence attends to all its keys and values, which lie in blocks in random
order, of more layers than the caches hold, beside a plain read of as much memory by the same
threads, in turns. Prompts: the rows of one prompt beside torch's ``scaled_dot_product_attention``
of the same tensors. The ratios are what to read: machines differ, and other tenants take their
share of the memory's bandwidth.

Example: python -m bench.attention --sequences 16 --length 4096 --json
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from torch.nn import functional

from bench.figures import Figure, compared, timed
from bench.store import show
from expertd_inference.advice.probes import READ_FORMS
from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.kernels.cpu import native
from expertd_inference.kernels.cpu.attention import AttentionPlan, AttentionSpan, attend
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kv.memory import KvLayer, KvMemory, bytes_per_block

SHAPES = {"32 over 4": (32, 4, 128), "16 over 16": (16, 16, 128), "64 over 8": (64, 8, 64)}
"""Heads, heads of keys and values, width."""
SEQUENCES = (1, 16, 64)
LENGTHS = (512, 4096)
PROMPTS = (64, 512, 2048)
GOALS = {("32 over 4", 16, 512): 0.7, ("32 over 4", 16, 4096): 0.7}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--part", action="append", choices=("decode", "prompt"))
    parser.add_argument("--sequences", action="append", type=int, help="may be repeated")
    parser.add_argument("--length", action="append", type=int, help="may be repeated")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--bytes", type=int, default=512 << 20, help="of keys and values at least")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if reason := native_library().reason:
        raise SystemExit(f"bench.attention: {reason}")
    console = Console(stderr=True)
    parts = options.part or ("decode", "prompt")
    figures = []
    for figure in itertools.chain(
        decode(
            options.shape or SHAPES,
            options.sequences or SEQUENCES,
            options.length or LENGTHS,
            options.bytes,
            options.rounds,
        )
        if "decode" in parts
        else (),
        prompt(options.shape or SHAPES, options.length or PROMPTS, options.rounds)
        if "prompt" in parts
        else (),
    ):
        figures.append(figure)
        console.print(f"  {figure.what}: {figure.ratio:.2f}", highlight=False)
    load = os.getloadavg()[0]
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "isa": native.use_isa(None), "load_average": load}))
    else:
        show(figures, "attention over blocks on this host")
        print(f"{torch.get_num_threads()} threads, {native.use_isa(None)}, load average {load:.1f}")


def decode(
    shapes: Sequence[str],
    sequences: Sequence[int],
    lengths: Sequence[int],
    num_bytes: int,
    rounds: int,
) -> Iterator[Figure]:
    """GB/s of keys and values, beside a plain read."""
    for shape, count, length in itertools.product(shapes, sequences, lengths):
        heads, kv_heads, width = SHAPES[shape]
        blocks_each = -(-length // BLOCK_TOKENS)
        layer = KvLayer(kv_heads, width, width)
        per_block = bytes_per_block([layer], torch.bfloat16)
        num_layers = max(2, num_bytes // (per_block * blocks_each * count))
        with KvMemory([layer] * num_layers, blocks_each * count, torch.bfloat16) as memory:
            for tensor in (*memory.keys, *memory.values):
                tensor.normal_()
            order: list[int] = torch.randperm(memory.num_blocks).tolist()
            plan = AttentionPlan(
                [
                    AttentionSpan(length - 1, 1, order[n * blocks_each : (n + 1) * blocks_each])
                    for n in range(count)
                ]
            )
            query = torch.randn(count, heads, width).bfloat16()
            row = torch.randn(count, kv_heads, width).bfloat16()
            read = length * count * kv_heads * 2 * width * 2 * num_layers

            def step(
                memory: KvMemory = memory,
                plan: AttentionPlan = plan,
                query: torch.Tensor = query,
                row: torch.Tensor = row,
            ) -> None:
                for keys, values in zip(memory.keys, memory.values, strict=True):
                    attend(plan, keys, values, query, row, row, width_scale(query))

            threads = torch.get_num_threads()
            address = memory.keys[0].data_ptr()

            def read_all(
                form: tuple[int, int],
                address: int = address,
                size: int = memory.num_bytes,
                threads: int = threads,
            ) -> float:
                seconds = timed(lambda: native.read_memory(address, size, threads, *form))
                return size / seconds / 1e9

            step()
            best = {
                form: statistics.median(read_all(form) for _ in range(3)) for form in READ_FORMS
            }
            form = max(best, key=lambda form: best[form])
            turns = [(read / timed(step) / 1e9, read_all(form)) for _ in range(rounds)]
        what = f"{shape} x {width}, {count} x {length}"
        goal = GOALS.get((shape, count, length))
        yield compared("decode", what, "GB/s", turns, at_least=goal)


def prompt(shapes: Sequence[str], lengths: Sequence[int], rounds: int) -> Iterator[Figure]:
    """Prompts a second, beside torch's."""
    for shape, length in itertools.product(shapes, lengths):
        heads, kv_heads, width = SHAPES[shape]
        num_blocks = -(-length // BLOCK_TOKENS)
        query = torch.randn(length, heads, width).bfloat16()
        key, value = torch.randn(2, length, kv_heads, width).bfloat16()
        plan = AttentionPlan([AttentionSpan(0, length, range(num_blocks))])
        theirs = [x.transpose(0, 1)[None].contiguous() for x in (query, key, value)]

        def torch_s(tensors: Sequence[torch.Tensor] = theirs) -> None:
            functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)

        layer = KvLayer(kv_heads, width, width)
        with KvMemory([layer], num_blocks, torch.bfloat16) as memory:

            def ours(
                memory: KvMemory = memory,
                plan: AttentionPlan = plan,
                tensors: Sequence[torch.Tensor] = (query, key, value),
            ) -> None:
                attend(plan, memory.keys[0], memory.values[0], *tensors, width_scale(tensors[0]))

            ours()
            torch_s()
            calls = max(1, 2048 // length)
            turns = [(1 / timed(ours, calls), 1 / timed(torch_s, calls)) for _ in range(rounds)]
        yield compared("prompt", f"{shape} x {width}, prompt of {length}", "1/s", turns)


def width_scale(query: torch.Tensor) -> float:
    """The usual scale of scores."""
    return float(query.shape[-1] ** -0.5)


if __name__ == "__main__":
    main()
