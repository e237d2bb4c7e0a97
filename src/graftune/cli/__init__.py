"""The command line. Nothing heavy is imported before a command runs: `--help` stays instant."""


def main() -> None:
    """Runs the command line and exits."""
    import logging

    from graftune.cli.app import app

    # Merely imported, as by the Trainer, it warns on CPUs of a kernel that it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    app(prog_name="graftune")
