"""Try a great many bad inputs on everything that reads files from elsewhere.

    python -m tests.fuzz [--inputs 100000] [--seconds 7200] [--targets image,tar] [--seed 0] [--out fuzz-out]
    python -m tests.fuzz --replay fuzz-out/failures/tar-0123456789ab.bin

Coverage-guided: an input that makes the readers take a new step is kept and mangled further. A worker process does the
reading, so crashes and hangs of native code are found too. Exit code 1 when something was not handled as promised; the
inputs that show it are kept. `--out` of an earlier run is continued with what it had kept; one that ended early goes
on where it was. Another `--seed` tries other inputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import clipdistill.data
from clipdistill.data.class_names import imagenet_wnids
from tests.fuzz.cache_targets import cache_targets
from tests.fuzz.engine import fuzz, replay, write_result
from tests.fuzz.own_targets import own_targets
from tests.fuzz.run_targets import run_targets
from tests.fuzz.targets import targets


def read_files() -> list[Path]:
    """The modules whose coverage guides the fuzzer."""
    folder = Path(clipdistill.data.__file__).parent
    others = ("cache/*.py", "runs/*.py", "report/data.py", "statistics/scores.py", "search/store.py")
    return sorted([*folder.rglob("*.py"), *(path for name in others for path in folder.parent.glob(name))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--targets", help="names separated by commas (default: all)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, help="try one kept input again and say what happens")
    arguments = parser.parse_args()
    every = {target.name: target for target in (*targets(), *cache_targets(), *run_targets(), *own_targets())}
    if arguments.replay is not None:
        name = arguments.replay.stem.rpartition("-")[0]
        kind, detail = replay(every[name], arguments.replay.read_bytes())
        print(f"{name}: {kind}\n{detail}")
        return int(kind not in ("accepted", "refused"))
    names = arguments.targets.split(",") if arguments.targets else list(every)
    unknown = sorted(set(names) - set(every))
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(every)}")
    imagenet_wnids()  # loads timm here, not in every worker
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = fuzz(
        [every[name] for name in names],
        read_files(),
        out,
        inputs=arguments.inputs,
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    write_result(result, out)
    print(f"{result.tried} inputs in {result.seconds:.0f} s: {result.accepted} accepted, {result.refused} refused")
    print("  " + ", ".join(f"{name} {count}" for name, count in result.by_target.items()))
    run, there = (sum(pair[k] for pair in result.lines.values()) for k in (0, 1))
    if there:
        print(f"{run} of {there} lines of the readers run ({run / there:.0%}), {result.edges} steps between lines,")
        print(f"{result.kept} inputs kept because they reached something new")
        for file, (seen, whole) in result.lines.items():
            print(f"  {Path(file).stem:16s} {seen:4d} of {whole}")
    for failure in result.failures:
        print(f"FAILED {failure.target}: {failure.kind}: {failure.detail} ({failure.input})")
    print(f"{len(result.failures)} failures")
    return int(bool(result.failures) or result.tried == 0)


if __name__ == "__main__":
    sys.exit(main())
