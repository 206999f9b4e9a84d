"""Makes the environments that peers are measured in, one folder each, from `bench/peers/*.txt`.

    python bench/setup_peers.py                  # what is missing
    python bench/setup_peers.py litgpt --again   # one, anew

Torch comes first and alone, so that nothing else decides which build of it comes. A peer that cannot be installed is
named at the end, and the bench reports it as absent.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
LISTS = HERE / "peers"
READY = ".ready"


def main() -> int:
    """1 if a peer could not be installed."""
    known = sorted(path.stem for path in LISTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"which: {', '.join(known)}; all if none is named")
    parser.add_argument("--into", type=Path, default=HERE.parent / ".bench", help="folder of the environments")
    parser.add_argument("--again", action="store_true", help="make them anew")
    options = parser.parse_args()
    unknown = sorted(set(options.peers) - set(known))
    if unknown:
        parser.error(f"no peer {unknown[0]!r}: there are {', '.join(known)}")
    failed = [peer for peer in options.peers or known if not make(peer, options.into / peer, again=options.again)]
    if failed:
        print(f"not installed: {', '.join(failed)}; the bench reports them as absent")
    return 1 if failed else 0


def make(peer: str, place: Path, *, again: bool) -> bool:
    """Whether the environment is there in the end; one that is there already stays unless its list is newer."""
    wanted = (LISTS / f"{peer}.txt").read_text(encoding="utf-8")
    ready = place / READY
    if not again and ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        print(f"{peer}: there already")
        return True
    print(f"{peer}: installing into {place}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    for what in ([torch], ["-r", str(LISTS / f"{peer}.txt")]):
        done = subprocess.run([place / "bin" / "python", "-m", "pip", "install", "-qq", *what], check=False)
        if done.returncode:
            return False
    ready.write_text(wanted, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
