"""Find what makes an evaluation untrustworthy: records in two splits, targets that are given away, rare classes.

Each finding is {"check", "finding"}: a name and a sentence.
"""

import numpy as np
import pandas as pd
import torch

from evaluation.leaks import find_leaks
from preprocessing.column import evenly_spaced
from preprocessing.copies import find_copies_in
from preprocessing.parsing import canonical_codes
from preprocessing.preprocessor import take

SHARE = 0.01  # of the records: fewer duplicates hardly change a metric
FEW_TEST, RARE = 10, 0.05  # test records of a class, share of a class
UNSEEN = 0.5  # share of test cells with an unknown value: the column is like an id
NEAR_TEST, NEAR_OTHERS = 2_000, 10_000  # test records, and others, that are compared with each other
CONTENT = 0.8  # share of different cells of a column from which on they are no names or categories
IN_TIME = 0.1  # correlation of the targets of records that follow each other in time


def audit(splits, task, preprocessor, encoded: list[dict]) -> list[dict]:
    """Return the findings.  encoded: the columns of train, validation and test, as `fit_splits` returns them."""
    copies = _find_copies(splits)
    found = [
        *_duplicates(splits, copies),
        *_near_duplicates(splits, preprocessor, encoded, copies),
        *find_leaks(splits, task, preprocessor, encoded),
        *_ids(splits, preprocessor, encoded),
        *_time_overlap(splits, task, preprocessor),
        *_rare_classes(splits, task),
    ]
    return [{"check": check, "finding": finding} for check, finding in found]


def _find_copies(splits) -> list[np.ndarray]:
    """Return a code of each record of train, validation and test: equal for copies, and for no other records."""
    parts = (splits.train, splits.val, splits.test)
    codes = find_copies_in([part.drop(columns=splits.target) for part in parts], splits.config)
    codes = np.arange(sum(map(len, parts))) if codes is None else codes
    return np.split(codes, np.cumsum([len(part) for part in parts])[:2])


def _duplicates(splits, copies: list[np.ndarray]) -> list[tuple[str, str]]:
    """Find copies of records in two splits and in one, and copies with different targets."""
    parts, target, found = (splits.train, splits.val, splits.test), splits.target, []
    index, codes = np.concatenate([part.index for part in parts]), np.concatenate(copies)
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    copied = np.isin(copies[2], np.concatenate(copies[:2]))
    if copied.mean() > SHARE:
        at = copied.argmax()
        twin = index[(codes == copies[2][at]).argmax()]
        found.append((
            "duplicates",
            f"{copied.sum()} of {len(copied)} test records ({copied.mean():.0%}) stand in the training or validation "
            f"split as well, such as row {splits.test.index[at]}, which equals row {twin}: the test metrics are too "
            "good. Remove duplicates, or leave out --keep-duplicates.",
        ))  # fmt: skip
    elif (more := len(codes) - len(counts)) > SHARE * len(codes):
        code = codes[first[counts.argmax()]]
        rows = ", ".join(map(str, index[codes == code][:3]))
        found.append((
            "duplicates",
            f"{more} of {len(codes)} records ({more / len(codes):.0%}) are copies of another one, such as rows {rows}. "
            "Copies are in the same split, and count several times in it.",
        ))  # fmt: skip
    if splits.kind != "regression":
        labels = canonical_codes(pd.concat([part[target] for part in parts]))[0]
        label_of = np.zeros(codes.max() + 1, int)
        label_of[codes[first]] = labels[first]
        differs = labels != label_of[codes]
        if differs.mean() > SHARE / 2:
            row = index[differs.argmax()]
            other = index[(codes == codes[differs.argmax()]).argmax()]
            found.append((
                "conflicting targets",
                f"{differs.sum()} records equal another one but have another {target}, such as rows {other} and {row}: "
                "no model can predict both.",
            ))  # fmt: skip
    return found


