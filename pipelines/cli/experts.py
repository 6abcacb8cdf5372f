"""`mova experts`."""

from typing import Any

from pipelines.cli.options import Imports, Json, Size, import_modules
from pipelines.cli.output import emit, rounded, table


def experts(size: Size = "full", imports: Imports = [], as_json: Json = False) -> None:  # noqa: B006
    """List the pool: parameters, input, grid, channels, GFLOPs and bytes per picture of each expert, and its weights."""
    from mova_core.experts import BASE, EXPERTS, expert_names, found_here
    from mova_core.experts.cost import count_flops, shapes_of
    from mova_core.routing import LETTERS

    import_modules(imports)
    rows: list[dict[str, Any]] = []
    for name in expert_names():
        expert = shapes_of(name, size)
        card, (height, width), channels = expert.card, expert.grid, expert.channels
        rows.append(
            {
                "expert": name,
                "title": card.title,
                "parameters": sum(p.numel() for p in expert.parameters()),
                "input": expert.arch.get("image_size"),
                "grid": [height, width],
                "channels": channels,
                "flops": count_flops(expert),
                "bytes": 2 * height * width * channels,
                "weights": card.weights,
                "weights_here": found_here(card.weights),
            }
        )

    def option(name: str) -> str:
        return "base" if name == BASE else LETTERS[EXPERTS.index(name)] if name in EXPERTS else "own"

    def show() -> None:
        table(
            f"vision experts, size {size}; per picture: GFLOPs (a multiply-add is two), KB of features in bfloat16",
            ["", "expert", "network", "M params", "px", "grid", "chan.", "GFLOPs", "KB", "here", "public weights"],
            [
                [
                    option(row["expert"]),
                    row["expert"],
                    row["title"],
                    round(row["parameters"] / 1e6, 1),
                    row["input"],
                    "x".join(map(str, row["grid"])),
                    row["channels"],
                    "?" if row["flops"] is None else rounded(row["flops"] / 1e9),
                    round(row["bytes"] / 1e3),
                    "yes" if row["weights_here"] else "no",
                    row["weights"],
                ]
                for row in rows
            ],
        )

    emit(rows, as_json, show)
