"""Imported by processes that fork others: what is slow the first time only is done once for all of these.

No number is computed, since threads that compute would not survive a fork.
"""

import matplotlib.figure  # noqa: F401
import peft
import sklearn.metrics  # noqa: F401
import torch
import transformers
from transformers import AutoModelForSequenceClassification, RobertaForSequenceClassification  # noqa: F401

import trainer.training.pipeline  # noqa: F401
from trainer.config.loading import parse_config
from trainer.model.peft_options import adapter_config

torch.set_num_threads(1)
config = parse_config(["--data.train", "none.csv", "--peft.r", "4", "--peft.target_modules", "[query,value]"])
sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
with torch.device("meta"):
    model = AutoModelForSequenceClassification.from_config(transformers.RobertaConfig(**sizes))
    peft.get_peft_model(model, adapter_config(config.peft, "none"))
