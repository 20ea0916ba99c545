"""Start the merge service: `python start.py`; `python start.py --help` lists its settings."""

from service.command import main

if __name__ == "__main__":
    raise SystemExit(main())
