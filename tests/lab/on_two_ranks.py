"""What torchrun starts in tests: one run, or a sweep, by all processes together."""

import json
import sys
from pathlib import Path

from twofold.lab import ranks
from twofold.lab.config import RunConfig
from twofold.lab.runs import RunDirectory
from twofold.lab.sweep import sweep
from twofold.lab.training import train


def main(what: str, out: str, data_dir: str, configs: str) -> None:
    wanted = [RunConfig.from_dict(values) for values in json.loads(configs)]
    if what == "sweep":
        result = sweep(wanted, Path(out), data_dir=Path(data_dir))
        told = [len(result.finished), len(result.diverged), dict(result.failed), result.reused]
        (Path(out) / f"rank-{ranks.rank(ranks.join(2, 'cpu'))}.json").write_text(json.dumps(told))
        return
    for config in wanted:

        def tell(row: dict[str, float]) -> None:
            if ranks.is_first():
                print(row["epoch"], flush=True)

        train(config, data_dir=Path(data_dir), directory=RunDirectory(Path(out), config), progress=tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