def _near_duplicates(splits, preprocessor, encoded: list[dict], copies: list[np.ndarray]) -> list[tuple[str, str]]:
    """Find test texts and images that are nearly those of another split, but no exact copies."""
    parts = (splits.train, splits.val, splits.test)
    rows = [
        evenly_spaced(torch.arange(len(part)), count)
        for part, count in zip(parts, (NEAR_OTHERS, NEAR_TEST, NEAR_TEST), strict=True)
    ]
    indices, codes = [
        [each[some.numpy()] for each, some in zip(every, rows, strict=True)]
        for every in ([part.index for part in parts], copies)
    ]
    others, found = indices[0].append(indices[1]), []
    for column in preprocessor.columns:
        prints = [
            column.fingerprints(part[column.name].iloc[some.numpy()], take(columns[column.name], some))
            for part, columns, some in zip(parts, encoded, rows, strict=True)
        ]
        if prints[0] is None:
            continue
        distinct = np.unique(np.concatenate([column.keys(part[column.name]) for part in parts]))
        if len(distinct) < CONTENT * sum(map(len, parts)):
            continue
        similar = prints[2] @ torch.cat(prints[:2]).T
        similar[torch.from_numpy(codes[2][:, None] == np.concatenate(codes[:2]))] = 0
        best, twin = similar.max(dim=1)
        near = best >= column.near
        if (share := float(near.double().mean())) > SHARE:
            at = int((best * near).argmax())
            found.append((
                "near-duplicates",
                f"{int(near.sum())} of {len(near)} test records ({share:.0%}) are nearly the same in {column.name!r} "
                f"as a record of the training or validation split, such as rows {indices[2][at]} and "
                f"{others[int(twin[at])]}: the test metrics may be too good. A column that is the same for all "
                "versions of a record keeps them in one split: --group NAME.",
            ))  # fmt: skip
    return found


def _ids(splits, preprocessor, encoded: list[dict]) -> list[tuple[str, str]]:
    """Find columns that are different in nearly every row."""
    found = []
    if left_out := [name for name, (kind, _) in preprocessor.left_out.items() if kind == "id"]:
        names, many = ", ".join(map(repr, left_out[:5])), len(left_out) > 1
        found.append((
            "ids",
            f"{'Columns' if many else 'Column'} {names} {'are' if many else 'is'} different in nearly every row, and "
            f"{'are' if many else 'is'} left out.",
        ))  # fmt: skip
    for column in preprocessor.columns:
        unknown = column.unknown(splits.test[column.name], encoded[2][column.name])
        if unknown is not None and (share := float(unknown.double().mean())) > UNSEEN:
            found.append((
                "ids",
                f"Column {column.name!r} is like an id: {share:.0%} of its test values do not occur in training. The "
                f"model cannot learn from them: --columns {column.name}=drop, or =text.",
            ))  # fmt: skip
    return found


def _time_overlap(splits, task, preprocessor) -> list[tuple[str, str]]:
    """Find a split at random of records whose targets are alike if they are close in time."""
    config, parts = splits.config, (splits.train, splits.val, splits.test)
    if config.time or config.group or config.val_data or config.test_data:
        return []
    for column in preprocessor.columns:
        found = [column.times(part[column.name]) for part in parts]
        if found[0] is None:
            continue
        times = np.concatenate(found)
        if np.isfinite(times).sum() < 100:
            continue
        targets = task.scores(torch.cat([task.encode(part[splits.target]) for part in parts]))
        known = np.flatnonzero(np.isfinite(times))
        ordered = targets[known[np.argsort(times[known], kind="stable")]]
        spread = ordered.std(axis=0)
        ordered = ((ordered - ordered.mean(axis=0)) / np.maximum(spread, 1e-9))[:, spread > 0]
        correlation = float((ordered[1:] * ordered[:-1]).mean(axis=0).max())
        if correlation > max(IN_TIME, 4 / len(ordered) ** 0.5):
            return [
                (
                    "time overlap",
                    f"The splits overlap in time, and {task.target} is alike in records that are close in "
                    f"{column.name!r} (correlation {correlation:.2f}): the test metrics are too good for a model that "
                    f"will predict the future. Test on the newest rows: --time {column.name}.",
                )
            ]
    return []


def _rare_classes(splits, task) -> list[tuple[str, str]]:
    if task.kind == "regression":
        return []
    train, test = (
        np.bincount(task.encode(part[splits.target]).long(), minlength=len(task.classes))
        for part in (splits.train, splits.test)
    )
    found = []
    rare = [i for i in range(len(train)) if train[i] < RARE * train.sum() / max(1, len(train) / 2)]
    if rare:
        shown = ", ".join(f"{task.classes[i]} ({train[i]} of {train.sum()} rows)" for i in rare[:5])
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        found.append(("rare classes", f"Rare in training: {shown}{more}. Look at recall and F1 rather than accuracy."))
    few = [i for i in range(len(test)) if test[i] < FEW_TEST]
    if few:
        shown = ", ".join(f"{task.classes[i]} ({test[i]})" for i in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        found.append(("few test records", f"Few test records of {shown}{more}: their metrics are uncertain."))
    return found
