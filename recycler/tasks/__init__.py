"""Long-context tasks, made from their published descriptions, to compare ways of decoding on.

A task is asked in two ways: its reference answer is teacher-forced, which says how far a method is from
full attention at every step, and the model answers by itself, which says what that does to the answer.
"""

from recycler.tasks.catalogue import TASKS, task_prompts
from recycler.tasks.task import Task, TaskPrompt

__all__ = ["TASKS", "Task", "TaskPrompt", "task_prompts"]
