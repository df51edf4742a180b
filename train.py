"""`python train.py …` is `rwkv-peft train …`."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 it is run by the Python that happens to be there
    sys.exit("error: Python 3.10 or newer is needed, and this is " + sys.version.split()[0])

from rwkv_peft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
