"""What is said of a run as it goes: events, as they are written to ``metrics.jsonl``."""

from typing import Any

Event = dict[str, Any]
