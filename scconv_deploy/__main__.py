"""The console script, and ``python -m scconv_deploy``: signals come first, for importing the rest takes a while."""

import sys

from scconv_deploy.system.signals import Signals
from scconv_deploy.system.streams import open_standard_streams
from scconv_deploy.system.threads import wait_asleep


def main() -> None:
    """Run the command line."""
    Signals.install("scconv-deploy")
    open_standard_streams()
    if sys.argv[1:2] != ["bench"]:  # which times PyTorch as its users run it
        wait_asleep()
    from scconv_deploy.cli import main

    main()


if __name__ == "__main__":
    main()
