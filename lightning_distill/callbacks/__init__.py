"""Lightning callbacks: held-out learners, the exported dataset, the report of a run."""

from .export import ExportDataset
from .held_out import HeldOutLearners
from .report import RunReport

__all__ = ["ExportDataset", "HeldOutLearners", "RunReport"]
