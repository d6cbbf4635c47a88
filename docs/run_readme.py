"""Run the commands of README.md in the order in which a reader meets them.

    python docs/run_readme.py [--skip "make test"]      in a fresh clone; stops at the first failure

Every fenced block marked ```bash is run as one script, in this directory and one shell, so that an
activated environment lasts. Blocks marked ```bash no-run need the reader's own files.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(text: str) -> list[str]:
    """The fenced blocks that can be run, in order."""
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", action="append", default=[], help="a block with this text alone")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args()
    found = [b for b in blocks(README.read_text(encoding="utf-8")) if b.strip() not in args.skip]
    script = "set -euo pipefail\n" + "".join(found)
    if args.list or not found:
        print(script)
        return 0 if found else 1
    return subprocess.run(["bash", "-x", "-c", script], cwd=README.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
