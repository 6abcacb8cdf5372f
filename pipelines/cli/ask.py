"""`mova ask`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import (
    EXPERTS,
    ROUTING,
    Imports,
    Json,
    ModelPath,
    NameValue,
    Quiet,
    Weights,
    by_expert,
    cost_number,
    import_modules,
    name_value,
    names_list,
    path_or_url,
    weights_location,
)
from pipelines.cli.output import print_result, results_only


def ask(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Picture file, a path or a URL.", parser=path_or_url)],
    question: Annotated[
        str,
        typer.Argument(help="The question; <image> in it marks where a picture stands, if there are several."),
    ],
    model: ModelPath,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGE", help="One more picture, a path or a URL; repeatable.", parser=path_or_url),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 64,
    router: Annotated[
        str, typer.Option(help="Who picks the experts: llm, or light where the model has one.", rich_help_panel=ROUTING)
    ] = "llm",
    force: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...|none",
            help="Experts to use, comma-separated, instead of asking the router; none for no expert.",
            rich_help_panel=ROUTING,
        ),
    ] = None,
    forbid: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Experts that may not be used, comma-separated.", rich_help_panel=ROUTING
        ),
    ] = None,
    max_experts: Annotated[
        int | None, typer.Option(help="Most experts to use.", min=0, rich_help_panel=ROUTING)
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Most that the experts may cost together: GFLOPs, or ms with --profile, or in the unit of --cost.",
            min=0,
            rich_help_panel=ROUTING,
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="File of `mova profile` of this CPU; makes --budget milliseconds.",
            exists=True,
            dir_okay=False,
            rich_help_panel=ROUTING,
        ),
    ] = None,
    cost: Annotated[
        list[NameValue] | None,
        typer.Option(
            metavar="NAME=COST",
            help="Cost of an expert per picture in a unit of your own, once for each expert (default: its GFLOPs).",
            parser=name_value,
            rich_help_panel=ROUTING,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_URL",
            help="Feature store that is read first; features computed here are added to it.",
            parser=path_or_url,
            rich_help_panel=EXPERTS,
        ),
    ] = None,
    weights: Weights = None,
    imports: Imports = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask about a picture; experts run in this process, and only those that the router picks."""
    with results_only(quiet or as_json):
        from dataclasses import asdict

        from mova_core.answering import Answerer, Question
        from mova_core.experts.cost import expert_costs
        from mova_core.features import FeatureStore, LazyExperts, Tiered
        from mova_core.images import ImageRef
        from mova_core.model import MoVAForConditionalGeneration
        from mova_core.processing import MoVAProcessor

        import_modules(imports)
        loaded = MoVAForConditionalGeneration.from_pretrained(str(model))
        config = loaded.config
        source: Any = LazyExperts(
            config.experts,
            size=config.expert_size,
            weights=by_expert("--weights", weights, config.experts, weights_location),
            fingerprints=config.fingerprints,
            dtypes=config.feature_dtypes,
        )
        costs = None
        if budget is not None:
            stated = by_expert("--cost", cost, config.experts, cost_number)
            try:
                costs = expert_costs(config.experts, config.expert_size, config.feature_dtypes, stated, profile)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        if store is not None:
            source = Tiered(FeatureStore(store, fingerprints=config.fingerprints, create=True), source)
        asked = Question(
            image=[ImageRef(path=path) for path in (image, *(also or ()))],
            text=question,
            experts=None if force is None else [name for name in names_list(force) if name != "none"],
            forbid=names_list(forbid),
            max_experts=max_experts,
            budget=budget,
        )
        answerer = Answerer(
            loaded,
            MoVAProcessor.from_pretrained(str(model)),
            source,
            router=router,  # type: ignore[arg-type]  # it names a wrong one itself
            costs=costs,
        )
        [answer] = answerer.answer([asked], max_new_tokens)
        if isinstance(source, Tiered):
            source.close()
    print_result(asdict(answer), as_json, lambda: _show(answer))


def _show(answer: Any) -> None:
    print(answer.text or "(the model said nothing)")
    if answer.router is None:
        choice = "forced"
    else:
        choice = f"router said {answer.router!r}" + ("" if answer.readable else ", which names no expert")
    print(f"\nexperts: {', '.join(answer.experts) or 'none'} ({choice})")
    for block, gates in enumerate(answer.gates, 1):
        if gates:
            print(f"gate, block {block}: " + ", ".join(f"{name} {weight:.2f}" for name, weight in gates.items()))
    print("seconds: " + ", ".join(f"{step} {seconds:.3f}" for step, seconds in answer.seconds.items()))
