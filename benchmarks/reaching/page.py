"""docs/reach.md from the findings."""
from typing import Any
def works(found: dict[str, Any]) -> bool:
    """Whether the class was compressed by the default recipe and reproduced at full rank."""
    return found.get("full") == "yes" and found.get("default") == "yes"
