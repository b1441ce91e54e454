"""Makes ``thinkfast_distill`` importable where the distribution is not installed."""

import sys
from pathlib import Path

_DISTRIBUTION = str(Path(__file__).resolve().parents[2] / "distill")
if _DISTRIBUTION not in sys.path:
    sys.path.insert(0, _DISTRIBUTION)
