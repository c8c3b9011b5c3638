"""Loads an adapter through plain PEFT, as `python -m trainer.verification.reload BACKBONE ADAPTER TABLE NUM_CLASSES`.

It prints the probabilities of each text as JSON, [N, C]. It uses nothing else of this project.
"""

import csv
import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main(backbone: str, adapter: str, table: str, num_classes: str) -> None:
    """Prints the probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=int(num_classes))
    model = PeftModel.from_pretrained(plain, adapter).eval()
    with open(table, newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    print(json.dumps(torch.stack(logits).softmax(-1).tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
