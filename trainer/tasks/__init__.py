"""What a label is. `TASKS` holds every task, by the name that `task.type` takes."""

from trainer.tasks import single_label
from trainer.tasks.task import Task

TASKS: dict[str, Task] = {"single_label": single_label.TASK}
