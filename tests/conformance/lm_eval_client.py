"""Asks a server for log-likelihoods by lm-eval's own client, in lm-eval's environment.

python lm_eval_client.py REQUESTS.json URL MODEL TOKENIZER MAX_LENGTH

REQUESTS has pairs of token ids: a context, and what follows it. Prints a JSON list of what each
costs: the log-likelihood, in nats.
"""

import json
import sys
from pathlib import Path

from lm_eval.models.openai_completions import LocalCompletionsAPI


def main() -> None:
    requests, url, model, tokenizer, max_length = sys.argv[1:]
    client = LocalCompletionsAPI(
        model=model,
        base_url=url,
        tokenizer_backend="huggingface",
        tokenizer=tokenizer,
        max_length=int(max_length),
        num_concurrent=4,
    )
    pairs = json.loads(Path(requests).read_text())
    answers = client._loglikelihood_tokens(
        [(("", str(number)), *pair) for number, pair in enumerate(pairs)], disable_tqdm=True
    )
    sys.stdout.write(json.dumps([nats for nats, _ in answers]) + "\n")


main()
