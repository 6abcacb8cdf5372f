"""`mova experts`."""

from collections.abc import Sequence
from typing import Any

from pipelines.cli.options import Imports, Json, OptionalSize, PoolOfModel, Quiet, expert_settings, import_modules
from pipelines.cli.output import print_result, results_only, table


def experts(
    model: PoolOfModel = None,
    size: OptionalSize = None,
    imports: Imports = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the pool: parameters, input, grid, channels, GFLOPs and bytes per picture of each expert, and its weights."""
    with results_only(quiet or as_json):
        from mova_core.experts import BASE, EXPERTS, expert_names, found_here
        from mova_core.experts.cost import count_flops, shapes_of

        import_modules(imports)
        settings = expert_settings(model, None, size, None)
        pool, listed = list(EXPERTS), list(expert_names())
        if model is not None:
            pool, listed = settings.names, [BASE, *settings.names]
        rows: list[dict[str, Any]] = []
        for name in listed:
            expert = shapes_of(name, settings.size)
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

    print_result(rows, as_json, lambda: show_experts(rows, settings.size, pool))


def show_experts(rows: Sequence[dict[str, Any]], size: str, pool: Sequence[str]) -> None:
    """Experts, for people, with the letters of a pool in routing order."""
    from mova_core.experts import BASE
    from mova_core.routing import LETTERS

    def letter(name: str) -> str:
        """The expert's letter in the routing prompt."""
        return "base" if name == BASE else LETTERS[pool.index(name)] if name in pool else "own"

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
