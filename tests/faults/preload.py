"""What the server imports before it forks runs: everything slow, nothing that starts a thread or makes a tensor."""

import finetune_cli.commands
import finetune_cli.data.rows
import finetune_cli.engine.finish
import finetune_cli.engine.prepare
import finetune_cli.worker  # noqa: F401
