"""Lightning callbacks: held-out learners, the exported dataset, the W&B dashboard, the report of a run."""

from .dashboard import Dashboard
from .export import ExportDataset
from .held_out import HeldOutLearners
from .report import RunReport

__all__ = ["Dashboard", "ExportDataset", "HeldOutLearners", "RunReport"]
