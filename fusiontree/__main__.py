"""``python -m fusiontree``."""

from fusiontree.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
