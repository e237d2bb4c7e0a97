"""The command line. Nothing heavy is imported before a command runs: `--help` stays instant."""


def main() -> None:
    """Runs the command line and exits."""
    from graftune.cli.app import app

    app(prog_name="graftune")
