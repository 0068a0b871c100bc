from p3s_cli.cli import run

run()
