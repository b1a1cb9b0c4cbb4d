"""Measure rows per second and peak memory of `predict.py`, start of the process included.

  python benchmarks/predict_speed.py

The input is a csv with 20 numbers per row and 10,000 to 1,000,000 rows. The baseline, in a process of its own with the
same imports, is pandas.read_csv, `Pipeline.predict` on the whole table, and DataFrame.to_csv.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMAND = "import predict, errors; sys.argv[0] = 'predict.py'; "
COMMAND += "predict.predict(errors.parse_flags(predict.Options, description=''))"
BASELINE = """import pandas as pd; from pipeline import Pipeline
Pipeline.load(sys.argv[2]).predict(pd.read_csv(sys.argv[4])).to_csv(sys.argv[6], index=False)"""


def measure(code: str, arguments: list[str]) -> tuple[float, float]:
    """Run code in another process; return (its seconds, its peak memory in MB)."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}\nprint(open('/proc/self/status').read())"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    return seconds, int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    import numpy as np
    import pandas as pd

    from config import DataConfig, RunConfig, TrainConfig
    from train import train

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"x{i}" for i in range(20)]
        table = pd.DataFrame(generator.standard_normal((2000, 20)), columns=names)
        table["y"] = (table.sum(axis=1) > 0).astype(int)
        out = RunConfig(out=f"{folder}/run")
        train(DataConfig(target="y"), training=TrainConfig(epochs=2), run=out, table=table)
        print(f"\n{'rows':>9}  {'predict.py':>34}  {'pandas':>34}")
        for rows in (10_000, 100_000, 1_000_000):
            with open(f"{folder}/in.csv", "w") as file:
                for start in range(0, rows, 10_000):
                    part = pd.DataFrame(generator.standard_normal((10_000, 20)), columns=names)
                    part.to_csv(file, index=False, header=start == 0, float_format="%.7g")
            files = ["--checkpoint", f"{folder}/run/best.pt"]
            files += ["--input", f"{folder}/in.csv", "--output", f"{folder}/out.csv"]
            cells = [f"{rows:>9,}"]
            for code in (COMMAND, BASELINE):
                seconds, memory = measure(code, files)
                assert sum(1 for _ in open(f"{folder}/out.csv")) == rows + 1
                cells.append(f"{seconds:5.1f} s {rows / seconds:9,.0f} rows/s {memory:6.0f} MB")
            print("  ".join(cells))


if __name__ == "__main__":
    main()
