"""`python merge/merge_pissa.py BASE INIT LORA OUTPUT`, the script of older versions."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("merge.py")), run_name="__main__")
