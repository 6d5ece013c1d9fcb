"""The page docs/architectures.md, from the results of a sweep that are committed beside this."""

from pathlib import Path

import msgspec

from expertd_testing.tiny_models import CONFIGS
from expertstore.pack.seeing import BLIND, SEEING, TEXT_WITHIN
from tests.architectures import sweep
from tests.architectures.columns import ADAPTERS, FORMATS, REFUSED, SEES
from tests.architectures.sweep import Result, Results
from tests.architectures.tiny_configs import OUTSIDE

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs/architectures.md"

_HEAD = """# Architectures

What `expertd pack` packs and `expert-run` runs. transformers lets the experts of {num} of its
models be replaced (its *experts interface*); expertd needs no code of its own for any of them. It
has some for Llama 4, whose experts are outside of that interface.
This page is made by `make architectures`, with transformers {transformers} and torch {torch}: it
makes a tiny model with random weights of each architecture, packs it, and runs it beside stock
transformers, which gets the same weights, dequantized. What is listed here gave **equal logits,
bit for bit, and the same greedy tokens** (prefill of {prompt} tokens, {new} decoded), in every
scheme: {schemes}.
The reference kernels computed the experts, with transformers' own default (`grouped_mm`) on the
other side.

"""

_NAMES = ("architecture", "features", "formats", "sees", "adapters")
_NAMES += ("native", "ahead", "batched", "tests")
_COLUMNS = """
- **Features**: what the tiny model of it has, and so what was tried.
- **Formats**: in what it is packed from in a test, beside 16 and 32 bits. Any format that
  [packing.md](packing.md) lists is read for any architecture.
- **Sees**: whether images are served; *text alone*: its checkpoints also see or hear, and their
  language model is served.
- **Adapters**: whether adapters (LoRA) are tried with it.
- **Native**: the activation, if the native CPU and GPU kernels know it. The others are computed
  by the reference kernels, which call the model's own function: right, and slower.
- **Ahead**: whether its routers can be asked ahead of time, for prefetching and speculation.
- **Batched**: which rows of several sequences a step computes together: *all*; those of *decoding*
  sequences, where layers keep recurrent states (prompts are then computed one after the other);
  or none: sequences are computed *in turns*, which is right, but each reads all weights for itself.
  What several sequences get was compared with each alone, prompts in chunks among them.
- **Tests**: *every change*: part of `make test`, where the native kernels are compared with the
  reference as well, and much else is tried; *swept*: by `make architectures`.

"""


def read_results() -> Results:
    """Those of the last sweep."""
    return msgspec.json.decode(RESULTS.read_bytes(), type=Results)


def merge(old: Results, new: Results) -> Results:
    """``old`` with the rows of ``new``, in place of its own or beside; both of one version."""
    if (old.transformers, old.torch) != (new.transformers, new.torch):
        raise SystemExit(
            f"The table was made with transformers {old.transformers} and torch {old.torch}; "
            "give no names, and all is made anew."
        )
    rows = {result.architecture: result for result in (*old.results, *new.results)}
    return msgspec.structs.replace(old, results=tuple(rows[name] for name in sorted(rows)))


def render(results: Results) -> str:
    """The page."""
    served = [result for result in results.results if not result.refused]
    schemes = ", ".join(f"`{scheme}`" for scheme in ("bf16", *sweep.SCHEMES))
    lines = [
        _HEAD.format(
            num=len(results.results) - len(OUTSIDE),
            transformers=results.transformers,
            torch=results.torch,
            prompt=sweep.PROMPT_TOKENS,
            new=sweep.NEW_TOKENS,
            schemes=schemes,
        )
        + f"| {' | '.join(_NAMES)} |\n|{'---|' * len(_NAMES)}"
    ]
    lines += [_row(result) for result in served if not result.differs]
    lines.append(_COLUMNS.rstrip("\n"))
    lines.append(_MXFP4)
    lines.append(_turns(served))
    lines.append(_seeing())
    if differing := [result for result in served if result.differs]:
        lines.append("\n## Not equal\n")
        lines += [f"- {_name(result)}: {', '.join(result.differs)}" for result in differing]
    lines.append(
        "\n## Refused\n\nWith a sentence that says so, when a checkpoint of it is packed.\n"
    )
    lines += [
        f"- {_name(result)}: {result.refused}."
        for result in results.results
        if result.refused and result.architecture not in {**SEEING, **TEXT_WITHIN}
    ]
    lines += [f"- `{name}`: {reason}." for name, reason in REFUSED.items()]
    return "\n".join(lines) + "\n"


_MXFP4 = """
GPT-OSS is also tried as it is published, with its experts in MXFP4: they are kept bit for bit,
and the logits are those of transformers, which dequantizes them. Other quantized checkpoints are
kept as well: [as they are](packing.md#as-they-are).

Checkpoints of models that see or hear as well are packed as language models where transformers
has one of them, and their other parts are left out: so Llama 4's would be, and Qwen4's are."""


_SEEING = """
## Models that see

These take images as well ([answers.md](answers.md#images)), unless they are packed with
`--text-only`. A tiny model of each is held against stock transformers with every change: prompts
with images, whole and in chunks, beside others, and what comes after.

"""


def _seeing() -> str:
    within = ", ".join(f"`{kind}`" for kind in TEXT_WITHIN)
    rows = [f"| `{name}` | `{kind}` |" for kind, name in sorted(SEEING.items())]
    return (
        _SEEING
        + "\n".join(["| architecture | `model_type` |", "|---|---|", *rows, ""])
        + (
            "\nVideos and sounds are taken by none. What others would need:\n\n"
            + "\n".join(f"- `{kind}`: {why}." for kind, why in BLIND.items())
            + f"\n\nOf {within} transformers has the language model\n"
            "only within a model that sees: it is taken out of there, and serves texts."
        )
    )


def _turns(served: list[Result]) -> str:
    """Why some architectures are computed in turns."""
    reasons: dict[str, list[str]] = {}
    for result in served:
        if result.turns:
            reasons.setdefault(result.turns, []).append(_name(result))
    return "\nIn turns are, and why:\n\n" + "\n".join(
        f"- {reason}: {', '.join(names)}." for reason, names in reasons.items()
    )


def _row(result: Result) -> str:
    tests = "every change" if result.architecture in CONFIGS else "swept"
    cells = (
        _name(result),
        ", ".join(result.features),
        ", ".join(FORMATS.get(result.architecture, ())),
        _sees(result),
        "yes" if result.architecture in ADAPTERS else "",
        f"`{result.activation}`" if result.activation else "no",
        "yes" if result.routers else "no",
        result.together,
        tests,
    )
    return f"| {' | '.join(cells)} |"


def _sees(result: Result) -> str:
    if result.architecture in SEES:
        return "yes"
    return "text alone" if result.text_alone else ""


def _name(result: Result) -> str:
    return f"`{result.model}`" if result.model else f"`{result.architecture}`"
