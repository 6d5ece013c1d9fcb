"""Rows of a table that is larger than the RAM it may have: read one by one, and kept one by one.

The table has Qwen3.8-Flash-Next's rows (160 values in 16 bits, 320 bytes; a token reads 16), random
bytes, and as many of them as the disk has room for. Beside ours: the same rows out of the mapped
file, a fault at a time or announced before (``MADV_WILLNEED``), and plain reads of pages by as many
threads past the page cache.

The text is CPython's standard library in tokens of a vocabulary of 32,768, made rows by the model's
own hash. What pages would hit is replayed: an LRU of pages of as many bytes as the rows have.

Example: python -m bench tables --dir /var/lib/expertd
"""

import mmap
import os
import statistics
import sysconfig
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from bench.figures import Bench, Figure, compared, counted
from bench.page_cache import forget_file
from bench.results import Table as Shown
from expertd.packing.synthetic import write_table
from expertd.tables.hosted_table import NUM_THREADS
from expertd_client import Client
from expertd_client.table_rows import TableRows
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertstore.pack.manifest import MANIFEST_NAME, encode_manifest, read_manifest
from expertstore.pack.table import Table, TableEncoding, block_shape, row_bytes
from expertstore.pack.tensor_file import build_header
from expertstore.sizes import format_bytes

NAME = "ngram_embedding.weight"
COLUMNS, HEADS = 160, 16
VOCABULARY = 32768
_EXPERTS_RAM = 1 << 20
_PROMPT_TOKENS = 256

Rows = npt.NDArray[np.int64]


def measure(bench: Bench) -> Iterator[Figure | Shown]:
    """Cold and warm rows per second; then a text at several sizes of RAM."""
    table_bytes = 64 << 20 if bench.quick else 20 << 30
    bench.say(f"tables: a table of {format_bytes(table_bytes)}")
    pack, table = make_table(bench.folder / "tables", table_bytes)
    yield from _speeds(bench, pack, table)
    yield from _text(bench, pack, table)


