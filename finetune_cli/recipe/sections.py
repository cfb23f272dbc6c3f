"""The sections of a recipe, one class each; the field docstrings are the reference."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from finetune_cli.methods import AnyMethod
from finetune_cli.spec import InputPath, OneOrMany, OneOrNamed, Spec

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[float, Field(gt=0)]
"""A number of optimiser steps; below 1 it is a share of the run."""


Path = Annotated[str, InputPath()]


class Model(Spec):
    """Which model is trained, and in which form it is loaded."""

    shorthand: ClassVar = "name_or_path"

    name_or_path: Path
    """A hub id, a folder, an adapter folder (its base is loaded with it), a `.gguf` file, or `builtin:NAME`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    starting_adapter: Literal["continue", "merge"] = "continue"
    """What becomes of an adapter that `name_or_path` names: it is trained further, or merged into its base, and `lora:`
    (or the whole model) starts anew on that. The merged base is kept in the run folder, under `base`."""
    new_tokens: Annotated[list[str], OneOrMany()] | None = None
    """Tokens that the tokenizer gets beside its own, markers of a chat template say; adapters train their embedding."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the *frozen* weights. `auto` follows `train.precision`; trained weights are float32."""
    attn_implementation: Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"] = "auto"
    """Kernel of the attention."""
    layout: Literal["auto", "padded"] = "auto"
    """`auto`: rows end to end without padding, where the model can. `padded`: the stock forward, to distrust ours."""
    chat_template: Path | None = None
    """A Jinja file to use in place of the tokenizer's own chat template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Lora(Spec):
    """Low-rank adapters (arXiv 2106.09685). Present: adapters are trained. Absent: all weights are."""

    r: Positive = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update: it is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""
    target_modules: str | list[str] = "all-linear"
    """Names, or one regular expression, of the layers that get an adapter."""
    exclude_modules: str | list[str] | None = None
    """Names, or one regular expression, of layers that get none although `target_modules` names them."""
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the blocks that get adapters, from 0; all where it is not given."""
    rank_pattern: dict[str, Positive] = {}
    """Another `r` for layers, by name or regular expression: `{down_proj: 32}`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Another `lora_alpha` for layers, in the same way."""
    modules_to_save: Annotated[list[str], OneOrMany()] | None = None
    """Layers trained in full and saved with the adapter."""
    trainable_token_indices: list[int | str] | None = None
    """Tokens, by id or as they are written, whose rows of embedding and head are trained and saved with the adapter.
    Those of `model.new_tokens` always are."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (arXiv 2402.09353)."""
    init_lora_weights: bool | str = True
    """Initialisation, as peft names it: true, false, gaussian, pissa, olora or orthogonal."""


class Quantization(Spec):
    """Frozen weights in 4 or 8 bits (bitsandbytes). With `lora:` this is QLoRA (arXiv 2305.14314)."""

    load_in_4bit: bool = False
    """4-bit weights."""
    load_in_8bit: bool = False
    """8-bit weights."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit number format."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too: 0.4 bit a weight less."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the multiplications; `auto` follows `train.precision`."""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("set exactly one of load_in_4bit and load_in_8bit to true")
        return self


class Source(Spec):
    """One set of rows."""

    shorthand: ClassVar = "path"

    path: Path
    """A .json, .jsonl, .csv or .parquet file, a folder written by `save_to_disk`, or a hub id."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set or a saved folder; `train` where it is not given."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its rows are seen relative to their number: 2 is twice an epoch, 0.5 a half that `seed`
    draws."""
    columns: dict[str, str] | None = None
    """Our column name -> the name in the file: `{messages: conversations}`."""
    roles: dict[str, Annotated[list[str], OneOrMany()]] | None = None
    """Our role -> the names in the file: `{assistant: [bot]}`."""


class Data(Spec):
    """The rows: where from, how long, what is held out."""

    shorthand: ClassVar = "train"

    train: Annotated[list[Source], OneOrMany(), Field(min_length=1)]
    """The rows to train on."""
    eval_sets: Annotated[dict[str, Source], OneOrNamed()] | None = None
    """Rows to evaluate on: one set, or several by name. The reader keeps the one set under the name ""."""
    eval_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of `train` held out for evaluation, drawn by `seed`."""
    max_length: Positive = 2048
    """Longest row, in tokens."""
    overlength: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer rows: they are dropped, lose the end of their answer, or stop the run. Always counted."""
    max_dropped_fraction: Share = 0.05
    """More rows dropped than this, for any cause, is an error."""
    shuffle: bool = True
    """A new order each epoch, by `seed`; false keeps the order of the file."""
    template_mismatch: Literal["refuse", "inference", "render"] = "refuse"
    """For templates whose generation prompt is not in the rendered turn: refuse the row, train prompt + answer + stop
    as inference sees them, or train what the template renders."""

    @model_validator(mode="after")
    def _evaluated_once(self) -> Self:
        for name, source in (self.eval_sets or {}).items():
            if source.weight > 1:
                where = f"eval_sets.{name}".rstrip(".")
                raise ValueError(f"{where}: weight above 1 would count rows of an evaluation set more than once")
        return self


