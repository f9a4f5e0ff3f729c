"""The sampling engine: what it is asked, and what it answers."""

from bylaw.model.engine.engine import Engine
from bylaw.model.engine.request import Completion, Query, Request, Script
from bylaw.model.engine.stats import Stats

__all__ = ["Completion", "Engine", "Query", "Request", "Script", "Stats"]
