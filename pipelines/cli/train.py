"""`mova train STAGE`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.options import BadRow, DataPath, ImagesPath, Json, Quiet, StorePath
from pipelines.cli.output import emit, results_only, table

app = typer.Typer(help="Train a stage as Ray Train workers reading the store.", no_args_is_help=True)


def _train_command(
    stage: Literal["pretrain", "sft", "router", "light-router"], doc: str, learning_rate: float, batch_size: int
) -> None:
    def command(
        data: DataPath,
        store: StorePath,
        model: Annotated[
            Path, typer.Option("--model", help="Folder of the model to start from.", exists=True, file_okay=False)
        ],
        output: Annotated[Path, typer.Option("--output", help="Folder the trained model goes to.")],
        images: ImagesPath = None,
        bad_rows: BadRow = "raise",
        learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = learning_rate,
        batch_size: Annotated[int, typer.Option(help="Samples per step over all workers.", min=1)] = batch_size,
        epochs: Annotated[
            float, typer.Option(help="Passes over the data, fractions allowed; at least one step is made.", min=0)
        ] = 1.0,
        workers: Annotated[int, typer.Option(help="Ray Train workers.", min=1)] = 2,
        gpu: Annotated[bool, typer.Option(help="One GPU per worker.")] = False,
        checkpoint_every: Annotated[int, typer.Option(help="Steps.", min=1)] = 200,
        max_length: Annotated[int, typer.Option(help="Longest sample, tokens.", min=1)] = 2048,
        loader_processes: Annotated[int, typer.Option(help="Reading processes per worker.", min=0)] = 0,
        lora_rank: Annotated[int, typer.Option(help="Rank of the expert-routing LoRA (router only).", min=1)] = 64,
        shuffle_pool: Annotated[bool, typer.Option(help="Model-pool augmentation (router only).")] = True,
        seed: Annotated[int, typer.Option(help="Order of the samples and of chance.")] = 0,
        fingerprint: Annotated[
            list[str],
            typer.Option(
                help="NAME=FINGERPRINT: which features to take where the store has several (`mova store ls`)."
            ),
        ] = [],  # noqa: B006
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        with results_only():
            from cluster.session import ray_session
            from mova_core.io.uris import absolute
            from pipelines.train.config import TrainConfig
            from pipelines.train.run import train

            config = TrainConfig(
                stage=stage,
                model=str(model.resolve()),
                data=str(data.resolve()),
                store=store,
                output=str(output.resolve()),
                images=None if images is None else absolute(images),
                bad_rows=bad_rows,
                learning_rate=learning_rate,
                batch_size=batch_size,
                epochs=epochs,
                workers=workers,
                gpu=gpu,
                checkpoint_every=checkpoint_every,
                max_length=max_length,
                loader_processes=loader_processes,
                lora_rank=lora_rank,
                shuffle_pool=shuffle_pool,
                seed=seed,
                fingerprints=dict(pair.split("=", 1) for pair in fingerprint if "=" in pair),
            )
            with ray_session():
                result = train(config, progress=not quiet)
        emit(
            result,
            as_json,
            lambda: table(
                f"{stage} finished",
                ["", ""],
                [[key, str(len(value) if key == "skipped" else value)] for key, value in result.items()],
            ),
        )

    app.command(stage, help=doc)(command)


_train_command("pretrain", "Stage 1: MoV-Adapter and base encoder learn, the LLM is frozen.", 2e-4, 1024)


_train_command("sft", "Stage 2: everything but the experts learns.", 2e-5, 128)


_train_command("router", "The expert-routing LoRA learns from routing labels (see `mova label`).", 2e-4, 128)


_train_command(
    "light-router",
    "The light router (`mova ask --router light`) learns from the same labels; fixed pool, no LLM pass.",
    1e-3,
    128,
)