class Train(Spec):
    """The optimisation."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the rows; `max_steps` overrides it."""
    max_steps: Positive | None = None
    """Optimiser steps, whatever the number of epochs."""
    per_device_train_batch_size: Positive | Literal["auto"] = 1
    """Rows (pairs; bins when packed) in one forward of one process; `auto`: as many of the longest as fit into memory,
    tried before the first step. The rows of a step stay those of `global_batch_size`."""
    global_batch_size: Positive | Literal["auto"] = "auto"
    """Rows in one optimiser step over all processes; the accumulation follows from it."""
    gradient_accumulation_steps: Positive | None = None
    """Forwards in one optimiser step; not together with `global_batch_size`."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate; `auto` is chosen by method and by LoRA or full."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    """Course of the learning rate after the warmup."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the schedule, as transformers names them."""
    warmup_ratio: Share = 0.03
    """Share of the run over which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same in steps; overrides `warmup_ratio`."""
    optim: str = "adamw_torch_fused"
    """Optimiser, by transformers' name."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of weight matrices; biases and norms have none."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 turns it off."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in backward: less memory, about a quarter slower. Never reentrant."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """fp32: all weights float32. bf16: frozen weights bfloat16, trained weights float32. fp16: the same, scaled."""

    @model_validator(mode="after")
    def _one_batch_rule(self) -> Self:
        if self.global_batch_size != "auto" and self.gradient_accumulation_steps is not None:
            raise ValueError("global_batch_size and gradient_accumulation_steps exclude each other; keep one")
        if self.per_device_train_batch_size == "auto" and self.global_batch_size == "auto":
            raise ValueError("per_device_train_batch_size: auto needs a number for global_batch_size")
        return self


class Eval(Spec):
    """Evaluation while training. It happens where there are rows for it, first before step 1, last at the end."""

    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """Every `eval_steps`, every epoch, or never."""
    eval_steps: Steps = 0.1
    """Steps between evaluations; below 1 a share of the run."""
    per_device_eval_batch_size: Positive | None = None
    """Rows in one forward; the training batch size where it is not given."""
    sample_prompts: Annotated[int, Field(ge=0)] = 3
    """Prompts answered at every evaluation, to be read."""
    metric: Path | None = None
    """What generated answers are judged by: exact_match, json_match or file.py:function."""
    metric_rows: Positive = 100
    """Rows of each evaluation set that the metric is taken on."""


class Generation(Spec):
    """How answers are generated for samples; metrics are always greedy."""

    max_new_tokens: Positive = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability mass that is drawn from."""


class Save(Spec):
    """Checkpoints and the result."""

    save_steps: Steps = 0.1
    """Steps between checkpoints; below 1 a share of the run."""
    save_total_limit: Positive | None = 3
    """Checkpoints kept; the best and the last always are."""
    load_best_model_at_end: bool | Literal["auto"] = "auto"
    """The result is the best checkpoint by eval (metric where there is one, else loss); `auto`: where rows allow it."""
    push_to_hub: bool = False
    """Upload the result."""
    hub_model_id: str | None = None
    """Repository to upload to, `owner/name` or a name; the name of the run folder where it is not given."""
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "checkpoint"
    """Upload the result at the end; also the model at every save; with it the newest checkpoint, under last-checkpoint,
    to resume from; or every checkpoint under its own name."""
    hub_private_repo: bool = True
    """Whether a new repository is private."""


class Logging(Spec):
    """Numbers while it runs."""

    logging_steps: Steps = 5
    """Steps between lines; below 1 a share of the run."""
    report_to: Annotated[list[str], OneOrMany()] = ["tensorboard"]
    """Trackers: tensorboard, wandb, mlflow, or whatever accelerate can track; `none` for none."""
    run_name: str | None = None
    """Name of the run in trackers."""
    project: str | None = None
    """Project in trackers; where it is not given their own WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else finetune."""


class Launch(Spec):
    """Processes and machines."""

    num_processes: Positive | Literal["auto"] = "auto"
    """Processes on this machine; `auto` is one for each GPU, or one."""
    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed-zero3"] = "auto"
    """How several processes share the work: with `ddp` each holds all weights, with `fsdp2` and `deepspeed-zero3` (the
    extra `deepspeed`) a piece of each."""
    num_machines: Positive = 1
    """Machines of the job."""
    machine_rank: Annotated[int, Field(ge=0)] | None = None
    """Number of this machine, from 0; null is what Slurm, SkyPilot or Kubernetes say it is."""
    main_process_ip: str | None = None
    """Address of machine 0; null is what MASTER_ADDR or SkyPilot say it is."""
    main_process_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port on machine 0, of which the next one is used too; null is a free one, or with several machines MASTER_PORT,
    else 29500."""


class Health(Spec):
    """What the run watches in itself."""

    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, or skips the step (a bounded number of times)."""
    max_grad_norm_warning: Annotated[float, Field(gt=0)] = 100
    """A gradient norm above this is reported."""


class Recipe(Spec):
    """A fine-tuning job."""

    method: AnyMethod
    """What is optimised: a name, or a block with the method's own keys."""
    model: Model
    data: Data
    output_dir: str
    """The run folder, relative to the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything that is drawn."""
    lora: Lora | None = None
    quantization: Quantization | None = None
    train: Train = Train()
    eval: Eval = Eval()
    generation: Generation = Generation()
    save: Save = Save()
    logging: Logging = Logging()
    launch: Launch = Launch()
    health: Health = Health()
    ignore: Annotated[list[str], OneOrMany()] = []
    """Rule ids of warnings to accept, such as FT016."""
