"""`python -m finetune_cli`: the same as the `finetune` command."""

from finetune_cli.cli import main

if __name__ == "__main__":
    main()
