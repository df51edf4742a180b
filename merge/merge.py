"""`python merge/merge.py …`, with the arguments of older versions, is `rwkv-peft merge …`."""

import sys
from pathlib import Path

# of the clone in which this file lies, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rwkv_peft.cli.main import main

if __name__ == "__main__":
    # these scripts have always replaced a file of that name
    given = [] if any("overwrite" in argument for argument in sys.argv) else ["--overwrite", "1"]
    sys.exit(main(["merge", *sys.argv[1:], *given]))
