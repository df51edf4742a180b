"""`python train.py …` is `rwkv-peft train …`."""

import sys

from rwkv_peft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
