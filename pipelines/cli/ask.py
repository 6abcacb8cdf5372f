"""`mova ask`: one question, several, or a conversation about one picture; the model is loaded once."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mova_core.figures import number
from mova_core.io.uris import is_url
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
    weights_location,
)
from pipelines.cli.output import line, print_result, results_only
from pipelines.cli.paths import input_file, path_or_url
from pipelines.model_config import read_model_config


def ask(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Picture file, a path or a URL.", parser=path_or_url)],
    model: ModelPath,
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUESTION]...",
            help="Questions about the picture, each answered by itself; <image> in a question marks where a picture "
            "stands, if there are several.",
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            "-i",
            help="Read questions from the terminal, one per line, as one conversation; an empty line or Ctrl-D ends it.",
        ),
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGE", help="One more picture, a path or a URL; repeatable.", parser=path_or_url),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 64,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the model and the experts run.")] = "cpu",
    router: Annotated[
        Literal["llm", "light"],
        typer.Option(help="Who picks the experts: llm, or light where the model has one.", rich_help_panel=ROUTING),
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
            metavar="FILE",
            help="File of `mova profile` of this CPU; makes --budget milliseconds.",
            parser=input_file,
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
    silent, pictures, texts = quiet or as_json, [image, *(also or ())], list(questions or ())
    if interactive and as_json:
        raise typer.BadParameter("--interactive prints for people: leave --json out")
    if not texts and not interactive:
        raise typer.BadParameter("give a QUESTION, or --interactive")
    for path in pictures:
        if not is_url(path) and "#" not in path and not Path(path).is_file():  # "#": a member of a tar or Parquet file
            raise typer.BadParameter(f"no picture {path}")
    with results_only(silent):
        import_modules(imports)
        config = read_model_config(model)
        pool = [expert["name"] for expert in config.get("pool", [])]
        weights_by_expert = by_expert("--weights", weights, pool, weights_location)
        forced = (
            None if force is None else _of_pool("--force", [name for name in names_list(force) if name != "none"], pool)
        )
        forbidden = _of_pool("--forbid", names_list(forbid), pool)
        if router == "light" and not config.get("light_router"):
            raise typer.BadParameter(
                f"--router light: {model} has no light router; `mova train light-router` trains one"
            )
        stated_costs = by_expert("--cost", cost, pool, cost_number)
        costs = None if budget is None else _costs(config, stated_costs, profile)
        answerer = _load(model, device, router, store, weights_by_expert, costs)

        from mova_core.answering import Question
        from mova_core.features import Tiered
        from mova_core.images import ImageRef

        images = [ImageRef(path=path) for path in pictures]

    def answer_to(text: str, history: Sequence[tuple[str, str]] = ()) -> Any:
        question = Question(
            image=images,
            text=text,
            history=history,
            experts=forced,
            forbid=forbidden,
            max_experts=max_experts,
            budget=budget,
        )
        with results_only(silent):
            return answerer.answer([question], max_new_tokens)[0]

    with answerer.source if isinstance(answerer.source, Tiered) else contextlib.nullcontext():
        answers = []
        for text in texts:
            answers.append(answer_to(text))
            if not as_json:
                if len(texts) > 1:
                    print(f"\n> {text}")
                show_answer(answers[-1])
        if interactive:
            _converse(answer_to, list(zip(texts, answers, strict=True)))
    if as_json:
        documents = [{"question": text, **asdict(answer)} for text, answer in zip(texts, answers, strict=True)]
        print_result(asdict(answers[0]) if len(answers) == 1 else documents, as_json, lambda: None)


def _of_pool(option: str, names: list[str], pool: list[str]) -> list[str]:
    """Names of an option, which must be experts of the model."""
    if unknown := sorted(set(names) - set(pool)):
        raise typer.BadParameter(f"{option} {', '.join(unknown)}: the model's experts are {', '.join(pool)}")
    return names


def _costs(config: dict[str, Any], stated: dict[str, float], profile: Path | None) -> dict[str, float]:
    """Expert of the model's pool -> cost per picture, see `expert_costs`."""
    from mova_core.experts.cost import expert_costs

    dtypes = {expert["name"]: expert["dtype"] for expert in config["pool"] if expert.get("dtype")}
    try:
        return expert_costs(
            [expert["name"] for expert in config["pool"]], config.get("expert_size", "full"), dtypes, stated, profile
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _load(
    model: Path,
    device: str,
    router: str,
    store: str | None,
    weights: dict[str, str],
    costs: dict[str, float] | None,
) -> Any:
    """The model with its experts behind a feature store, if there is one, ready to answer."""
    import torch

    from mova_core.answering import Answerer
    from mova_core.features import FeatureStore, LazyExperts, Tiered
    from mova_core.model import MoVAForConditionalGeneration
    from mova_core.processing import MoVAProcessor

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: this PyTorch sees no GPU")
    loaded = MoVAForConditionalGeneration.from_pretrained(str(model))
    torch.nn.Module.to(loaded, device)
    config = loaded.config
    source: Any = LazyExperts(
        config.experts,
        size=config.expert_size,
        weights=weights,
        fingerprints=config.fingerprints,
        device=device,
        dtypes=config.feature_dtypes,
    )
    if store is not None:
        source = Tiered(FeatureStore(store, fingerprints=config.fingerprints, create=True), source)
    processor = MoVAProcessor.from_pretrained(str(model))
    return Answerer(loaded, processor, source, router=router, costs=costs)  # type: ignore[arg-type]  # refuses a wrong router


def _converse(answer_to: Callable[..., Any], said: Sequence[tuple[str, Any]]) -> None:
    """Answers questions read from the terminal, each with the whole conversation before it."""
    history = [turn for text, answer in said for turn in (("user", text), ("assistant", answer.text))]
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:  # Ctrl-D, or the end of a pipe
            return
        except KeyboardInterrupt:
            print()
            raise typer.Exit(130) from None
        if not text:
            return
        try:
            answer = answer_to(text, tuple(history))
        except ValueError as error:  # such as a conversation that is too long for the LLM
            print(f"mova: {error}")
            continue
        show_answer(answer)
        history += [("user", text), ("assistant", answer.text)]


def show_answer(answer: Any) -> None:
    """An `Answer`, for people."""
    print(answer.text or "(the model said nothing)")
    if answer.router is None:
        choice = "forced"
    else:
        choice = f"router said {answer.router!r}" + ("" if answer.readable else ", which names no expert")
    print()
    line(f"experts: {', '.join(answer.experts) or 'none'} ({choice})")
    if answer.over_budget:
        costs = ", ".join(f"{name} (cost {number(cost)})" for name, cost in answer.over_budget.items())
        line(f"left out, as --budget did not pay for them: {costs}")
    for block, gates in enumerate(answer.gates, 1):
        if gates:
            line(f"gate, block {block}: " + ", ".join(f"{name} {number(weight)}" for name, weight in gates.items()))
    line("seconds: " + ", ".join(f"{step} {number(seconds)}" for step, seconds in answer.seconds.items()))
