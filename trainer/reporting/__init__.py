"""What users look at: TensorBoard, metrics.jsonl, figures, the report page."""