def make_table(folder: Path, num_bytes: int) -> tuple[Path, Table]:
    """A pack with a few experts of no meaning, and a table of about that size."""
    pack = make_pack(folder, layers=1, experts=2, experts_per_token=1, record_bytes=4096)
    block_bytes, rows_per_block = block_shape(row_bytes(COLUMNS, TableEncoding.PLAIN, "BF16"))
    num_blocks = num_bytes // block_bytes
    header = build_header([(NAME, "U8", (num_blocks, block_bytes))])
    table = Table(
        name=NAME,
        file="table-00000.safetensors",
        num_bytes=len(header) + num_blocks * block_bytes,
        offset=len(header),
        num_rows=num_blocks * rows_per_block,
        num_columns=COLUMNS,
        rows_per_token=HEADS,
        dtype="BF16",
        encoding=TableEncoding.PLAIN,
        block_bytes=block_bytes,
        rows_per_block=rows_per_block,
    )
    with (pack / table.file).open("wb") as file:
        file.write(header)
        file.truncate(table.num_bytes)
        write_table(pack / table.file, table)
        os.fsync(file.fileno())
    manifest = msgspec.structs.replace(read_manifest(pack).manifest, tables=(table,))
    (pack / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return pack, table


def _speeds(bench: Bench, pack: Path, table: Table) -> Iterator[Figure]:
    row_ram = 256 << 20
    mapped = Mapped(pack / table.file, table)
    generator = np.random.default_rng(0)
    arguments = ("--table-ram", str(row_ram))
    with (
        serving(
            {"m": pack},
            ram=row_ram + _EXPERTS_RAM,
            socket=bench.folder / "tables-s",
            arguments=arguments,
        ) as daemon,
        Client(daemon.socket) as client,
        client.attach("m") as session,
    ):
        rows = TableRows(session, NAME)
        others: dict[str, Callable[[Rows], object]] = {
            "mapped, a fault at a time": mapped.read,
            "mapped, announced before": mapped.read_announced,
            f"plain reads by {NUM_THREADS} threads": mapped.read_plainly,
        }
        for batch, what in ((HEADS, "a token's"), (HEADS * _PROMPT_TOKENS, "a prompt's")):
            count = max(1, 4096 // batch)
            turns: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
            for number in range(bench.rounds):
                bench.say(f"tables: {what} rows, {number + 1} of {bench.rounds}")
                for name, read in others.items():
                    # Rows that nobody has seen; the file is far larger than what was.
                    drawn = generator.integers(0, table.num_rows, (2, count, batch))
                    mapped.forget()
                    pair = (_rate(rows.read, drawn[0]), _rate(read, drawn[1]))
                    turns[name].append(pair)
            for name, pairs in turns.items():
                yield compared("tables", f"{what} {batch} rows, none in RAM: ours / {name}",
                               "rows/s", pairs)  # fmt: skip
        here = generator.integers(0, table.num_rows, 4096)
        rows.read(here)
        warm = []
        for _ in range(bench.rounds):
            batches = here.reshape(-1, HEADS)
            mapped.read(here)
            warm.append((_rate(rows.read, batches), _rate(mapped.read, batches)))
        yield compared("tables", f"a token's {HEADS} rows, in RAM: ours / mapped", "rows/s", warm)
        prompts = []
        for _ in range(bench.rounds):
            cold, hinted = generator.integers(0, table.num_rows, (2, 1, HEADS * _PROMPT_TOKENS))
            rows.expect(hinted[0])
            _settle(client)
            prompts.append((_rate(rows.read, hinted), _rate(rows.read, cold)))
        what = f"a prompt of {_PROMPT_TOKENS} tokens, rows hinted at before / not"
        yield compared("tables", what, "rows/s", prompts)
        yield counted("tables", f"the daemon beside its arena, {table.num_rows:,} rows", "MiB",
                      [_beside_arena(daemon.pid, row_ram + _EXPERTS_RAM) / 2**20])  # fmt: skip
    mapped.close()


def _text(bench: Bench, pack: Path, table: Table) -> Iterator[Figure | Shown]:
    tokens = text_tokens(20_000 if bench.quick else 90_000)
    bench.say(f"tables: rows of {len(tokens):,} tokens")
    rows = token_rows(tokens, table)
    warm = 2 * len(rows) // 3
    cells = []
    for row_ram in [4 << 20] if bench.quick else [64 << 20, 256 << 20, 1 << 30]:
        bench.say(f"tables: the text with {format_bytes(row_ram)}")
        ours, seconds, calls = _replay(bench, pack, rows, warm, row_ram)
        pages = page_hits(rows, warm, table.rows_per_block, row_ram // table.block_bytes)
        yield counted("tables", f"{format_bytes(row_ram)} for rows: a token's rows, median", "ms",
                      [1e3 * statistics.median(seconds)])  # fmt: skip
        cells.append(
            (
                format_bytes(row_ram),
                f"{100 * ours:.1f} %",
                f"{HEADS * (1 - ours):.2f}",
                f"{100 * pages:.1f} %",
                f"{HEADS * (1 - pages):.2f}",
                f"{100 * calls:.0f} %",
            )
        )
    yield Shown(
        "A text's rows, by the RAM for them",
        ("RAM for rows", "hits", "misses a token", "hits of pages", "misses a token",
         "tokens without a call"),
        tuple(cells),
        f"Of the last third of {len(tokens):,} tokens, {len(np.unique(rows)):,} distinct rows of "
        f"{table.num_rows:,} in all; pages are an LRU of {format_bytes(table.block_bytes)} each, "
        "replayed. Tokens without a call are of the first 2,000 of these.",
    )  # fmt: skip


def _replay(
    bench: Bench, pack: Path, rows: Rows, warm: int, row_ram: int
) -> tuple[float, list[float], float]:
    """Hit rate, seconds of single tokens, and the share of these that needed no call."""
    with (
        serving(
            {"m": pack},
            ram=row_ram + _EXPERTS_RAM,
            socket=bench.folder / f"tables-{row_ram}",
            arguments=("--table-ram", str(row_ram)),
        ) as daemon,
        Client(daemon.socket) as client,
        client.attach("m") as session,
    ):
        table = TableRows(session, NAME)
        for start in range(0, warm, _PROMPT_TOKENS):
            table.read(rows[start : min(warm, start + _PROMPT_TOKENS)].ravel())
        alone = min(2000, (len(rows) - warm) // 2)
        hits, misses, seconds, without = table.hits, table.misses, [], 0
        for token in rows[warm : warm + alone]:
            missed, began = table.misses, time.perf_counter()
            table.read(token)
            seconds.append(time.perf_counter() - began)
            without += table.misses == missed
        for token in rows[warm + alone :]:
            table.read(token)
        hits, misses = table.hits - hits, table.misses - misses
        return hits / (hits + misses), seconds, without / alone


class Mapped:
    """The same rows out of the file, by others' ways."""

    def __init__(self, path: Path, table: Table) -> None:
        self._path, self._table = path, table
        self._fd = os.open(path, os.O_RDONLY)
        self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        self._threads = ThreadPoolExecutor(NUM_THREADS)

    def read(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """A fault for each page that is absent."""
        data = np.frombuffer(self._map, np.uint8)
        where = self._offsets(rows) + rows % self._table.rows_per_block * self._table.row_bytes
        found: npt.NDArray[np.uint8] = data[where[:, None] + np.arange(self._table.row_bytes)]
        return found

    def read_announced(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """All pages are asked for before the first is touched."""
        for offset in self._offsets(rows).tolist():
            self._map.madvise(mmap.MADV_WILLNEED, offset, self._table.block_bytes)
        return self.read(rows)

    def read_plainly(self, rows: Rows) -> None:
        """Pages only, by many threads, past the page cache; nothing is verified or kept."""

        def work(offsets: list[int]) -> None:
            with mmap.mmap(-1, self._table.block_bytes) as page:
                for offset in offsets:
                    os.preadv(self._direct, [page], offset)

        offsets = self._offsets(rows).tolist()
        list(self._threads.map(work, [offsets[i::NUM_THREADS] for i in range(NUM_THREADS)]))

    def forget(self) -> None:
        """Has the page cache give up what nobody maps, and this process unmap what it touched."""
        self._map.madvise(mmap.MADV_DONTNEED)
        forget_file(self._path)

    def close(self) -> None:
        """Ends the threads, and closes the file."""
        self._threads.shutdown()
        os.close(self._fd)
        os.close(self._direct)

    def _offsets(self, rows: Rows) -> Rows:
        return self._table.offset + rows // self._table.rows_per_block * self._table.block_bytes


def text_tokens(count: int) -> list[int]:
    """Of the standard library's modules, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    texts = [file.read_text(errors="replace") for file in files if "site-packages" not in str(file)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer.encode(text).ids, 0]
        if len(tokens) >= count:
            break
    return tokens[:count]


class _Ids(nn.Module):
    """In the place of embeddings: the rows' numbers themselves."""

    weight = torch.empty(0)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` as they are."""
        return ids


def token_rows(tokens: list[int], table: Table) -> Rows:
    """[tokens, HEADS], by Qwen's own hash with heads of a size that the table has."""
    config = Qwen4ExpTextConfig(
        vocab_size=VOCABULARY,
        eos_token_id=0,
        ple_embed_dim=HEADS,
        # The heads' sizes are primes from there on.
        ngram_vocab_size_base=table.num_rows // HEADS - 1000,
    )
    embedding = Qwen4ExpTextNGramEmbedding(config, HEADS, 0)
    embedding.ngram_embedding = _Ids()
    found: Rows = embedding(torch.tensor([tokens]), None).view(len(tokens), HEADS).numpy()
    assert found.max() < table.num_rows
    return found


def page_hits(rows: Rows, warm: int, rows_per_page: int, num_pages: int) -> float:
    """The share of a token's rows that an LRU of so many pages has, after ``warm`` tokens."""
    pages: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for number, token in enumerate((rows // rows_per_page).tolist()):
        for page in token:
            if page in pages:
                pages.move_to_end(page)
                hits += number >= warm
            else:
                pages[page] = None
                if len(pages) > num_pages:
                    pages.popitem(last=False)
            total += number >= warm
    return hits / total


def _rate(read: Callable[[Rows], object], batches: npt.NDArray[np.int64]) -> float:
    began = time.perf_counter()
    for batch in batches:
        read(batch)
    return batches.size / (time.perf_counter() - began)


def _settle(client: Client) -> None:
    """Waits until nothing more is read ahead."""
    before = -1
    while (now := client.stats()["models"][0]["tables"][0]["prefetched"]) != before:
        before = now
        time.sleep(0.2)


def _beside_arena(pid: int, arena_bytes: int) -> float:
    """Resident bytes of the daemon's that are not the arena's."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024.0
