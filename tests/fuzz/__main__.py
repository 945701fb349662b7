"""`python -m tests.fuzz`: what `fuzz.py` says."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzz

fuzz.main()
