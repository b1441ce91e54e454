"""Make the run-folder helper of the reward tests importable under every import mode."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
