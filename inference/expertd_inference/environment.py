"""What must be set before torch and transformers are imported, which read it then."""

import os
import warnings


def prepare_environment(*, verbose: bool = False) -> None:
    """No network, threads that sleep while they wait, and no noise unless ``verbose``."""
    # No network, ever: all that is needed lies in the pack.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # OpenMP's threads spin while they wait, and take the cores from each other as soon as
    # workers have more threads than there are idle cores: 5 tokens/s spinning, 120 sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        warnings.simplefilter("ignore")
