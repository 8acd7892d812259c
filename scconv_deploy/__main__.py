"""The console script, and ``python -m scconv_deploy``: signals come first, for importing the rest takes a while."""

from scconv_deploy.system.signals import Signals
from scconv_deploy.system.streams import open_standard_streams


def main() -> None:
    """Run the command line."""
    Signals.install("scconv-deploy")
    open_standard_streams()
    from scconv_deploy.cli import main

    main()


if __name__ == "__main__":
    main()
