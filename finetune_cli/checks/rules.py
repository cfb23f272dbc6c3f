"""Every rule by its number: what ruins fine-tunes without a word (FT001 to FT033), and further lints from FT102 on.

Issue numbers are of the public trackers where people lost runs to it; LF is LLaMA-Factory.
"""

from collections.abc import Iterator

from finetune_cli.checks import lints, model, raw, rows, spread
from finetune_cli.checks.rule import Found, Rule, Seen

SHARE = "more than data.max_dropped_fraction of the rows have it"


def ignored(seen: Seen) -> Iterator[Found]:
    for number, name in enumerate(seen.recipe.ignore):
        rule = BY_ID.get(name)
        if rule is None:
            hint = f"did you mean {name.upper()}?" if name.upper() in BY_ID else "`finetune explain` lists the rules"
            yield Found(f"ignore[{number}]", f"there is no rule {name!r}", hint)
        elif not rule.can_be_ignored:
            why = "is an error" if rule.checked else "never warns: it is held by how the engine works"
            yield Found(f"ignore[{number}]", f"{name} {why}, and only warnings can be accepted", "take it out")


RULES: tuple[Rule, ...] = (
    Rule(
        "FT001",
        "rows in which nothing is trained",
        "warning",
        "A row whose labels are all masked costs time and teaches nothing; when all are, the loss is nan or 0 and the "
        "run looks fine (trl 6025, unsloth 2900). Such rows are dropped and counted under their cause.",
        "mend these rows, or raise data.max_dropped_fraction if they may go",
        error_when="no row is left, or more than data.max_dropped_fraction of them are dropped",
        rows=rows.untrained,
    ),
    Rule(
        "FT002",
        "rows longer than data.max_length",
        "warning",
        "Tools cut rows at a default length without a word, and what is cut is the end of the answer with its stop "
        "token (trl 3449, transformers 30998). Here data.overlength says what happens, and it is counted.",
        "raise data.max_length, or say with data.overlength what may happen",
        error_when="data.overlength is error, or more than data.max_dropped_fraction of the rows are dropped",
        rows=rows.lengths,
    ),
    Rule(
        "FT003",
        "no answer ends in a stop token",
        "warning",
        "Where padding is the end-of-sequence token and is masked by its id, the model never learns to stop (trl 1623, "
        "3091, open-r1 494). Pads are masked by length here; this rule looks at what the rows themselves end in.",
        "end the answers with the end-of-sequence token, or use a chat template that does",
        rows=rows.never_stops,
        held="Pads are masked by length, never by id.",
        proof="tests/unit/data/test_batches.py::test_padded_repeats_the_prefix",
    ),
    Rule(
        "FT004",
        "answers that do not end in a stop token",
        "warning",
        "Where the end of the turn is outside the mask, the model learns to go on after its answer (trl 5988, 2059).",
        "end these answers with the end-of-sequence token, or use a chat template that does",
        rows=rows.sometimes_stops,
    ),
    Rule(
        "FT005",
        "the template ends turns with one token, inference stops on another",
        "error",
        "The tuned model writes its end of turn and is not stopped there: it goes on until the length runs out (trl "
        "2059). The ids that stop inference are the tokenizer's eos and those of generation_config.json.",
        "add the token that ends turns to eos_token_id in generation_config.json",
        rows=rows.other_stop,
    ),
    Rule(
        "FT006",
        "two beginning-of-sequence tokens",
        "warning",
        "The template writes one and the tokenizer adds another; inference has one (trl 1400, OpenRLHF 393). A render "
        "is encoded here without special tokens added; rows of plain text that begin with the token still have two.",
        "take the token out of the template or of the text",
        rows=rows.double_bos,
    ),
    Rule(
        "FT007",
        "messages without a chat template",
        "error",
        "Other tools need `{% generation %}` in a template, without which all is masked or refused (marin 7237, trl "
        "4201). Masks are found here from any template as it is; but some template there must be.",
        "set model.chat_template, use an instruct model, or write rows of text or prompt + completion",
        raw=raw.no_template,
        held="Masks come from the renders of the template as shipped, and are proved row by row.",
        proof="tests/parity/test_templates.py::test_every_template_and_shape",
    ),
    Rule(
        "FT008",
        "the template drops the reasoning of answers",
        "warning",
        "Templates strip earlier thinking, so one render of a conversation trains other text than inference sees (trl "
        "6361, ms-swift 4939). Such conversations are split into a row for each turn; this rule tells where a "
        "template drops the reasoning of the very answer that is trained.",
        "use a template that renders reasoning_content, or take the reasoning out of the rows",
        rows=rows.reasoning_lost,
        held="A conversation whose history the template rewrites is split into a row for each turn.",
        proof="tests/unit/data/test_chat.py::test_split_rows_are_numbered_and_each_is_one_render",
    ),
    Rule(
        "FT009",
        "the prompt is not the beginning of the row",
        "warning",
        "Where a token spans the end of the prompt and the beginning of the answer, inference sees other ids than "
        "training did (trl 5213, 2054). Such a token is not trained.",
        "move white space from the end of the prompt to the beginning of the answer",
        error_when=SHARE,
        rows=rows.boundary,
        held="A token across the edge of an answer is kept out of the loss.",
        proof="tests/unit/data/test_tokens.py::test_a_token_across_an_edge_is_not_trained",
    ),
    Rule(
        "FT010",
        "pairs that say nothing",
        "warning",
        "Identical answers have no gradient in DPO and log 2 as their loss for ever; an empty one teaches length.",
        "take these pairs out",
        error_when=SHARE,
        rows=rows.pairs,
    ),
    Rule(
        "FT011",
        "loss scaled by accumulation",
        "warning",
        "Means of means weigh tokens of short batches more (transformers 34191, 35438, unsloth 8261).",
        "nothing: the loss of a step is a sum divided by the count of the whole step",
        held="Sums over counts of the whole optimiser step, over all its batches and processes.",
        proof="tests/unit/engine/test_loop.py::test_batch_of_8_equals_8_accumulated",
    ),
    Rule(
        "FT012",
        "packed rows that see one another",
        "warning",
        "Packing without segments lets a row attend to its neighbour (trl 1230, 3067, LF 4224).",
        "nothing: rows of a bin are segments of their own; a model that cannot keep them apart is refused",
        held="Attention goes segment by segment, with positions of its own.",
        proof="tests/parity/test_families.py::test_two_rows_together_are_two_rows_alone",
    ),
    Rule(
        "FT013",
        "evaluation loss that depends on the batch size",
        "warning",
        "A mean of batch means changes with the batch (transformers 39241).",
        "nothing: the evaluation loss is the mean over all tokens of the set",
        held="One sum and one count over the whole set.",
        proof="tests/unit/engine/test_evaluate.py::test_loss_is_that_of_stock_transformers_for_every_batch_size",
    ),
    Rule(
        "FT014",
        "tokens that the model has no row for",
        "error",
        "Tokens added for a template have no trained embedding, or none at all; under LoRA they stay random and "
        "are not saved (peft 1300, 2898, LF 7997). A marker that is no token at all cannot stop inference either.",
        "use the tokenizer and the chat template that belong to the model, or name the tokens in model.new_tokens",
        model=model.vocabulary,
        rows=rows.split_marker,
    ),
    Rule(
        "FT015",
        "merging into 4-bit weights",
        "error",
        "Adapters merged into quantised weights are rounded with them (peft 2321, transformers 31293).",
        "nothing: the result of a quantised run is its adapter, and nothing here merges it into quantised weights",
        held="Quantised weights stay as they are; the adapter is what is saved.",
        proof="tests/parity/test_qlora.py::test_a_run_on_four_bits_learns_and_leaves_the_base_as_it_was",
    ),
    Rule(
        "FT016",
        "a learning rate that does not fit the method",
        "warning",
        "The rate that suits SFT is about a hundred times too large for DPO, and full fine-tuning wants a tenth of "
        "LoRA's (LF 7734, 6153, trl 1236).",
        "use auto, or a rate in the range of the method",
        error_when="it is more than ten times outside the range",
        lint=lints.learning_rate,
    ),
    Rule(
        "FT017",
        "preferences on a base model",
        "warning",
        "DPO moves probability between answers that the model gives already; a base model gives neither. The sign that "
        "can be seen before weights are loaded is a tokenizer without a chat template.",
        "train with sft first, and start from that",
        model=model.base_for_reference,
    ),
    Rule(
        "FT018",
        "a reference or an adapter of another model",
        "error",
        "Log-probabilities of another base or vocabulary are of other things, and margins do not start at 0 (trl 1193, "
        "1311, LF 8974). The shapes of a starting adapter are compared with its base as well.",
        "name the model that the policy starts from",
        model=model.other_models,
        held="Before the first step the policy and its reference give the same log-probabilities, or the run stops.",
        proof="tests/unit/engine/test_reference.py::test_before_the_first_step_every_margin_is_exactly_0",
    ),
    Rule(
        "FT019",
        "a resume that changes the run",
        "error",
        "Resuming restarts, ends at once or sees other data (LF 7085, transformers 24252, 9099).",
        "nothing: a checkpoint of another run is refused, and a resumed run ends with the same bytes",
        held="Optimiser, schedule, generators and the place in the data are restored; another length is refused.",
        proof="tests/unit/engine/test_run_folder.py::test_killed_run_goes_on_and_ends_as_if_it_had_not_been",
    ),
    Rule(
        "FT020",
        "evaluation that runs out of memory on logits",
        "warning",
        "Logits of a whole evaluation set, or of one batch at every position, do not fit (transformers 8476).",
        "nothing: only positions that are scored meet the vocabulary, in chunks, and none are kept",
        held="Log-probabilities are computed in chunks of positions; no tensor of all logits exists.",
        proof="tests/unit/engine/test_score.py::test_scores_and_gradients",
    ),
    Rule(
        "FT021",
        "a number format that the machine has not",
        "error",
        "float16 weights under a float16 scaler become nan (transformers 23165), and bfloat16 is slow or refused "
        "where the hardware lacks it.",
        "set train.precision to auto",
        lint=lints.precision,
        held="What is trained is float32 whatever the precision.",
        proof="tests/unit/checks/test_model.py::test_what_is_trained_is_float32_under_every_precision",
    ),
    Rule(
        "FT022",
        "frozen weights in float32",
        "warning",
        "Loading in float32 by default doubles the memory of frozen weights (trl 6684). `finetune validate` prints the "
        "size of the weights by number format.",
        "take model.dtype out: it follows train.precision",
        model=model.float32,
    ),
    Rule(
        "FT023",
        "gradient checkpointing without a gradient",
        "warning",
        "Reentrant checkpointing over frozen inputs gives no gradient (transformers 42489, trl 3089).",
        "nothing: checkpointing is never reentrant here",
        held="Checkpointing is never reentrant, and changes no gradient.",
        proof="tests/parity/test_families.py::test_checkpointing_changes_nothing",
    ),
    Rule(
        "FT024",
        "the best checkpoint is deleted",
        "warning",
        "save_total_limit removes the best, or evaluation and saving fall on different steps (transformers 15089, "
        "ms-swift 3314).",
        "nothing: a step that is the best so far is saved at once, and the best and the last are always kept",
        held="Best and last are saved when they happen and never removed.",
        proof="tests/unit/engine/test_run_folder.py::test_best_and_last_are_kept",
    ),
    Rule(
        "FT025",
        "the upload fails at the very end",
        "error",
        "A missing permission is found out after hours (autotrain 769).",
        "set HF_TOKEN to a token that can write, and save.hub_model_id to a repository of yours",
        held="Identity, scope and repository are checked before anything is loaded; results are on the disk first.",
        proof="tests/unit/engine/test_hub.py::test_a_run_that_may_not_write_does_not_start",
    ),
    Rule(
        "FT026",
        "device_map under several processes",
        "error",
        "device_map: auto spreads one model over the GPUs that the other processes use (trl 722, accelerate 1840).",
        "nothing: there is no such key",
        held="device_map is refused as a key, with what to write instead.",
        proof="tests/unit/recipe/test_names.py::test_every_alias_is_answered",
    ),
    Rule(
        "FT027",
        "tokenising that hangs",
        "warning",
        "Many processes and a forked tokenizer deadlock (trl 1964, datasets 6319).",
        "nothing: rows are tokenised in one process",
        held="One process tokenises, with threads; the others wait for the cache.",
        proof="tests/unit/data/test_cache.py::test_one_builds_and_the_others_wait",
    ),
    Rule(
        "FT028",
        "a score read at the wrong token",
        "warning",
        "Reward heads look for the last token that is not padding, and find the wrong one where pad is eos (trl 2778, "
        "transformers 35352).",
        "nothing: rows are read by their length",
        held="Positions come from lengths, in both layouts.",
        proof="tests/parity/test_reward.py::test_what_is_saved_scores_alike_padded_left_right_or_not",
    ),
    Rule(
        "FT029",
        "text where a number was meant, and keys that nobody reads",
        "error",
        "YAML 1.1 reads 5e-5 as text, and unknown keys are ignored (LF 4014, unsloth 10452).",
        "nothing: the reader is YAML 1.2 and strict",
        held="Unknown keys and values of another type are errors with their place.",
        proof="tests/unit/recipe/test_yaml.py::test_core_scalars",
    ),
    Rule(
        "FT030",
        "adapters on few layers, or on none",
        "warning",
        "LoRA on queries and values alone learns less than on all linear layers (arXiv 2305.14314, LF 2156), and names "
        "that match nothing leave nothing to train (trl 4181).",
        "use target_modules: all-linear",
        error_when="no layer matches",
        model=model.targets,
    ),
    Rule(
        "FT031",
        "turns in an odd order",
        "warning",
        "Unmapped roles, conversations that end with the user, prompts that end with the assistant: what is trained is "
        "not what is meant. Roles that are not known are errors of the row.",
        "mend these rows, or map their roles with data.train[].roles",
        raw=raw.turns,
    ),
    Rule(
        "FT032",
        "duplicates, evaluation rows in training, length bias of pairs",
        "warning",
        "Copies are learned by heart, evaluation on trained rows flatters, and preferences that go with length teach "
        "length (arXiv 2107.06499, 2403.19159).",
        "take these rows out",
        rows=rows.copies_and_lengths,
    ),
    Rule(
        "FT033",
        "numbers that do not fit the run",
        "warning",
        "A length beyond the model's window, a warmup that never ends, a checkpoint after the last step, a run of a "
        "handful of steps.",
        "use numbers that fit",
        lint=lints.run_length,
        model=model.window,
        rows=rows.numbers,
    ),
    Rule(
        "FT102",
        "an optimiser that is not known or does not fit the loop",
        "error",
        "Names are those of transformers; some need a loop of their own.",
        "use adamw_torch_fused",
        lint=lints.optimiser,
    ),
    Rule(
        "FT103",
        "an adapter on an adapter",
        "error",
        "A starting adapter goes on with its own rank and layers; `lora:` would be a second one.",
        "remove lora: to train it further, or set model.starting_adapter: merge to start anew on it",
        lint=lints.adapters,
    ),
    Rule(
        "FT104",
        "quantised weights that cannot be trained",
        "error",
        "Weights in 4 or 8 bits have no gradient; adapters on them are trained (QLoRA, arXiv 2305.14314).",
        "add `lora: {}`, or remove quantization:",
        lint=lints.quantised,
    ),
    Rule(
        "FT105",
        "output_dir is an input",
        "error",
        "The result would overwrite the model or the rows it was made from.",
        "name another output_dir",
        lint=lints.output_dir,
    ),
    Rule(
        "FT106",
        "tools that the template does not show",
        "warning",
        "Rows have tools and the template has no place for them: the model learns to call what it was not told of.",
        "use a chat template with tools, or put the tools into the system message",
        rows=rows.tools_lost,
    ),
    Rule(
        "FT107",
        "control tokens inside messages",
        "warning",
        "Text such as <|im_end|> in a message becomes the control token itself and ends the turn there.",
        "take it out of the text, or write it in another way",
        rows=rows.control_tokens,
    ),
    Rule(
        "FT108",
        "rows that need chat_template_kwargs",
        "warning",
        "Some templates open the thinking in the generation prompt unless a setting says otherwise. Rows without "
        "reasoning are trained with that setting, and inference has to use it too.",
        "use the same setting at inference, or write it into the rows as chat_template_kwargs",
        rows=rows.template_kwargs,
    ),
    Rule(
        "FT109",
        "columns of the rows that are not read",
        "warning",
        "The shape of rows is found from their columns; what another shape would read is left out.",
        "choose the method that reads it, or name the columns in data.train[].columns",
        raw=raw.unread,
    ),
    Rule(
        "FT110",
        "`ignore:` of what cannot be ignored",
        "error",
        "`ignore:` accepts warnings by their rule. A wrong id would accept nothing, and errors stay errors.",
        "take it out",
        lint=ignored,
    ),
    Rule(
        "FT111",
        "settings of the method that do not fit the run",
        "warning",
        "A loss that sorts its batch sees only the pairs of one forward, so accumulation and processes change it; some "
        "settings are defined for all weights only, some metrics only for models that answer.",
        "raise train.per_device_train_batch_size, or choose another setting",
        error_when="the setting has no meaning in this run",
        lint=lints.method_misfits,
        rows=rows.no_prompts,
    ),
    Rule(
        "FT112",
        "trackers that cannot start",
        "error",
        "A tracker that is not known, not installed, or waits for a password stops a run after its weights are loaded.",
        "take it out of logging.report_to",
        lint=lints.trackers,
    ),
    Rule(
        "FT113",
        "an initialisation of adapters that cannot be used",
        "error",
        "Some initialisations need rows or gradients first, or leave the base changed; peft finds out after loading.",
        "use true, gaussian, pissa, olora or orthogonal",
        lint=lints.initial_adapters,
    ),
    Rule(
        "FT114",
        "what cannot be spread over processes",
        "error",
        "launch.strategy: fsdp2 and deepspeed-zero3 keep a piece of each weight in each process; some settings need "
        "whole ones, some were not tried.",
        "use launch.strategy: ddp",
        lint=spread.sharding,
    ),
    Rule(
        "FT115",
        "machines that do not know their places",
        "error",
        "A run on several machines is started on each of them, and each must know which it is and where the first is.",
        "set launch.machine_rank and launch.main_process_ip",
        lint=lints.machines,
    ),
    Rule(
        "FT116",
        "a configuration of accelerate that says what the recipe says",
        "error",
        "`accelerate launch --config_file` can ask for FSDP, DeepSpeed or gradient accumulation; the weights would be "
        "wrapped twice, or the loss divided twice.",
        "say it in the recipe",
        lint=spread.of_accelerate,
    ),
    Rule(
        "FT117",
        "an attention that is not to be had",
        "error",
        "FlashAttention's kernels need an NVIDIA GPU and half precision; another one in its place would not be what "
        "the recipe says.",
        "set model.attn_implementation to auto",
        lint=lints.kernels,
    ),
)
BY_ID = {rule.id: rule for rule in RULES}
