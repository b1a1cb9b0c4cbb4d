"""Report on a predicted file: broken records, unknown values, drift and metrics."""

import sys
from collections import Counter

import numpy as np

from errors import UserError
from evaluation.drift import Profile

DRIFT_ROWS = 100_000  # the first rows are compared with the training data


class Summary:
    """Collect the report chunk by chunk, and print it at the end."""

    def __init__(self, pipeline):
        self.preprocessor, self.profile = pipeline.preprocessor, Profile(pipeline.profile)
        self.score = Score(pipeline.task)
        self.rows, self.broken, self.first_broken = 0, 0, ""
        self.unknown, self.counted = Counter(), Counter()

    def add(self, frame, parts, logits, broken: dict[int, str]) -> None:
        """frame, parts, logits: the records that could be read.  broken: what is wrong with the others of the chunk."""
        unknown = self.preprocessor.unknown(frame, parts)
        self.unknown.update({name: int(mask.sum()) for name, mask in unknown.items()})
        if self.profile.columns and self.rows < DRIFT_ROWS:
            self.counted.update(self.profile.count(self.preprocessor.profile_values(frame, parts)))
        self.score.add(logits, frame)
        if broken:
            self.first_broken = self.first_broken or broken[min(broken)]
        self.rows, self.broken = self.rows + len(frame) + len(broken), self.broken + len(broken)

    def counts(self) -> tuple:
        """Return what `merge` adds up, of this process."""
        return self.rows, self.broken, self.first_broken, self.unknown, self.counted, self.score

    def merge(self, counts: list[tuple]) -> None:
        """Take the place of the summaries of all processes. counts: their `counts`, in the order of the rows."""
        rows, broken, first_broken, unknown, counted, scores = zip(*counts, strict=True)
        self.rows, self.broken, self.first_broken = sum(rows), sum(broken), next(filter(None, first_broken), "")
        self.unknown, self.counted, self.score = sum(unknown, Counter()), sum(counted, Counter()), scores[0]
        for other in scores[1:]:
            self.score.merge(other)

    def show(self, file) -> None:
        """Print the metrics to `file`, the rest to standard error."""
        if self.broken:
            how_many = f"{self.broken} of {self.rows} records cannot be read"
            print(f"{how_many}; the first: {self.first_broken}", file=sys.stderr)
        for column in self.preprocessor.columns:
            if count := self.unknown[column.name]:
                print(f"column {column.name!r}: {count} of {self.rows} {column.unknown_cells}", file=sys.stderr)
        for name, state in self.profile.compare(self.counted).items():
            if state["drifted"]:
                print(f"drift in {name!r}: {state['why']}", file=sys.stderr)
        self.score.show(file)


class Score:
    """Metrics over the rows that have a target, if any."""

    def __init__(self, task):
        self.task, self.metrics, self.problem = task, None, ""

    def add(self, logits, frame) -> None:
        if self.task.target not in frame or self.problem:
            return
        given = np.flatnonzero(self.task.has_target(frame[self.task.target]))
        if not len(given):
            return
        try:  # rows can be predicted whatever the target column holds, and where torchmetrics is not installed
            targets = self.task.encode(frame[self.task.target].iloc[given])
            self.metrics = self.metrics or self.task.metrics()
        except (UserError, ImportError) as error:
            self.problem = str(error)
            return
        self.metrics.update(self.task.metric_inputs(logits[given]), self.task.decode(targets))

    def merge(self, other: "Score") -> None:
        self.problem = self.problem or other.problem
        if self.metrics and other.metrics:
            for name, metric in self.metrics.items():
                metric.merge_state(other.metrics[name])
        self.metrics = self.metrics or other.metrics

    def show(self, file) -> None:
        if self.problem:
            print(f"no metrics: {self.problem}", file=sys.stderr)
        elif self.metrics:
            values = self.task.compute_metrics(self.metrics)
            print("metrics  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), file=file)
