"""The corpus: CPython's standard library, its tokenizer, and the part that training never sees.

Which files are held out follows from a hash of the module's path alone, so a Python of another
version holds out the same modules, and the committed ``heldout.txt`` stays unseen there too.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
TOKENIZER_PATH = HERE / "tokenizer.json"
HELDOUT_PATH = HERE / "heldout.txt"

VOCAB_SIZE = 4096
SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0

HELDOUT_PER_MILLE = 25
HELDOUT_TEXT_BYTES = 300_000
HELDOUT_FILE_BYTES = 40_000  # no single module may be more than about an eighth of the text

# Every alternative keeps Python's own units whole: identifiers with their underscores, up to three
# digits, a run of operators. A line break and the indentation after it are one piece (all but the
# last space, which joins the word), so that each depth of indentation becomes one token.
PRE_TOKEN = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

# Left out, each for a reason that has nothing to do with how well the model does on it.
EXCLUDED = re.compile(
    "|".join(
        (
            r"^(site-packages|dist-packages|__pycache__)/",  # of other authors
            r"^_sysconfigdata",  # generated when Python is built: compiler flags and build paths
            r"^pydoc_data/",  # generated: the language reference as one dictionary
            r"^encodings/(cp|iso|koi8|mac_|tis_|hp_|ptcp|kz_)",  # generated 256-entry tables
            r"^(test/)?.*(bad_?coding|badsyntax|bad_encoding)",  # broken on purpose
            r"^(lib2to3/tests|test/test_lib2to3)/data/",  # inputs of a converter, Python 2 syntax
            r"^test/encoded_modules/",  # not UTF-8 on purpose
        )
    )
)
MAX_FILE_BYTES = 280_000  # above it only generated files and tables remain
MAX_LINE_CHARS = 600  # a longer line is data, not code


@dataclass(frozen=True)
class Module:
    """One source file: its path below the standard library, with ``/``, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether it belongs to a test suite."""
        return not {"test", "tests", "idle_test"}.isdisjoint(self.path.split("/"))

    @property
    def rank(self) -> int:
        """A fixed pseudo-random number of this path, the same on every machine."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8], "big")

    @property
    def is_heldout(self) -> bool:
        """Whether training must not see it."""
        return self.rank % 1000 < HELDOUT_PER_MILLE


@dataclass(frozen=True)
class Split:
    """The corpus, in the order of the paths' hashes (so that neighbours are unrelated)."""

    train: list[Module]
    heldout: list[Module]


def read_split(stdlib: Path | None = None) -> Split:
    """Read the running Python's standard library and split it.

    The second and later copies of a text are dropped; a training module that is a copy of a
    held-out one is dropped as well.
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(_read_modules(root), key=lambda module: (not module.is_heldout, module.rank))
    seen: set[str] = set()
    split = Split(train=[], heldout=[])
    for module in modules:
        digest = hashlib.sha256(module.text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            (split.heldout if module.is_heldout else split.train).append(module)
    return split


def _read_modules(root: Path) -> Iterator[Module]:
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if EXCLUDED.search(path) or "__pycache__" in path:
            continue
        data = file.read_bytes()
        if not 200 <= len(data) <= MAX_FILE_BYTES:
            continue
        try:
            text = data.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if "\0" in text or SEPARATOR in text or max(map(len, text.split("\n"))) > MAX_LINE_CHARS:
            continue
        yield Module(path, text)


# --- the held-out text ----------------------------------------------------------------------------

HELDOUT_HEADER = """\
Held-out modules of the standard library of CPython 3.11, for measuring perplexity.
Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved.
Licensed under the Python Software Foundation License Version 2, https://docs.python.org/3.11/license.html
Unchanged copies; the list follows, one path a line. A separator token stands before every module.
Whatever stands before the first separator is not part of the text.
"""


def write_heldout(modules: list[Module], path: Path = HELDOUT_PATH) -> None:
    """Write the held-out modules that fit, in hash order, half of the bytes from tests."""
    budgets = {False: HELDOUT_TEXT_BYTES // 2, True: HELDOUT_TEXT_BYTES // 2 - 6_000}
    chosen: list[Module] = []
    for module in modules:
        size = len(module.text.encode()) + len(SEPARATOR)
        own_terms = (
            "Permission to use" in module.text
        )  # some modules carry older terms than the PSF's
        if size <= min(HELDOUT_FILE_BYTES, budgets[module.is_test]) and not own_terms:
            budgets[module.is_test] -= size
            chosen.append(module)
    header = HELDOUT_HEADER + "".join(f"    {module.path}\n" for module in chosen)
    text = header + "".join(SEPARATOR + module.text for module in chosen)
    path.write_bytes(text.encode())


def read_heldout(path: Path = HELDOUT_PATH) -> list[str]:
    """The held-out modules' texts."""
    return path.read_bytes().decode().split(SEPARATOR)[1:]


