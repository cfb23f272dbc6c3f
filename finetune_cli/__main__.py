"""`python -m finetune_cli`: the same as the `finetune` command."""

import signal


def main() -> None:
    """Ctrl-C while the program is being read ends it without a word."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from finetune_cli.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
