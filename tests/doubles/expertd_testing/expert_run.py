"""The command ``expert-run`` with ``--device fake:0``: ``python -m expertd_testing.expert_run``."""

from expertd_inference.cli import main
from expertd_inference.process.environment import prepare_environment

if __name__ == "__main__":
    # Before torch is imported, which the fake device does, as the command itself would.
    prepare_environment(device="fake:0")
    from expertd_testing.fake_device import offer_fake_devices

    offer_fake_devices()
    main()
