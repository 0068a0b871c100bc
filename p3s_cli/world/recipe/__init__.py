"""How the bundled family is trained from nothing; run as `python -m p3s_cli.world.recipe STAGE`."""
