"""`mova ask`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import Imports, Json, ModelPath, Weights, import_modules, location, weights_of
from pipelines.cli.output import emit, results_only


def ask(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[
        str,
        typer.Argument(help="What to ask about it; <image> in it says where a picture stands, if there are several."),
    ],
    model: ModelPath,
    also: Annotated[list[Path], typer.Option(help="One more picture file; may be given again.")] = [],  # noqa: B006
    store: Annotated[
        str | None,
        typer.Option(
            help="Feature store that is read first and kept up to date: a folder, or a URL.",
            parser=location,
        ),
    ] = None,
    router: Annotated[str, typer.Option(help="Who picks the experts: llm, or light where the model has one.")] = "llm",
    force: Annotated[
        str | None, typer.Option(help="Experts to use, comma-separated, instead of asking the router; 'none' for none.")
    ] = None,
    forbid: Annotated[str | None, typer.Option(help="Experts that may not be used, comma-separated.")] = None,
    max_experts: Annotated[int | None, typer.Option(help="Most experts to use.", min=0)] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Most that the experts may cost together: GFLOPs, or ms with --profile, or in the unit of --cost.",
            min=0,
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="What `mova profile` wrote of this CPU; makes --budget milliseconds."),
    ] = None,
    cost: Annotated[
        list[str],
        typer.Option(
            help="expert=COST per picture in a unit of your own; once for each (default: its GFLOPs, `mova experts`)."
        ),
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 64,
    weights: Weights = [],  # noqa: B006
    imports: Imports = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Ask about a picture; experts run in this process, and only those that the router picks."""
    with results_only():
        from dataclasses import asdict

        from mova_core.answering import Answerer, Question
        from mova_core.features import FeatureStore, LazyExperts, Tiered
        from mova_core.images import ImageRef
        from mova_core.model import MoVAForConditionalGeneration
        from mova_core.processing import MoVAProcessor

        import_modules(imports)
        loaded = MoVAForConditionalGeneration.from_pretrained(str(model))
        named = weights_of(weights, loaded.config.experts)
        source: Any = LazyExperts(
            loaded.config.experts,
            size=loaded.config.expert_size,
            weights=named,
            fingerprints=loaded.config.fingerprints,
            dtypes=loaded.config.feature_dtypes,
        )
        if store is not None:
            source = Tiered(FeatureStore(store, fingerprints=loaded.config.fingerprints, create=True), source)
        asked = Question(
            image=[ImageRef(path=path) for path in (image, *also)],
            text=question,
            experts=None if force is None else [name for name in force.split(",") if name and name != "none"],
            forbid=[name for name in (forbid or "").split(",") if name],
            max_experts=max_experts,
            budget=budget,
        )
        answerer = Answerer(
            loaded,
            MoVAProcessor.from_pretrained(str(model)),
            source,
            router=router,  # type: ignore[arg-type]  # it names a wrong one itself
            costs=None if budget is None else _costs(cost, profile, loaded.config),
        )
        [answer] = answerer.answer([asked], max_new_tokens)
        if isinstance(source, Tiered):
            source.close()

    def show() -> None:
        print(answer.text or "(the model said nothing)")
        said = (
            "forced"
            if answer.router is None
            else f"router said {answer.router!r}" + ("" if answer.readable else ", which names no expert")
        )
        print(f"\nexperts: {', '.join(answer.experts) or 'none'} ({said})")
        for block, gates in enumerate(answer.gates, 1):
            print(f"gate, block {block}: " + ", ".join(f"{name} {weight:.2f}" for name, weight in gates.items()))
        print("seconds: " + ", ".join(f"{step} {seconds:.3f}" for step, seconds in answer.seconds.items()))

    emit(asdict(answer), as_json, show)


def _costs(pairs: list[str], profile: Path | None, config: Any) -> dict[str, float]:
    """Expert of a model's pool -> cost per picture: as given, else in ms of this CPU as measured, else in GFLOPs."""
    import torch

    from mova_core.experts import expert_card
    from mova_core.experts.cost import count_flops, device_kind, read_profiles, shapes_of

    costs: dict[str, float] = {}
    if pairs:
        if profile is not None:
            raise typer.BadParameter("--cost and --profile are of different units: give one of them")
        for pair in pairs:
            name, _, cost = pair.partition("=")
            try:
                costs[name] = float(cost)
            except ValueError:
                raise typer.BadParameter(f"--cost {pair}: write NAME=NUMBER") from None
        fix = "give a --cost for each expert, or none for GFLOPs"
    elif profile is not None:
        device = device_kind(torch.device("cpu"))
        measured = [one for one in read_profiles(profile) if one.device == device]
        for name in config.experts:
            dtype = config.feature_dtypes.get(name, "float32")
            for one in measured:
                if one.expert == name and one.is_of(expert_card(name), config.expert_size, dtype):
                    costs[name] = 1000 / one.at(1).images_per_second
        fix = f"{profile} has none on {device} at size {config.expert_size}: run `mova profile` here"
    else:
        counted = {name: count_flops(shapes_of(name, config.expert_size)) for name in config.experts}
        costs = {name: flops / 1e9 for name, flops in counted.items() if flops is not None}
        fix = "its FLOPs cannot be counted: give a --cost for each expert"
    if unpriced := [name for name in config.experts if name not in costs]:
        raise typer.BadParameter(f"--budget: no cost of {', '.join(unpriced)}; {fix}")
    return costs
