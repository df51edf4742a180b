"""`python merge/merge_state.py --base_model B --state_checkpoint S --output O`, as of old."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("merge.py")), run_name="__main__")
