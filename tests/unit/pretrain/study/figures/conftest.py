"""Modules beside these tests, imported by name: `study_tables`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
