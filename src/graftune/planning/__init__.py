"""Memory, time and disk of a training before it is run."""

from __future__ import annotations

from graftune.planning.fitting import fit
from graftune.planning.planned import Plan, plan
from graftune.planning.settings import PlanSettings

__all__ = ["Plan", "PlanSettings", "fit", "plan"]
