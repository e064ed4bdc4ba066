"""How the head learns what stages and links cost, and how it forms steps from that. Pure: no IO, no clock."""

from molink_stage_worker.planning.observation import Demand, PlannerReport, StepObservation
from molink_stage_worker.planning.planner import Planner

__all__ = ["Demand", "Planner", "PlannerReport", "StepObservation"]