# --- the tokenizer --------------------------------------------------------------------------------


def train_tokenizer(modules: list[Module]) -> Tokenizer:
    """Train a byte-level BPE, which gives back every text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((module.text for module in modules), trainer)
    return tokenizer


def load_tokenizer(path: Path = TOKENIZER_PATH) -> Tokenizer:
    """The tokenizer that ``main`` has written."""
    return Tokenizer.from_file(str(path))


def encode_modules(tokenizer: Tokenizer, texts: list[str]) -> npt.NDArray[np.uint16]:
    """All texts as one stream, a separator before each."""
    encodings = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([SEPARATOR_ID, *e.ids], dtype=np.uint16) for e in encodings])


# --- the training streams -------------------------------------------------------------------------


@dataclass(frozen=True)
class Streams:
    """Training tokens: the library itself, and its (larger, more repetitive) test suite."""

    library: npt.NDArray[np.uint16]
    tests: npt.NDArray[np.uint16]


def load_streams(cache: Path) -> Streams:
    """The tokenised training part, from ``cache`` if the tokenizer has not changed since."""
    vocabulary = json.dumps(load_tokenizer().get_vocab(), sort_keys=True)
    fingerprint = hashlib.sha256(vocabulary.encode()).hexdigest()[:12]
    paths = {name: cache / f"{name}-{fingerprint}.npy" for name in ("library", "tests")}
    if not all(path.exists() for path in paths.values()):
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer()
        train = read_split().train
        for name, path in paths.items():
            texts = [module.text for module in train if module.is_test == (name == "tests")]
            np.save(path, encode_modules(tokenizer, texts))
    return Streams(np.load(paths["library"]), np.load(paths["tests"]))


class Windows:
    """Rows of ``length + 1`` tokens from one stream, every token once per epoch.

    Each epoch cuts the stream at a new random offset and shuffles the rows. Epoch and row are the
    whole state, so a resumed run continues with exactly the rows that come next.
    """

    def __init__(self, stream: npt.NDArray[np.uint16], length: int, seed: int) -> None:
        self._stream, self._length, self._seed = stream, length, seed
        self.epoch, self.row = 0, 0
        self._starts = self._shuffle()

    def _shuffle(self) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self._seed, self.epoch))
        first = int(rng.integers(self._length))
        starts = np.arange(first, len(self._stream) - self._length - 1, self._length)
        rng.shuffle(starts)
        return starts

    def next(self) -> npt.NDArray[np.int64]:
        """The next row; begins a new epoch after the last."""
        if self.row == len(self._starts):
            self.epoch, self.row = self.epoch + 1, 0
            self._starts = self._shuffle()
        start = int(self._starts[self.row])
        self.row += 1
        return self._stream[start : start + self._length + 1].astype(np.int64)

    def state(self) -> dict[str, int]:
        """The place of the next row, for ``restore``."""
        return {"epoch": self.epoch, "row": self.row}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a place that ``state`` gave."""
        self.epoch, self.row = int(state["epoch"]), int(state["row"])
        self._starts = self._shuffle()


def main() -> None:
    """Write the tokenizer and the held-out text beside this file, and say what the corpus holds."""
    split = read_split()
    tokenizer = train_tokenizer(split.train)
    tokenizer.save(str(TOKENIZER_PATH))
    write_heldout(split.heldout)
    for module in split.train + split.heldout:
        assert tokenizer.decode(tokenizer.encode(module.text).ids) == module.text, module.path
    heldout = read_heldout()
    print(
        json.dumps(
            {
                "train_files": len(split.train),
                "train_bytes": sum(len(m.text.encode()) for m in split.train),
                "train_test_bytes": sum(len(m.text.encode()) for m in split.train if m.is_test),
                "heldout_files": len(split.heldout),
                "heldout_bytes": sum(len(m.text.encode()) for m in split.heldout),
                "heldout_text_files": len(heldout),
                "heldout_text_bytes": HELDOUT_PATH.stat().st_size,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
