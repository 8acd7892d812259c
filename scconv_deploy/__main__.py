"""``python -m scconv_deploy``."""

from scconv_deploy.cli import main

if __name__ == "__main__":
    main()
