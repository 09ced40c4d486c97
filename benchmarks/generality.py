"""Returns of learners that a dataset was never distilled with: a table of RESULTS.md, by the rule that each dataset recommends.

    python benchmarks/generality.py cartpole_5d halfcheetah --learners 50

Returns are kept in benchmarks/generality.json; the table holds all that is kept there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import marked

from lightning_distill import evaluate_all, load
from lightning_distill.families import FAMILIES, HELD_OUT, TRAINED_ON, families_apart
from lightning_distill.matching import trained_family
from lightning_distill.returns import IN_DISTRIBUTION, as_returns

RECORD = Path(__file__).with_suffix(".json")


def measured(name: str, learners: int, threads: int) -> dict[str, Any]:
    """{family: what is stated of its returns with sampled actions}."""
    dataset = load(name)
    trained = trained_family(dataset)
    families = {IN_DISTRIBUTION: trained, **families_apart({name: FAMILIES[name] for name in HELD_OUT}, trained)}
    rules = {"step_rules": [dataset.step_rule], "kinds": ["sampled"], "controls": False}
    returns = as_returns(evaluate_all(dataset, families, learners=learners, threads=threads, **rules))
    return {family: kinds["sampled"] for family, kinds in returns.items()}


def table(found: dict[str, dict[str, Any]]) -> str:
    # Of a family that was drawn while distilling the entry says so.
    found = {
        name: {family.removesuffix(TRAINED_ON): entry for family, entry in returns.items()}
        for name, returns in found.items()
    }
    rows = []
    for family in (IN_DISTRIBUTION, *HELD_OUT):
        row = [family.replace("_", " ")]
        for returns in found.values():
            entry, reference = returns[family], returns[IN_DISTRIBUTION]["mean"]
            row += [f"{entry['mean']:.0f} ± {entry['ci95']:.0f}", f"{entry['mean'] / reference:.0%}"]
        rows.append(row)
    at_least = [sum(r[f]["mean"] >= 0.9 * r[IN_DISTRIBUTION]["mean"] for f in HELD_OUT) for r in found.values()]
    rows.append(["**families at 90 % or more**", *(cell for n in at_least for cell in (f"{n} of {len(HELD_OUT)}", ""))])
    return marked.table(["family", *(cell for name in found for cell in (f"`{name}`", "share"))], rows)


def kept() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", help="names in the zoo; none: only write the table again")
    parser.add_argument("--learners", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in args.datasets:
        new = {name: measured(name, args.learners, args.threads)}
        RECORD.write_text(json.dumps(dict(sorted((kept() | new).items())), indent=1) + "\n")
    marked.write("generality", table(kept()))


if __name__ == "__main__":
    main()
