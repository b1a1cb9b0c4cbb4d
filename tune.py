"""Search the flags of train.py: trials are compared on the validation split, and the winner is tested once.

  python tune.py --data table.csv --target price                     five minutes
  python tune.py --data table.csv --target price --trials 30         30 trials
  python tune.py --data table.csv --target price --time-budget 3600 --jobs 2
  python tune.py --data table.csv --target price --out runs/x        continue the search in this folder, or take part

Flags of train.py that are given stay as they are; --hidden, --activation, --dropout, --epochs, --lr and --weight-decay
are searched (Optuna: multivariate TPE, hopeless trials are stopped early). The first trial has the default flags. The
best trials are trained again with another seed. The winner is then trained as train.py does, into the run folder, and
compared with the default flags on the test split. tune.html shows the trials.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import multiprocessing
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from config import INF, Config
from console import run
from errors import UserError, parse_flags

SECONDS = 300.0  # without --trials and --time-budget
FINALISTS = 3  # settings, the default among them, that are trained again with another seed


@dataclass(frozen=True)
class SearchConfig:
    """how to search"""

    trials: int = 0
    """Trials, those of an interrupted search included; 0 = as many as the time allows. Without --time-budget, which is
    for the whole search, five minutes."""
    jobs: int = 1
    """Processes that work on trials at the same time."""
    storage: str = ""
    """A database that several machines share, such as postgresql://…; by default a file in the run folder."""

    def __post_init__(self):
        if self.trials < 0 or not 1 <= self.jobs <= 256:
            raise UserError("--trials must be 0 or more, and --jobs from 1 to 256.")


@dataclass(frozen=True)
class TuneConfig(Config):
    """All flags of train.py, and the flags of the search."""

    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.data.folds or self.run.learning_curve or self.run.resume:
            raise UserError(
                "--folds, --learning-curve and --resume are for train.py. To continue a search, give --out."
            )


def given_flags(arguments: list[str]) -> set[str]:
    """Return the names of the fields that command-line arguments set."""
    flags = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    return {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}


def tune(config: TuneConfig, fixed: set[str] = frozenset(), *, table=None):
    """Search, train the winner and return its train.Run; None if another process that took part does.

    fixed: names of fields that keep their value.  table: a DataFrame instead of the file that `data.data` names.
    Raises UserError for bad data or flags, and KeyboardInterrupt when interrupted; a later call continues.
    """
    from evaluation.run_folder import new_folder
    from search.study import first_to_finish

    config = replace(config, run=replace(config.run, out=config.run.out or new_folder(config.data.data)))
    budget = config.training.time_budget or (0.0 if config.search.trials else SECONDS)
    deadline = time.time() + budget if budget else INF
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_take_part, args=(config, fixed, table, deadline), daemon=True)
        for _ in range(config.search.jobs - 1)
    ]
    try:
        for process in others:
            process.start()
        study, data, space = _search(config, fixed, table, deadline)
        for process in others:
            process.join()
    except KeyboardInterrupt:
        again = f"--out {config.run.out}"
        raise KeyboardInterrupt(f"interrupted: to continue, give the same flags and {again}") from None
    finally:
        for process in others:
            process.terminate()
    with first_to_finish(Path(config.run.out)) as is_first:
        if is_first:
            return _finish(study, data, space, table)
    print("the search is over; another process trains the winner")
    return None


def _take_part(config: TuneConfig, fixed: set[str], table, deadline: float) -> None:
    run(lambda: _search(config, fixed, table, deadline, is_first=False))


def _search(config: TuneConfig, fixed: set[str], table, deadline: float, *, is_first: bool = True):
    """Work on trials until the search is over. Return the study, what its trials share, and the search space."""
    from dataloader import load_splits
    from evaluation.run_folder import print_data
    from search.space import search_space
    from search.study import Worker, open_study, search
    from search.trial import prepare
    from train import assemble

    out, training = Path(config.run.out), replace(config.training, time_budget=0.0)
    threads = config.run.threads or (1 if config.search.jobs > 1 else 0)
    plain = Config(config.data, config.model, training, replace(config.run, report=False, threads=threads))
    try:
        worker = Worker(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror}).") from None
    try:
        splits, pipeline, loaders, _ = assemble(load_splits(config.data, training.seed, table), plain)
        data = prepare(pipeline, loaders, replace(plain, run=config.run))
        space = search_space(data, fixed)
        if not space:
            raise UserError("all flags that could be searched are given: there is nothing to search.")
        study = open_study(out, config.search.storage, plain.to_dict(), space)
        if is_first:
            print_data(splits, pipeline, [])
        search(data, space, study, worker, trials=config.search.trials, deadline=deadline, final=FINALISTS + 2)
    finally:
        worker.close()
    return study, data, space


def _finish(study, data, space: dict, table):
    """Choose among the best trials and the default flags, train the winner, compare both on the test split."""
    from evaluation.report import command_line
    from search.page import write_page
    from search.space import default_params, with_params
    from search.study import best_trials, remember_winner
    from search.winner import choose_winner, compare_tests

    default, ranked, out = default_params(data, space), best_trials(study), Path(data.config.run.out)
    winner, finalists, sentence = remember_winner(
        study, lambda: choose_winner(data, [(t.params, t.value) for t in ranked], default, FINALISTS)
    )
    chosen = data.config if winner == default else with_params(data, winner)
    line = f"python train.py {command_line(chosen)}"
    print(f"{sentence}\n\n{line}\n", flush=True)
    result = other = _train(chosen, out, table)
    if winner != default:
        print("\nthe default flags, to compare:", flush=True)
        other = _train(data.config, out / "default", table)
    tested = compare_tests(result, other)
    write_page(out / "tune.html", study, space, finalists, [sentence, *tested], line)
    print("", *tested, f"Trials: {out / 'tune.html'}", sep="\n")
    return result


def _train(config: Config, out: Path, table):
    """Train as train.py does; continue a run that was interrupted."""
    from train import train

    resume = str(out / "last.pt") if (out / "last.pt").exists() else ""
    where = replace(config.run, out=str(out), resume=resume)
    return train(config.data, config.model, config.training, where, table=table)


def main() -> None:
    config = parse_flags(TuneConfig, description=__doc__)
    config.data.check_files()
    tune(config, given_flags(sys.argv[1:]))


if __name__ == "__main__":
    run(main)
