"""`python merge/merge_bone.py --base_model B --lora_checkpoint D --output O`, as of old."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("merge.py")), run_name="__main__")
