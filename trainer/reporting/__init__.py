"""What users look at: TensorBoard, metrics.jsonl, figures, the report page."""

import os

# A notebook names its own backend here. Importing matplotlib would fail where that backend is not installed.
os.environ["MPLBACKEND"] = "agg"
