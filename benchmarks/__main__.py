"""`python -m benchmarks [NAME …]`: run the benchmarks and write a report (Markdown and JSON).

python -m benchmarks                          # all of them, on the embedded model
python -m benchmarks decode collect --quick   # some, small
python -m benchmarks --model llama-3-8b --device cuda --dtype bfloat16 decode collect growth
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import transformers

from benchmarks import harness
from npti_interp._files import write_atomic
from npti_interp.backends._kernels import keep_heap

BENCHMARKS = ("decode", "collect", "select", "sweep", "locate", "growth", "limit")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of report.md and report.json")
    harness.add_arguments(parser)
    args = parser.parse_args()
    if unknown := sorted({*args.names} - {*BENCHMARKS}):
        parser.error(f"no benchmark is called {', '.join(unknown)}")
    setting = harness.Setting(args.model, args.device, args.dtype, args.repeats, args.quick)
    keep_heap()
    transformers.logging.set_verbosity_error()
    sections: dict[str, harness.Section] = {}
    for name in args.names or BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        sections[name] = importlib.import_module(f"benchmarks.{name}").run(setting)
        print(sections[name].markdown(), flush=True)
        text, data = harness.report(setting, sections)  # after each: a long run that is stopped has lost nothing
        write_atomic(args.out / "report.md", lambda p, t=text: p.write_text(t, encoding="utf-8"))
        content = json.dumps(data, indent=1) + "\n"
        write_atomic(args.out / "report.json", lambda p, t=content: p.write_text(t, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
