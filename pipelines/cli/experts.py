"""`mova experts`."""

from collections.abc import Sequence
from typing import Any

from pipelines.cli.options import Imports, Json, Quiet, Size, import_modules
from pipelines.cli.output import print_result, results_only, table


def experts(size: Size = "full", imports: Imports = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """List the pool: parameters, input, grid, channels, GFLOPs and bytes per picture of each expert, and its weights."""
    with results_only(quiet or as_json):
        from mova_core.experts import expert_names, found_here
        from mova_core.experts.cost import count_flops, shapes_of

        import_modules(imports)
        rows: list[dict[str, Any]] = []
        for name in expert_names():
            expert = shapes_of(name, size)
            card, (height, width), channels = expert.card, expert.grid, expert.channels
            rows.append(
                {
                    "expert": name,
                    "title": card.title,
                    "parameters": sum(parameter.numel() for parameter in expert.parameters()),
                    "input": expert.arch.get("image_size"),
                    "grid": [height, width],
                    "channels": channels,
                    "flops": count_flops(expert),
                    "bytes": 2 * height * width * channels,
                    "weights": card.weights,
                    "weights_here": found_here(card.weights),
                }
            )

    print_result(rows, as_json, lambda: show_experts(rows, size))


def show_experts(rows: Sequence[dict[str, Any]], size: str) -> None:
    """The pool, for people."""
    from mova_core.experts import BASE, EXPERTS
    from mova_core.routing import LETTERS

    def letter(name: str) -> str:
        """The expert's letter in the routing prompt of the published pool."""
        return "base" if name == BASE else LETTERS[EXPERTS.index(name)] if name in EXPERTS else "own"

    table(
        f"vision experts, size {size}; per picture: GFLOPs (a multiply-add is two), KB of features in bfloat16",
        ["", "expert", "network", "M params", "px", "grid", "chan.", "GFLOPs", "KB", "here", "public weights"],
        [
            [
                letter(row["expert"]),
                row["expert"],
                row["title"],
                row["parameters"] / 1e6,
                row["input"],
                "x".join(map(str, row["grid"])),
                row["channels"],
                None if row["flops"] is None else row["flops"] / 1e9,
                row["bytes"] / 1e3,
                row["weights_here"],
                row["weights"],
            ]
            for row in rows
        ],
        drop=["public weights", "network", "chan.", "px"],
    )
