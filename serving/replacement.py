"""Decide whether a new checkpoint may replace the present model: not if it is worse on records that are new to both."""

from dataclasses import dataclass

from errors import UserError
from evaluation.held_out import MIN_RECORDS, compare_tests, describe_test, have_same_records, is_worse
from pipeline import Pipeline
from serving.log import Log

LOG = ".db"  # ending of a log of requests


@dataclass(frozen=True)
class Present:
    """The model in use: its sha256, and what its checkpoint keeps of its test split."""

    sha256: str
    test: dict


def check_replacement(present: Present, new: Pipeline, log: Log | None) -> str:
    """Return how a new model compares with the present one, in a sentence. Raises UserError if it is worse.

    Two models that were tested on the same records are compared on these, others on the logged records with feedback
    that the present model predicted. A model that was trained on a log has learned these; it is refused if it learned
    from a log alone.
    """
    if have_same_records(new.test, present.test):
        return _judge(*compare_tests(new.task, new.test, present.test))
    data = new.config.get("data", {})
    sources = [data.get("data", ""), *data.get("add", [])]
    knows_log, why = any(path.endswith(LOG) for path in sources), "the service has no --log"
    if log:
        worse, scores, why = _compare_on_feedback(present, new, log)
        if worse or (scores and not knows_log):
            return _judge(worse, scores)
    tests = f"tested on different records (new: {describe_test(new.test)}; present: {describe_test(present.test)})"
    if sources[0].endswith(LOG):
        raise UserError(
            f"the new model was trained on {sources[0]} alone and {tests}: it cannot be shown to be as good as the "
            f"present model. Train with that model's --data and --add {sources[0]}"
        )
    why = "the new model was trained on logged records" if knows_log else why
    return f"warning: the new model cannot be compared with the present one: they were {tests}, and {why}"


def _judge(worse: bool, scores: str) -> str:
    if worse:
        raise UserError(f"the new model is worse than the present one: {scores}")
    return f"not worse than the present model beyond noise: {scores}"


def _compare_on_feedback(present: Present, new: Pipeline, log: Log) -> tuple[bool, str, str]:
    """Return (whether the new model is worse on records with feedback, scores, why they cannot be compared)."""
    records, targets, old_errors = log.feedback(present.sha256)
    if len(records) < MIN_RECORDS:
        return False, "", f"the log has feedback for fewer than {MIN_RECORDS} of its predictions"
    try:
        new_errors = new.task.errors(new.task.to_json(new.predict_logits(records)[1]), targets)
    except UserError as error:
        return False, "", f"the new model cannot predict the logged records ({error})"
    means = [sum(errors) / len(errors) for errors in (new_errors, old_errors)]
    is_number = new.task.kind == "regression"
    name, scores = ("mean absolute error", means) if is_number else ("accuracy", [1 - mean for mean in means])
    scores = f"{name} {scores[0]:.4g} against {scores[1]:.4g} on {len(records):,} logged records with feedback"
    return is_worse(new_errors, old_errors), scores, ""
